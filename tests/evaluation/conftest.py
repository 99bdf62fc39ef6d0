"""Tiny models with a pattern and without, a trained run and what was exported of it, and small local files of the
tasks."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

# Before the libraries that read it are imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

SENTENCE = "the cat, a dog and the rest of them went home. they said no; we did not? question answer passage choices"
WORDS = SENTENCE.split()
CONTEXT = 4096


def words(start: int, count: int) -> str:
    """Some words, other ones for each start."""
    return " ".join(WORDS[(start + 3 * step) % len(WORDS)] for step in range(count))


def write_lines(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Records as JSON, one a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf8")


def choice(number: int, choices: int = 4) -> dict[str, Any]:
    """A question with choices of different lengths."""
    return {
        "question": words(number, 7 + number % 5),
        "choices": [words(number + 5 * each, 1 + (number + each) % 3) for each in range(choices)],
        "answer": number % choices,
    }


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of all tasks that have a local form."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("arc_easy", "arc_challenge"):
        write_lines(folder / f"arc/{name}_train.jsonl", [choice(number) for number in range(40, 48)])
        write_lines(folder / f"arc/{name}_test.jsonl", [choice(number) for number in range(6)])
    write_lines(folder / "lambada_openai_test.jsonl", [{"text": words(n, 12 + 7 * n) + " home"} for n in range(7)])
    write_lines(folder / "logiqa/test.jsonl", [{"context": words(n, 9), **choice(n)} for n in range(5)])
    write_lines(folder / "piqa_validation.jsonl", [choice(number, 2) for number in range(6)])
    write_lines(folder / "openbookqa_test.jsonl", [choice(number) for number in range(5)])
    answers = [{"question": words(n, 9 + n), "answer": f"{words(n, 4)}\n#### {n}"} for n in range(3)]
    write_lines(folder / "gsm8k/test.jsonl", answers)
    pages = "".join(f" = {title} = \n \n {words(7 * n, 90)} \n = = {title} = = \n {words(n, 50)} \n"
                    for n, title in enumerate(("the cat", "a dog")))  # fmt: skip
    (folder / "wikitext2").mkdir()
    (folder / "wikitext2/valid.txt").write_text(f" \n{pages}", encoding="utf8")
    return folder


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory, sample_cache: Path) -> Path:
    """A run of two steps on the sample corpus, with three initial tokens and a window of eight. A page of `data_dir`
    is longer than its context, prompts without examples are not."""
    from tests.training.resume_worker import train_alone

    return train_alone(
        tmp_path_factory.mktemp("runs"),
        sample_cache,
        "books_sep",
        data={"sequence_length": 256},
        training={"steps": 2, "checkpoint_interval": 2},
    )


@pytest.fixture(scope="session")
def exported_run(trained_run: Path) -> Path:
    """The trained run as sepllm export writes it."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    from sepllm_train.hf.export import export_run
    from sepllm_train.runs.open import open_run

    export_run(open_run(trained_run), trained_run.parent / "exported")
    return trained_run.parent / "exported"


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of random GPT-NeoX models with a tokenizer: `sep`, trained (it says) with three initial tokens and a
    window of six, and `dense`."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    import tokenizers

    from data_prep.tokenizers import load_tokenizer
    from sepllm_train.hf.separators import CONFIG_KEY, make_pattern
    from sepllm_train.hf.tokenizer import save_tokenizer
    from tests.hf.tiny_models import tiny

    root = tmp_path_factory.mktemp("models")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer: Any = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([words(number, 200) for number in range(20)], trainer)
    made.save(str(root / "tokenizer.json"))
    tokenizer = load_tokenizer(root / "tokenizer.json")
    model = tiny("neox", vocab_size=tokenizer.vocab_size, max_position_embeddings=CONTEXT)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = tokenizer.eod
    folders = {"dense": root / "dense", "sep": root / "sep"}
    for name, folder in folders.items():
        if name == "sep":
            pattern = make_pattern(model, window=6, initial=3, tokenizer=tokenizer)
            setattr(model.config, CONFIG_KEY, pattern.to_dict())
        model.save_pretrained(folder)
        assert save_tokenizer(tokenizer, folder) is None
    return folders
