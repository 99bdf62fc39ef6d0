"""The programs of examples/ run, and what they train gets better."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch


def program(repository: Path, name: str) -> Callable[[list[str]], list[float]]:
    """The function `main` of an example, which gives its losses."""
    spec = importlib.util.spec_from_file_location(name, repository / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_plain_gpt(repository: Path) -> None:
    losses = program(repository, "plain_gpt")([str(repository / "docs" / "attention.md"), "--steps", "25"])
    assert losses[-1] < losses[0] - 1.5


@pytest.fixture
def small_model(tmp_path: Path, repository: Path) -> Path:
    """A random Llama with a tokenizer of its own."""
    import tokenizers
    import transformers

    made = tokenizers.ByteLevelBPETokenizer()
    files = [str(path) for path in (repository / "docs").glob("*.md")]
    made.train(files, vocab_size=600, special_tokens=["<|endoftext|>"])
    made.save(str(tmp_path / "bpe.json"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "bpe.json"))
    tokenizer.save_pretrained(tmp_path / "model")
    config = transformers.LlamaConfig(
        vocab_size=600,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.slow
def test_finetune_transformers(repository: Path, small_model: Path, tmp_path: Path) -> None:
    for package in ("transformers", "peft", "accelerate"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    from sepllm_train.hf import load_model

    output = tmp_path / "tuned"
    words = [str(small_model), str(repository / "docs" / "running.md"), "--output", str(output)]
    words += ["--steps", "20", "--length", "128", "--window", "16", "--lr", "1e-2"]
    losses = program(repository, "finetune_transformers")(words)
    assert losses[-1] < losses[0] - 0.05
    tuned: Any = load_model(output)
    assert tuned.base_model.sepllm_pattern.pattern.windows == (16, 16)
