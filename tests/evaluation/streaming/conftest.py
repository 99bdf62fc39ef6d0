"""A tiny exported model with a pattern and a tokenizer, and a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some thousand words with punctuation."""
    sentence = "the cat, a dog and the rest of them went home. they said no; we did not?"
    words = sentence.split()
    lines = [" ".join(words[(start + step * 3) % len(words)] for step in range(12)) for start in range(120)]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """GPT-NeoX with random weights, trained (it says) with three initial tokens and a window of six."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    import tokenizers

    from sepllm_train.hf.separators import CONFIG_KEY, make_pattern
    from tests.hf.tiny_models import tiny

    folder = tmp_path_factory.mktemp("model")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer: Any = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train([str(text_file)], trainer)
    made.save(str(folder / "tokenizer.json"))
    model = tiny("neox", vocab_size=made.get_vocab_size())
    pattern = make_pattern(model, window=6, initial=3, tokenizer=folder / "tokenizer.json")
    setattr(model.config, CONFIG_KEY, pattern.to_dict())
    model.save_pretrained(folder)
    return folder
