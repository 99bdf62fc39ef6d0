"""Which runs form a row, what the rows are called, who is paired with whom, and who is left out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from sepllm_train.base.errors import UserError
from sepllm_train.compare.report import build_report
from sepllm_train.compare.variants import differences, pairing_notes, pairs, points, read_variants, runs_of
from tests.compare.run_records import straight, training, validation

Seeds = Callable[..., list[Path]]


def shape(folders: list[Path], **options: Any) -> list[tuple[str, list[str]]]:
    """Labels and names of the runs of every row."""
    return [(row.label, [run.label for run in row.runs]) for row in read_variants(folders, **options)]


def configure(folder: Path, **settings: Any) -> None:
    """Change settings of a run's config.yaml."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | settings))


def test_runs_that_differ_in_seed_alone_form_a_row_in_the_order_given(make_seeds: Seeds) -> None:
    dense, sep = make_seeds("dense", {1: 10, 2: 10}), make_seeds("sep", {1: 20, 2: 20})
    configure(dense[1], run_root="/elsewhere", resume="never")
    assert shape([dense[0], sep[1], dense[1], sep[0]]) == [
        ("dense", ["dense_seed1", "dense_seed2"]),
        ("sep", ["sep_seed2", "sep_seed1"]),
    ]
    assert shape([sep[1], *dense])[0] == ("sep", ["sep_seed2"])


def test_any_other_setting_makes_another_row(make_seeds: Seeds) -> None:
    dense = make_seeds("dense", {1: 10, 2: 10, 3: 10})
    configure(dense[2], optim={"lr": 1e-3})
    assert shape(dense) == [("dense_seed1", ["dense_seed1", "dense_seed2"]), ("dense_seed3", ["dense_seed3"])]


def test_the_optimizer_makes_a_row_and_runs_of_before_have_adam(make_seeds: Seeds) -> None:
    dense = make_seeds("dense", {1: 10, 2: 10, 3: 10, 4: 10})
    for folder, optim in zip(dense, ({}, {"optimizer": "adam"}, {"optimizer": "muon"}, {"groups": [{}]}), strict=True):
        configure(folder, optim={"lr": 1e-3} | optim)
    assert [names for _, names in shape(dense)] == [["dense_seed1", "dense_seed2"], ["dense_seed3"], ["dense_seed4"]]


def test_no_groups_keeps_every_run_apart(make_seeds: Seeds) -> None:
    dense = make_seeds("dense", {1: 10, 2: 10})
    assert shape(dense, groups=False) == [("dense_seed1", ["dense_seed1"]), ("dense_seed2", ["dense_seed2"])]
    with pytest.raises(UserError, match="2 runs differ only in their seed.*--no-groups"):
        read_variants(dense)


@pytest.mark.parametrize("content", [None, "", "name: [", "- 1\n", "name: x\n"])
def test_without_a_configuration_to_read_a_run_is_its_own_row(make_seeds: Seeds, content: str | None) -> None:
    dense, sep = make_seeds("dense", {1: 10, 2: 10}), make_seeds("sep", {1: 20})
    for folder in dense:
        (folder / "config.yaml").unlink()
        if content is not None:
            (folder / "config.yaml").write_text(content)
    assert [label for label, _ in shape([*dense, *sep])] == ["dense_seed1", "dense_seed2", "sep"]


def test_a_seed_that_comes_again_begins_another_row(make_seeds: Seeds, make_run: Callable[..., Path]) -> None:
    dense = make_seeds("dense", {1: 10, 2: 10})
    again = make_run("again", straight(12), comparable={"seed_of_data_order": 1})
    (again / "config.yaml").write_text((dense[0] / "config.yaml").read_text())
    assert shape([*dense, again]) == [("dense", ["dense_seed1", "dense_seed2"]), ("again", ["again"])]


@pytest.mark.parametrize(
    ("names", "label"),
    [
        (("sep-s1", "sep-s2"), "sep"),
        (("sepseed1", "sepseed2"), "sep"),
        (("sep_n64.seed-1", "sep_n64.seed-2"), "sep_n64"),
        (("sep", "sep_seed2"), "sep"),
        (("one", "two"), "one"),
        (("seed1", "seed2"), "seed1"),
        (("loss1", "loss2"), "loss1"),
    ],
)
def test_a_row_is_called_what_its_runs_are_without_the_seed(
    make_seeds: Seeds, names: tuple[str, str], label: str
) -> None:
    dense, sep = make_seeds("dense", {1: 10, 2: 10}), make_seeds("sep", {1: 20, 2: 20})
    for folder, name in zip(sep, names, strict=True):
        run = json.loads((folder / "run.json").read_text())
        (folder / "run.json").write_text(json.dumps(run | {"name": name}))
    assert [found for found, _ in shape([*dense, *sep])] == ["dense", label]


