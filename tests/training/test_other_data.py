"""Runs that go on with other data, and that are validated on datasets of their own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_prep.sidecar import read_header
from sepllm_train.base.errors import UserError
from sepllm_train.config.compatibility import BLEND_ORDER, DATA, EARLIER_DATA, LATEST_BLEND_ORDER
from sepllm_train.config.schema import Config
from sepllm_train.runs.records import read_run
from sepllm_train.training.checkpoint import (
    blend_order,
    check_identity,
    digests,
    earlier_data,
    identity,
    read_state,
    trained_on,
)
from tests.support.command import command
from tests.support.datasets import copy_dataset, index_bytes, index_lengths, rewrite

main = command("prepare")


@pytest.fixture(scope="module")
def other(sample_prefix: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Prefix of other text, by the tokenizer of the sample corpus."""
    folder = tmp_path_factory.mktemp("other")
    tokenizer = sample_prefix.parent / read_header(sample_prefix).tokenizer.file
    text = "".join(json.dumps({"text": f"Line {n} of another text; it goes on. " * 40}) + "\n" for n in range(40))
    (folder / "lines.jsonl").write_text(text, encoding="utf8")
    prefix = str(folder / "lines")
    assert main(["tokenize", f"{prefix}.jsonl", "--output", prefix, "--tokenizer", str(tokenizer)]) == 0
    return prefix


def test_a_run_goes_on_with_other_data(trainer: Any, finished: Callable, other: str) -> None:
    """Optimizer and counters go on; killed after a step, the same command continues it; what came before is told."""
    source = trainer.root / finished("one") / "checkpoints" / "step_00000002"
    data = ("data=prefixes", f"data.prefixes=[{other}]", "training.checkpoint_interval=1")
    command = (f"resume={source}", "resume_other_data=true", *data)
    outcome = trainer.here("name=refused", command[0], *data)
    assert outcome.code == 2 and "the data sources docs, this run has lines" in outcome.sentence
    assert "resume_other_data=true" in outcome.sentence
    outcome = trainer.here("name=annealed", *command)
    assert outcome.code == 0, outcome.errors[-3000:]
    run, first = trainer.root / "annealed", read_state(source)
    record, end = json.loads((run / "run.json").read_text()), run / "checkpoints" / "step_00000004"
    assert [r["step"] for r in trainer.records("annealed") if "train/loss" in r] == [3, 4]
    assert trainer.records("annealed")[-1]["tokens"] == 2 * first["state"]["tokens"]
    assert list(record["comparable"]["data"]) == ["lines"]
    before, own = trained_on(read_state(end)["identity"])
    assert list(before["data"]) == ["docs"] and list(own["data"]) == ["lines"]
    assert DATA in record["identity"]
    assert record["identity"][EARLIER_DATA] == record["comparable"]["earlier_data"] == [before]

    killed = trainer.root / "killed_annealed"
    shutil.copytree(run, killed, ignore=shutil.ignore_patterns("step_00000004", ".lock"))
    (killed / "run.json").write_text(json.dumps({**record, "status": "running"}))
    outcome = trainer.here(f"name={killed.name}", *command)
    assert outcome.code == 0 and "step_00000003: " in outcome.output, outcome.errors[-3000:]
    assert dict(digests(killed / "checkpoints" / "step_00000004")) == dict(digests(end))
    assert json.loads((killed / "run.json").read_text())["identity"] == record["identity"]
    # Its curve is that of both runs.
    assert [r["step"] for r in read_run(run).training] == [1, 2, 3, 4]


def test_seen_text_is_not_validated_on(trainer: Any, finished: Callable, other: str, sample_prefix: Path) -> None:
    """Neither as a dataset of its own nor as a larger share that is held out."""
    source = f"resume={trainer.root / finished('one')}"
    more = ("resume_other_data=true", "training.steps=6")
    data = ("data=prefixes", f"data.prefixes=[{other}]", f"data.validation_prefixes=[{sample_prefix}]")
    outcome = trainer.here("name=seen", source, *more, *data)
    assert outcome.code == 2 and "was trained on docs; validate on other text" in outcome.sentence
    outcome = trainer.here("name=seen", source, *more, "data.validation_fraction=0.3")
    assert outcome.code == 2 and "data.validation_fraction=0.3 would validate on documents of docs" in outcome.sentence
    identity = {DATA: {"a": {"sha256": "1"}}, "data.validation_fraction": 0.1}
    assert earlier_data(identity, identity) == []
    assert len(earlier_data(identity, {**identity, "data.validation_fraction": 0.0})) == 1


