"""Replaced values change what they should and nothing else; the study tells it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from sep_attention import visible_mask

from sepllm_train.analysis.probe.interventions import (
    CONDITIONS,
    DECIDING,
    MASKED,
    REPLACED,
    Text,
    donors_before,
    donors_elsewhere,
    far_separators,
    intervene,
    recording,
    replacing,
    taken,
)
from sepllm_train.analysis.probe.study import FAR, headline, shared, verdict
from sepllm_train.base.statistics import Estimate
from sepllm_train.distributed.launch import alone
from sepllm_train.model.sequence import SeparatorSequence
from sepllm_train.runs.evaluate import core_attentions, evaluate
from sepllm_train.runs.open import TrainedRun, open_run
from sepllm_train.runs.variations import classes_of, without_classes
from tests.analysis.probe.conftest import Probed
from tests.support.command import command

main = command("probe")


@pytest.fixture(scope="module")
def run(probed: Probed) -> Iterator[TrainedRun]:
    with alone():
        yield open_run(probed.runs[0])


@torch.no_grad()
def test_far_queries_alone_read_the_replaced_values(run: TrainedRun) -> None:
    """One layer against the sum over all keys, in fp64."""
    core = core_attentions(run.model)[0]
    assert core.sink is not None
    core.sink.data.uniform_(-1, 1)
    text = Text.of(run.validation[0], torch.device("cpu"))
    plan = run.pattern.plan(text.batch["separator_class"], text.batch["document_start"])
    length, heads, width = plan.sequence_length, run.config.model.heads, run.config.model.head_dim
    query, key, value, other = torch.randn(4, length, 1, heads, width).unbind()
    chosen = far_separators(run.pattern, text)
    sequence = SeparatorSequence.of(plan)
    values = [other[:, 0] for _ in core_attentions(run.model)]
    with replacing(run.model, values, chosen):
        out = core(query, key, value, None, packed_seq_params=sequence)
    scores = torch.einsum("ihd,jhd->hij", query[:, 0].double(), key[:, 0].double()) * width**-0.5
    scores.masked_fill_(~visible_mask(plan, core.layer.window, core.layer.horizons)[0], float("-inf"))
    sink = core.sink.double()[:, None, None].expand(heads, length, 1)
    weight = torch.cat((scores, sink), -1).softmax(-1)[..., :-1]
    place = torch.arange(length)
    far = (place[:, None] - place >= core.layer.window) & chosen
    read = torch.where(far[:, :, None, None], other[:, 0].double(), value[:, 0].double())
    expected = torch.einsum("hij,ijhd->ihd", weight, read).flatten(1)
    assert far.any() and torch.allclose(out[:, 0].double(), expected, atol=1e-5)


@torch.no_grad()
def test_own_values_change_nothing_and_others_only_what_is_far(run: TrainedRun) -> None:
    text = Text.of(run.validation[0], torch.device("cpu"))
    with recording(run.model) as own:
        before = text.forward(run.model, run.pattern)
    chosen = far_separators(run.pattern, text)
    with replacing(run.model, own, chosen):
        same = text.forward(run.model, run.pattern)
    with replacing(run.model, [torch.randn_like(layer) for layer in own], chosen):
        changed = text.forward(run.model, run.pattern)
    assert torch.allclose(same, before, atol=1e-5)
    first = int(chosen.nonzero()[0]) + run.pattern.layers[0].window
    assert torch.equal(changed[:first], before[:first]) and not torch.allclose(changed, before)
    assert torch.equal(text.forward(run.model, run.pattern), before)


def test_conditions_are_those_of_their_names(run: TrainedRun) -> None:
    losses = intervene(run, 3)
    assert tuple(losses) == CONDITIONS
    assert torch.allclose(losses["as trained"], evaluate(run.model, run.pattern, run.validation, 3).nats, atol=1e-6)
    bare = without_classes(run.pattern, classes_of(run.pattern))
    assert torch.allclose(losses[MASKED], evaluate(run.model, bare, run.validation, 3).nats, atol=1e-6)
    changed = [name for name in CONDITIONS[1:] if not torch.allclose(losses[name], losses["as trained"], atol=1e-6)]
    assert changed == list(CONDITIONS[1:])
    again = intervene(run, 3)
    assert all(torch.equal(losses[name], again[name]) for name in CONDITIONS)


def test_donors() -> None:
    classes = torch.tensor([1, 0, 1, 2, 1, 2, 0, 3], dtype=torch.uint8)
    chosen = classes > 0
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        before = donors_before(classes, chosen, generator)
        assert before[[0, 1, 3, 6, 7]].tolist() == [-1] * 5
        assert before[2] == 0 and before[4] in (0, 2) and before[5] == 3
        other = torch.tensor([0, 2, 1, 0, 2], dtype=torch.uint8)
        elsewhere = donors_elsewhere(classes, chosen, other, generator)
        assert elsewhere[[1, 6]].tolist() == [-1, -1]
        assert elsewhere[[0, 2, 4]].tolist() == [2] * 3 and all(int(place) in (1, 4) for place in elsewhere[[3, 5]])
        # No separator of class 3 is there: any other is.
        assert int(elsewhere[7]) in (1, 2, 4)
    assert (donors_elsewhere(classes, chosen, torch.zeros(5, dtype=torch.uint8), generator) == -1).all()
    values, own = [torch.arange(8.0)[:, None, None]], [-torch.ones(8, 1, 1)]
    assert taken(values, before, own)[0].flatten().tolist() == [
        own[0][0].item() if place < 0 else float(place) for place in before.tolist()
    ]


@pytest.mark.parametrize(
    ("shares", "answer"),
    [
        ((0.6, 0.61, 0.59), "summary"),
        ((0.9, 0.9, 0.1), "summary, though the interval reaches below the bound"),
        ((0.1, 0.11, 0.12), "sink: summary is refuted"),
        ((0.1, 0.3, 0.1), "sink: summary is refuted, though the interval reaches above the bound"),
        ((0.1, 0.5, 0.3), "undecided"),
        (
            (0.9, None, 0.9),
            "none: masking far separators costs at least one of the models nothing that could be shared",
        ),
        ((0.9, 0.9), "none: the rule takes 3 seeds, not 2"),
    ],
)
def test_verdict(shares: tuple[float | None, ...], answer: str) -> None:
    results = [{"groups": {FAR: {"shares": dict.fromkeys(REPLACED, 0.3) | {DECIDING: share}}}} for share in shares]
    found = verdict(results)
    assert found["answer"] == answer
    told = headline(found, len(shares))
    assert told.startswith(f"**{answer[0].upper()}{answer[1:]}.**")
    if len(shares) == 3:
        assert found["beside"]["answer"] == "undecided"
        share = (
            "Share 0.300 (0.300 to 0.300) with `another segment` of the same text, which does not decide: undecided."
        )
        assert told.endswith(share)


def test_nothing_is_shared_where_masking_costs_nothing() -> None:
    assert shared(Estimate(0.01, 0.001), Estimate(0.02, 0.001)) == pytest.approx(0.5)
    assert shared(Estimate(0.01, 0.001), Estimate(0.02, 0.011)) is None
    assert shared(Estimate(0.01, 0.001), Estimate(-0.02, 0.001)) is None


def test_study(probed: Probed, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output = tmp_path / "probe"
    asked = ["ask", *map(str, probed.runs), "--output", str(output), "--samples", "12", "--needles", "2"]
    assert main([*asked, "--text", str(probed.text)]) == 0
    assert "# Summary or sink?" in capsys.readouterr().out
    result = json.loads((output / "probe.json").read_text())
    assert [run["seed"] for run in result["runs"]] == [1, 2] and result["window"] == 8 and result["reach"] == 15
    assert result["groups"]["far recall"]["changes"]["masked"]["n"] == 2
    for run in result["runs"]:
        groups = run["groups"]
        assert 0 < groups["far recall, values of facts"]["tokens"] < groups["far recall"]["tokens"] < 12 * 128
        assert groups["far recall, keys of facts"]["tokens"] > 0
        assert 0 < groups["far recall, real text"]["tokens"] < groups["far recall"]["tokens"]
        assert [row["needles"] for row in run["needles"]] == [2] * 4
        # The whole needle is in the sequence, after the three initial tokens.
        distances = [row["distance"] for row in run["needles"]]
        assert result["reach"] < min(distances) and max(distances) <= 128 - 3 - 1
        assert sum(row["questions"] for row in run["associative"]) > 0
    for name in ("loss_by_intervention", "recall_by_distance", "needles"):
        assert (output / f"{name}.svg").stat().st_size > 1000


@pytest.mark.parametrize(
    ("runs", "options", "words"),
    [
        ((0, 0), [], "is the same run as"),
        ((0,), ["--samples", "1"], "--samples 1 must be at least 2"),
        ((0, 1), ["--text", "{text}"], "no needle fits"),
    ],
)
def test_questions_that_make_no_sense(
    probed: Probed,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    runs: tuple[int, ...],
    options: list[str],
    words: str,
) -> None:
    monkeypatch.setattr("sepllm_train.analysis.probe.study._LONGEST", 120)
    folders = [str(probed.runs[number]) for number in runs]
    given = [option.format(text=probed.text) for option in options]
    assert main(["ask", *folders, "--output", str(tmp_path / "out"), *given]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("key", "value"), [("seed", "1"), ("  initial_tokens", "4")])
def test_runs_that_differ_in_more_than_their_seed(
    probed: Probed, tmp_path: Path, capsys: pytest.CaptureFixture, key: str, value: str
) -> None:
    folder = shutil.copytree(probed.runs[1], tmp_path / "run")
    config = (folder / "config.yaml").read_text().splitlines()
    config = [f"{key}: {value}" if line.startswith(f"{key}:") else line for line in config]
    (folder / "config.yaml").write_text("\n".join(config))
    assert main(["ask", str(probed.runs[0]), str(folder), "--output", str(tmp_path / "out"), "--samples", "2"]) == 2
    assert ("same seed" if key == "seed" else "another attention") in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"window": 64}, "more than half of its 128"),
        ({"full_layers": "first"}, "no full layer"),
        ({"pattern": "streaming"}, "needs separators beyond the window"),
    ],
)
def test_runs_that_cannot_be_asked(
    probed: Probed, tmp_path: Path, capsys: pytest.CaptureFixture, change: dict[str, object], words: str
) -> None:
    folder = shutil.copytree(probed.runs[0], tmp_path / "run")
    config = (folder / "config.yaml").read_text()
    for key, value in change.items():
        old = next(line for line in config.splitlines() if line.startswith(f"  {key}:"))
        config = config.replace(old, f"  {key}: {value}", 1)
    (folder / "config.yaml").write_text(config)
    assert main(["ask", str(folder), "--output", str(tmp_path / "out"), "--samples", "2"]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "out").exists()