def test_a_number_that_is_not_the_seed_stays_in_the_name_of_a_single_run(make_seeds: Seeds) -> None:
    dense, sep = make_seeds("dense", {1: 10}), make_seeds("sep", {64: 20})
    run = json.loads((sep[0] / "run.json").read_text())
    run["comparable"]["seed_of_data_order"] = 1
    (sep[0] / "run.json").write_text(json.dumps(run))
    assert [label for label, _ in shape([*dense, *sep])] == ["dense", "sep_seed64"]


def test_pairs_are_of_the_same_seed_whatever_the_order(make_seeds: Seeds) -> None:
    dense, sep = make_seeds("dense", {1: 10, 2: 10, 3: 10}), make_seeds("sep", {4: 20, 3: 20, 1: 20})
    first, second = read_variants([*dense, *sep])
    assert [(run.label, partner.label) for run, partner in pairs(second, first)] == [
        ("sep_seed3", "dense_seed3"),
        ("sep_seed1", "dense_seed1"),
    ]
    assert pairing_notes([first, second]) == [
        "Seed 4 of sep has no partner in dense: ratios and differences between the two leave it out.",
        "Seed 2 of dense has no partner in sep: ratios and differences between the two leave it out.",
    ]


def test_single_runs_are_paired_whatever_their_seeds(make_seeds: Seeds) -> None:
    first, second = read_variants([*make_seeds("dense", {1: 10}), *make_seeds("sep", {2: 20})])
    assert [(run.seed, partner.seed) for run, partner in pairs(second, first)] == [(2, 1)]
    assert pairing_notes([first, second]) == []


def fall(step: int) -> dict[str, Any]:
    """A record whose tokens are fewer than those before it."""
    return validation(step, 4) | {"tokens": 5}


def other_count(step: int, factor: float) -> dict[str, Any]:
    """A record of another way to count FLOPs."""
    record = validation(step, 4)
    return record | {"flops/dense": int(factor * record["flops/dense"])}


BROKEN = {
    "one point": ([validation(0, 6), validation(10, None)], "has 1 validation point with"),
    "no flops": (
        [validation(0, 6), {k: v for k, v in validation(10, 5).items() if k != "flops/paper"}],
        "'flops/paper'",
    ),
    "negative": ([validation(0, 6), validation(10, 5) | {"seconds": -1}], "no number of 0 or more for 'seconds'"),
    "huge": ([validation(0, 6), validation(10, 5) | {"flops/model": 10**400}], "a number of 401 digits"),
    "beyond": ([validation(0, 6), validation(10, 5) | {"seconds": 1e308}], "no number of 0 or more for 'seconds'"),
    "half a step": ([validation(0, 6), validation(10.5, 5)], "no number of 0 or more for 'step'"),
    "digits": (
        [validation(0, 6), json.dumps(validation(10, 5)).replace("5", "5" * 5000, 1) + "\n", validation(20, 5)],
        "is not JSON of this kind (a number of",
    ),
    "deep": ([validation(0, 6), "[" * 100_000 + "\n", validation(20, 4)], "line 2 is not JSON of this kind (nested"),
    "text": (
        [validation(0, 6), validation(10, 5, **{"val/bits_per_byte": "1.2"})],
        "'val/bits_per_byte' must be a number",
    ),
    "list": (
        [validation(0, 6), validation(10, 5, **{"val/a/loss": [1] * 9999})],
        "'val/a/loss' must be a number, not [1",
    ),
    "truth": ([validation(0, 6), validation(10, True)], "'val/loss' must be a number, not True"),
    "half a character": ([validation(0, 6), validation(10, 5, **{"val/\ud800/loss": 5.0})], "half of a character"),
    "falls": (
        [validation(0, 6), validation(10, 5), fall(20)],
        "has tokens fall from 10,000 at step 10 to 5 at step 20",
    ),
    "mixed": ([validation(0, 6), validation(10, 5), other_count(20, 2)], "conventions are mixed"),
    "other": ([validation(0, 6), other_count(10, 2), other_count(20, 2)], "counted by different conventions"),
    "garbage": ([validation(0, 6), "nonsense\n", validation(20, 4)], "line 2 is not JSON"),
    "training only": ([training(1, 6.0)], "has 0 validation points"),
}


