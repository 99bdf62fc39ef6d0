"""Two small runs that differ in their seed, trained on facts in the text of Python's language reference."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics as TOPICS

import pytest

from data_prep.tokenize import tokenize_files
from data_prep.train_tokenizer import train_tokenizer
from tests.support.command import command
from tests.support.small_run import SMALL_MODEL, train_here

main = command("probe")

TRAINING = [
    "+experiment=demo_sep",
    *SMALL_MODEL,
    "attention.window=8",
    "attention.sink=learned",
    "training.steps=6",
    "training.validation_samples=4",
    "training.validation_interval=0",
    "training.checkpoint_interval=0",
    "data=prefixes",
    "data.validation_fraction=0.2",
]


@dataclass(frozen=True)
class Probed:
    """Real text, a tokenizer of it, the text with facts, and the runs that were trained on that."""

    text: Path
    tokenizer: Path
    facts: Path
    runs: list[Path]


@pytest.fixture(scope="session")
def probed(tmp_path_factory: pytest.TempPathFactory) -> Probed:
    """All of it, made by the programs themselves."""
    root = tmp_path_factory.mktemp("probe")
    text = root / "text.txt"
    text.write_text("\n".join(TOPICS[name] for name in sorted(TOPICS)), encoding="utf8")
    tokenizer, facts = root / "text.model", root / "facts.jsonl"
    train_tokenizer([text.read_text(encoding="utf8")], tokenizer, vocab_size=2048)
    made = ["text", str(text), "--tokenizer", str(tokenizer), "--output", str(facts), "--documents", "24"]
    assert main([*made, "--sentences", "40", "--facts", "4", "--shares", "0.5"]) == 0
    tokenize_files([facts], root / "facts", tokenizer, progress=False)
    for seed in (1, 2):
        own = [f"run_root={root}", f"name=seed{seed}", f"seed={seed}", f"data.prefixes=[{root / 'facts'}]"]
        train_here(*TRAINING, *own)
    return Probed(text, tokenizer, facts, [root / "seed1", root / "seed2"])
