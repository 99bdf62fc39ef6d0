"""The model card of an exported run: README.md of its folder."""

from __future__ import annotations

from sep_attention import FOREVER

from sepllm_train.generation.pattern import TokenPattern
from sepllm_train.runs.open import TrainedRun

_FRONT = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- sepllm
---
"""
_IMPORTS_SEPARATORS = ("from sepllm_train.hf import load_model", "from transformers import AutoTokenizer")
_IMPORTS_DENSE = ("from transformers import AutoModelForCausalLM, AutoTokenizer",)
_LOAD_SEPARATORS = """`load_model` lets the model attend by the pattern that it was trained with (`pip install
'sepllm-train[hf]'`). With full attention it is another model with other losses, so transformers alone refuses to load
it: config.json names the attention `sepllm`, which `sepllm_train.hf` brings. To look at it with full attention all the
same: `AutoModelForCausalLM.from_pretrained("FOLDER", attn_implementation="sdpa")`.
"""
_LOAD_DENSE = "The model attends fully: any program that loads models of this class computes what was trained.\n"


def model_card(run: TrainedRun, architecture: str, differences: dict[str, float], dtype: str, note: str | None) -> str:
    """Markdown text. differences: largest difference of logits by pattern. note: on the tokenizer, or None."""
    model, pattern = run.config.model, run.token_pattern
    separators = not pattern.dense
    largest = ", ".join(f"{value:.2g} under {name} attention" for name, value in differences.items())
    lines = [
        _FRONT,
        f"# {run.config.name}",
        "",
        f"A `{architecture}` from sepllm-train: {model.layers} layers of {model.hidden} features, "
        f"{model.heads} heads, {run.vocabulary:,} vocabulary entries, context of "
        f"{run.config.data.sequence_length:,} tokens, weights in {dtype}. Checkpoint of step {run.checkpoint.step:,}, "
        f"after {run.checkpoint.tokens:,} tokens.",
        "",
        "## Use",
        "",
        "```python",
        *(_IMPORTS_SEPARATORS if separators else _IMPORTS_DENSE),
        "",
        f'model = {"load_model" if separators else "AutoModelForCausalLM.from_pretrained"}("FOLDER")',
        *(['tokenizer = AutoTokenizer.from_pretrained("FOLDER")'] if note is None else []),
        "```",
        "",
        _LOAD_SEPARATORS if separators else _LOAD_DENSE,
        *([f"There is no tokenizer of transformers here: {note}", ""] if note is not None else []),
        *(_pattern_lines(pattern) if separators else []),
        "## Checked",
        "",
        f"The files were read again, and their logits compared in fp32 with those of the training code: the largest "
        f"difference is {largest}.",
        "",
    ]
    return "\n".join(lines)


def _pattern_lines(pattern: TokenPattern) -> list[str]:
    """What each token attends to."""
    windows = sorted(set(pattern.windows))
    of_layers = {window: [n for n, own in enumerate(pattern.windows) if own == window] for window in windows}
    lines = [
        "## Attention",
        "",
        "Key j is visible to query i when `0 <= i - j < max(n, R(j))`. `sepllm_attention` in config.json holds:",
        "",
        *(
            f"- n = {_tokens(window)}" + ("" if len(windows) == 1 else f" in layers {', '.join(map(str, layers))}")
            for window, layers in of_layers.items()
        ),
        f"- the first {pattern.initial} tokens are visible for ever",
    ]
    if pattern.interval is not None:
        lines.append(f"- so is every token at a multiple of {pattern.interval}")
    else:
        lines += [
            f"- {count:,} vocabulary entries are separators with R = {_tokens(horizon)}"
            for horizon, count in zip(pattern.horizons, pattern.tier_of_token.bincount().tolist()[1:], strict=False)
            if count
        ]
    if pattern.end_of_document is not None:
        lines.append(f"- all of it starts anew after token {pattern.end_of_document}, the end of a document")
    return [*lines, ""]


def _tokens(count: int) -> str:
    return "without end" if count >= FOREVER else f"{count:,} tokens"