@pytest.mark.parametrize(("records", "words"), BROKEN.values(), ids=BROKEN.keys())
def test_a_run_that_cannot_be_compared_is_left_out_by_name(
    make_seeds: Seeds, records: list[Any], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    dense, sep = make_seeds("dense", {1: 10, 2: 10}), make_seeds("sep", {1: 20, 2: records})
    told: list[str] = []
    assert shape([*dense, *sep], warn=told.append) == [
        ("dense", ["dense_seed1", "dense_seed2"]),
        ("sep", ["sep_seed1"]),
    ]
    (sentence,) = told
    assert sentence.startswith("Left out: ") and words in sentence and str(sep[1]) in sentence
    read_variants([*dense, *sep])
    assert capsys.readouterr().err == f"warning: {sentence}\n"
    with pytest.raises(UserError, match=f"{sep[1]}"):
        read_variants([*dense, *sep], strict=True)


INFO: dict[str, tuple[dict[str, Any], str]] = {
    "digits": ({"steps": 10**400}, "run.json is not JSON of this kind (a number of 401 digits)"),
    "half a character": ({"name": "\ud800"}, "half of a character"),
    "comparable": ({"comparable": None}, "has no 'comparable' object"),
}


@pytest.mark.parametrize(("change", "words"), INFO.values(), ids=INFO.keys())
def test_a_run_whose_run_json_is_damaged_is_left_out_by_name(
    make_seeds: Seeds, change: dict[str, Any], words: str
) -> None:
    dense, sep = make_seeds("dense", {1: 10, 2: 10}), make_seeds("sep", {1: 20, 2: 20})
    info = json.loads((sep[1] / "run.json").read_text()) | change
    (sep[1] / "run.json").write_text(json.dumps(info))
    told: list[str] = []
    assert shape([*dense, *sep], warn=told.append)[1] == ("sep", ["sep_seed1"])
    (sentence,) = told
    assert sentence.startswith("Left out: ") and words in sentence and str(sep[1]) in sentence


@pytest.mark.parametrize(
    "change",
    [
        {"origin": "a\0b"},
        {"origin": "x" * 5000},
        {"origin": ["runs"]},
        {"origin": f"runs/checkpoints/step_{'9' * 5000}"},
        {"name": ["a"]},
        {"name": "x" * 100_000},
        {"name": "one\nline"},
        {"identity": [1]},
        {"identity": {"data.earlier": "x"}, "origin": "."},
        {"parameters": {"a": [1, {"b": None}]}, "devices": [[]], "status": {"x": 1}, "world_size": "many"},
    ],
    ids=lambda change: " ".join(change),
)
def test_what_run_json_says_in_another_type_is_passed_over(make_seeds: Seeds, change: dict[str, Any]) -> None:
    (dense,), (sep,) = make_seeds("dense", {1: 10}), make_seeds("sep", {1: 20})
    (sep / "run.json").write_text(json.dumps(json.loads((sep / "run.json").read_text()) | change))
    variants = read_variants([dense, sep], warn=lambda sentence: None)
    assert [len(variant.runs) for variant in variants] == [1, 1]
    text = build_report(variants).console()
    assert "sep" in text and len(text) < 5000


def test_metrics_beyond_any_measure_are_gaps(make_seeds: Seeds) -> None:
    curve = [
        validation(0, 6),
        validation(10, 1e300),
        validation(20, 4.5, **{"val/bits_per_byte": 1e300}),
        validation(30, 4),
    ]
    variants = read_variants([*make_seeds("dense", {1: 10}), *make_seeds("sep", {1: curve})])
    assert [record["step"] for record in points(variants[1].runs[0])] == [0, 20, 30]
    build_report(variants).data()


def test_padding_of_another_layout_is_no_other_convention(make_seeds: Seeds) -> None:
    """1% more FLOPs from step 20 on, as from a vocabulary padded for more processes."""
    resumed = [validation(0, 6), validation(10, 5), other_count(20, 1.01)]
    assert len(read_variants([*make_seeds("dense", {1: 10}), *make_seeds("sep", {1: resumed})])) == 2


def test_a_model_of_another_shape_may_have_other_flops(make_seeds: Seeds) -> None:
    wide = [validation(0, 6), other_count(10, 2), other_count(20, 2)]
    rows = read_variants([*make_seeds("dense", {1: 10}), *make_seeds("wide", {1: wide}, parameters=9_000_000)])
    assert [row.label for row in rows] == ["dense", "wide"]


def test_tokens_of_a_curriculum_may_have_other_flops_from_phase_to_phase(make_seeds: Seeds) -> None:
    short = [validation(0, 6), other_count(10, 0.5), other_count(20, 0.75)]
    phases = [{"length": 512, "steps": 10}]
    rows = read_variants([*make_seeds("dense", {1: 10}), *make_seeds("short", {1: short}, curriculum=phases)])
    assert [row.label for row in rows] == ["dense", "short"]
    assert differences(runs_of(rows))["curriculum"] == [None, phases]


def test_batches_change_the_share_of_a_curriculums_short_sequences_alone(make_seeds: Seeds) -> None:
    short, shorter = ([validation(0, 6), other_count(10, 0.5), other_count(20, last)] for last in (0.75, 0.6))
    phases, batches = [{"length": 512, "steps": 10}], [{"batch": 2, "steps": 10}]
    one = make_seeds("one", {1: short}, curriculum=phases)
    growing = make_seeds("growing", {1: shorter}, curriculum=phases, batch_schedule=batches)
    assert differences(runs_of(read_variants([*one, *growing])))["batch_schedule"] == [None, batches]
    mixed = [validation(0, 6), other_count(10, 2), other_count(20, 2)]
    one = make_seeds("alike", {1: 10}, curriculum=phases, batch_schedule=batches)
    other = make_seeds("unlike", {1: mixed}, curriculum=phases, batch_schedule=batches)
    plain, grown = make_seeds("plain", {1: 10}), make_seeds("grown", {1: mixed}, batch_schedule=batches)
    for folders in ([*one, *other], [*plain, *grown]):
        with pytest.raises(UserError, match="different conventions"):
            read_variants(folders)


def test_the_reference_keeps_its_place_or_the_comparison_is_refused(make_seeds: Seeds) -> None:
    """Its first seed has nothing to compare: the second one holds the row's place, and without it there is none."""
    dense, sep = make_seeds("dense", {1: [], 2: 10}), make_seeds("sep", {1: 20, 2: 20})
    other = make_seeds("other", {1: 20})
    assert [label for label, _ in shape([dense[0], *sep, dense[1]])] == ["dense", "sep"]
    with pytest.raises(
        UserError, match="dense_seed1 is the reference, which cannot be left out: .*0 validation points"
    ):
        read_variants([dense[0], *sep, *other])


def test_what_is_left_must_be_two_rows(make_seeds: Seeds) -> None:
    dense, sep = make_seeds("dense", {1: 10, 2: []}), make_seeds("sep", {1: []})
    with pytest.raises(UserError, match="Only dense_seed1 is left to compare of 3 runs: .*dense_seed2.*sep_seed1"):
        read_variants([*dense, *sep])
    with pytest.raises(UserError, match="None of the 2 runs can be compared: .*dense_seed2.*sep_seed1"):
        read_variants([dense[1], *sep])


def test_other_data_is_refused_even_in_one_seed(make_seeds: Seeds) -> None:
    dense, sep = make_seeds("dense", {1: 10, 2: 10}), make_seeds("sep", {1: 20, 2: 20})
    run = json.loads((sep[1] / "run.json").read_text())
    run["comparable"]["tokenizer"] = "e" * 64
    (sep[1] / "run.json").write_text(json.dumps(run))
    with pytest.raises(UserError, match="they used different tokenizers"):
        read_variants([*dense, *sep])


def test_a_key_that_is_empty_is_as_one_that_is_not_there(make_seeds: Seeds) -> None:
    """A run that is older than the key has none."""
    dense = make_seeds("dense", {1: 10, 2: 10, 3: 10})
    configure(dense[1], data={"prefixes": [], "share": None, "other": False})
    configure(dense[2], data={"share": 0})
    assert shape(dense) == [("dense_seed1", ["dense_seed1", "dense_seed2"]), ("dense_seed3", ["dense_seed3"])]
