"""Runs that go on with other data, and that are validated on datasets of their own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_prep.cli import main
from data_prep.sidecar import read_header
from sepllm_train.training.checkpoint import EARLIER_DATA, read_state, trained_on


@pytest.fixture(scope="module")
def other(sample_prefix: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Prefix of other text, by the tokenizer of the sample corpus."""
    folder = tmp_path_factory.mktemp("other")
    tokenizer = sample_prefix.parent / read_header(sample_prefix).tokenizer.file
    text = "".join(json.dumps({"text": f"Line {n} of another text; it goes on. " * 40}) + "\n" for n in range(40))
    (folder / "lines.jsonl").write_text(text, encoding="utf8")
    assert (
        main(
            ["tokenize", str(folder / "lines.jsonl"), "--output", str(folder / "lines"), "--tokenizer", str(tokenizer)]
        )
        == 0
    )
    return str(folder / "lines")


def test_a_run_goes_on_with_other_data(trainer: Any, finished: Callable, other: str) -> None:
    """Optimizer and counters go on; interrupted, the same command continues in place; what came before is on record."""
    source = trainer.root / finished("one") / "checkpoints" / "step_00000002"
    data = ("data=prefixes", f"data.prefixes=[{other}]")
    command = ("name=annealed", f"resume={source}", "resume_other_data=true", *data)
    outcome = trainer.here("name=refused", *command[1:2], *data)
    assert outcome.code == 2 and "the data sources docs, this run has lines" in outcome.sentence
    assert "resume_other_data=true" in outcome.sentence
    outcome = trainer.here(*command)
    assert outcome.code == 0, outcome.errors[-3000:]
    first, record = read_state(source), json.loads((trainer.root / "annealed" / "run.json").read_text())
    assert [r["step"] for r in trainer.records("annealed") if "train/loss" in r] == [3, 4]
    assert trainer.records("annealed")[-1]["tokens"] == 2 * first["state"]["tokens"]
    assert list(record["comparable"]["data"]) == ["lines"]
    end = trainer.root / "annealed" / "checkpoints" / "step_00000004"
    before, own = trained_on(read_state(end)["identity"])
    assert list(before["data"]) == ["docs"] and list(own["data"]) == ["lines"]
    assert record["identity"][EARLIER_DATA] == [before]
    # As if it had been stopped after step 3: the same bits, and the record stays.
    longer = trainer.here("name=longer", f"resume={end}", "training.steps=5", *data)
    assert longer.code == 0, longer.errors[-3000:]
    newest = trainer.root / "longer" / "checkpoints" / "step_00000005"
    assert trained_on(read_state(newest)["identity"]) == [before, own]


def test_the_optimizer_goes_on(trainer: Any, finished: Callable, other: str) -> None:
    """With the same data it is the plain resume, bit for bit."""
    source = trainer.root / finished("one") / "checkpoints" / "step_00000002"
    assert trainer.here("name=same_data", f"resume={source}", "resume_other_data=true").code == 0
    ends = [trainer.root / name / "checkpoints" / "step_00000004" for name in ("one", "same_data")]
    assert EARLIER_DATA not in read_state(ends[1])["identity"]
    assert trainer.values("same_data", "train/loss") == trainer.values("one", "train/loss")[2:]
    assert trainer.values("same_data", "val/loss")[-1] == trainer.values("one", "val/loss")[-1]


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