def test_with_the_same_data_it_is_the_plain_resume(trainer: Any, finished: Callable) -> None:
    """Bit for bit, and nothing is told of earlier data."""
    source = trainer.root / finished("one") / "checkpoints" / "step_00000002"
    assert trainer.here("name=same_data", f"resume={source}", "resume_other_data=true").code == 0
    ends = [trainer.root / name / "checkpoints" / "step_00000004" for name in ("one", "same_data")]
    assert EARLIER_DATA not in read_state(ends[1])["identity"]
    assert dict(digests(ends[1])) == dict(digests(ends[0]))


def test_data_that_was_exchanged_is_other_data(trainer: Any, finished: Callable, other: str, tmp_path: Path) -> None:
    """The same tokens under the same name with other separators or other documents: what the run read is gone."""
    prefix = copy_dataset(other, tmp_path / "first")
    data = ("data=prefixes", f"data.prefixes=[{prefix}]")
    source = f"resume={trainer.root / finished('exchanged', *data)}"
    lengths = index_lengths(prefix)
    changes = {
        "separators": (".sep.bin", bytes(sum(lengths))),
        "document boundaries": (".idx", index_bytes([lengths[0] - 1, lengths[1] + 1, *lengths[2:]])),
    }
    for what, (suffix, content) in changes.items():
        changed = copy_dataset(other, tmp_path / suffix.strip("."))
        rewrite(changed, suffix, content)
        outcome = trainer.here(
            "name=refused_exchange", source, "data=prefixes", f"data.prefixes=[{changed}]", "training.steps=6"
        )
        assert outcome.code == 2 and f"other {what} in the data source lines" in outcome.sentence, outcome.errors[
            -2000:
        ]
    # A record of before has neither: it is compared in what it has.
    found = read_state(trainer.root / "exchanged" / "checkpoints" / "step_00000004")["identity"]
    now = {**found, DATA: json.loads(json.dumps(found[DATA]))}
    old = {**found, DATA: {"lines": {"sha256": found[DATA]["lines"]["sha256"], "weight": 1.0}}}
    now[DATA]["lines"]["separators"] = "0" * 64
    check_identity(old, now, "", "")
    with pytest.raises(UserError, match="other separators in the data source lines"):
        check_identity(found, now, "", "")


def test_a_blend_goes_on_in_the_order_that_it_began_with() -> None:
    """Whichever order a checkpoint has on record, none is refused; before the first step there is nothing to keep."""
    data = {name: {"sha256": name, "index": name, "separators": name, "weight": 0.5} for name in "ab"}
    wanted = identity(Config(), 10, data, "t")
    assert wanted[BLEND_ORDER] == LATEST_BLEND_ORDER
    found = {key: value for key, value in wanted.items() if key != BLEND_ORDER}
    check_identity(found, wanted, "", "")
    assert (blend_order(found, 3), blend_order(found, 0), blend_order(wanted, 3)) == (1, 2, 2)
    assert BLEND_ORDER not in identity(Config(), 10, {"a": data["a"]}, "t")


def test_it_needs_a_checkpoint(trainer: Any) -> None:
    outcome = trainer.here("name=none", "resume_other_data=true")
    assert outcome.code == 2 and "resume_other_data=true with resume=auto" in outcome.sentence


def test_datasets_to_validate_on(trainer: Any, finished: Callable, other: str) -> None:
    name = finished("validated", f"data.validation_prefixes=[{other}]")
    assert len(trainer.values(name, "val/lines/loss")) == 3
    assert trainer.values(name, "val/lines/loss") == trainer.values(name, "val/loss")
    assert "val/docs/loss" not in trainer.records(name)[0]
    outcome = trainer.here("name=validated_anew", f"resume={trainer.root / name}", "training.steps=6")
    assert outcome.code == 2 and "data.validation_prefixes of lines (SHA-256" in outcome.sentence
