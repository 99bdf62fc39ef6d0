"""README.md of an exported model: how to load it, what it attends to, and what its run recorded of its training."""

from __future__ import annotations

import shlex
from contextlib import suppress
from pathlib import Path
from typing import Any

from sep_attention import FOREVER

from sepllm_train.base.errors import UserError
from sepllm_train.base.parsing import read_json_if_any
from sepllm_train.generation.pattern import TokenPattern
from sepllm_train.hf.guard import MODULE
from sepllm_train.hf.verify import STANDALONE
from sepllm_train.runs.open import TrainedRun
from sepllm_train.runs.records import LOSS, Record, Run, read_run

_FRONT = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- sepllm
---
"""
_LOAD_SEPARATORS = f"""`{MODULE.name}` beside the weights lets the model attend by the pattern it was trained with; it
needs torch and transformers 5.5 or newer, and `generate` drops the keys that the pattern will not show again. Where
sepllm-train is installed (`pip install 'sepllm-train[hf]'`), the same lines take its kernels, and its own loader needs
no remote code:

```python
from sepllm_train.hf import load_model

model = load_model("FOLDER")
```

With full attention it is another model with other losses, so transformers refuses to load it without
`trust_remote_code=True`: config.json names the attention `sepllm`, which it does not have. To look at it with full
attention all the same: `AutoModelForCausalLM.from_pretrained("FOLDER", attn_implementation="sdpa")`, without remote
code; of a copy that is saved then, transformers alone loads full attention without this refusal.
"""
_LOAD_DENSE = "The model attends fully: any program that loads models of this class computes what was trained.\n"


def model_card(run: TrainedRun, architecture: str, differences: dict[str, float], dtype: str, note: str | None) -> str:
    """README.md of an exported run. What the run did not record is left out.

    differences: largest difference of logits by pattern. note: on the tokenizer, or None.
    """
    model, pattern = run.config.model, run.token_pattern
    separators = not pattern.dense
    largest = ", ".join(
        f"{value:.2g} " + (f"by `{MODULE.name}` alone" if name == STANDALONE else f"under {name} attention")
        for name, value in differences.items()
    )
    origin = f"Checkpoint of step {run.checkpoint.step:,}"
    if run.averaged:
        origin = f"Mean of the checkpoints of steps {', '.join(f'{step:,}' for step in run.averaged)}"
    lines = [
        _FRONT,
        f"# {run.config.name}",
        "",
        f"A `{architecture}` from sepllm-train: {model.layers} layers of {model.hidden} features, "
        f"{model.heads} heads, {run.vocabulary:,} vocabulary entries, context of "
        f"{run.config.data.sequence_length:,} tokens, weights in {dtype}. {origin}, after "
        f"{run.checkpoint.tokens:,} tokens.",
        "",
        "## Use",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM" + (", AutoTokenizer" if note is None else ""),
        "",
        f'model = AutoModelForCausalLM.from_pretrained("FOLDER"{", trust_remote_code=True" if separators else ""})',
        *(['tokenizer = AutoTokenizer.from_pretrained("FOLDER")'] if note is None else []),
        "```",
        "",
        _LOAD_SEPARATORS if separators else _LOAD_DENSE,
        *([f"There is no tokenizer of transformers here: {note}", ""] if note is not None else []),
        *(_pattern_lines(pattern) if separators else []),
        *_training_lines(run),
        "## Checked",
        "",
        f"The files were read again, and their logits compared in fp32 with those of the training code: the largest "
        f"difference is {largest}.",
        "",
    ]
    return "\n".join(lines)


def _pattern_lines(pattern: TokenPattern) -> list[str]:
    """Lines on the keys that each token attends to."""
    windows = sorted(set(pattern.windows))
    of_layers = {window: [n for n, own in enumerate(pattern.windows) if own == window] for window in windows}
    lines = [
        "## Attention",
        "",
        "Key j is visible to query i when `0 <= i - j < max(n, R(j))`. `sepllm_attention` in config.json holds:",
        "",
        *(
            f"- n = {_counted(window)}" + ("" if len(windows) == 1 else f" in layers {', '.join(map(str, layers))}")
            for window, layers in of_layers.items()
        ),
        f"- the first {pattern.initial} tokens are visible for ever",
    ]
    if pattern.interval is not None:
        lines.append(f"- so is every token at a multiple of {pattern.interval}")
    else:
        lines += [
            f"- {count:,} vocabulary entries are separators with R = {_counted(horizon)}"
            for horizon, count in zip(pattern.horizons, pattern.tier_of_token.bincount().tolist()[1:], strict=False)
            if count
        ]
    if pattern.end_of_document is not None:
        lines.append(f"- all of it starts anew after token {pattern.end_of_document}, the end of a document")
    return [*lines, ""]


def _counted(count: int) -> str:
    return "without end" if count >= FOREVER else f"{count:,} tokens"


def _training_lines(run: TrainedRun) -> list[str]:
    """Lines on what was trained on what, from the records of the run; of averaged weights those of the run behind
    them, but for its losses, which are not those of the mean."""
    own = read_json_if_any(run.folder / "run.json")
    source = own.get("averaged_from", {}).get("run") if run.averaged else str(run.folder)
    lines = []
    if isinstance(own.get("imported_from"), str):
        lines.append(f"- imported from the transformers model `{Path(own['imported_from']).name}`, not trained since")
    lines.append(f"- tokenizer: `{run.tokenizer.path.name}`, SHA-256 `{run.tokenizer.sha256}`")
    if run.checkpoint.step and isinstance(source, str):
        # Its records may be gone.
        with suppress(UserError):
            lines += _recorded(read_run(Path(source)), run.checkpoint.step, losses=not run.averaged)
        command = read_json_if_any(Path(source) / "environment.json").get("command")
        if isinstance(command, list) and command and all(isinstance(word, str) for word in command):
            lines += ["", "Command, of the last start:", "", "```bash", shlex.join(_program(command)), "```"]
    return ["## Training", "", *lines, ""]


def _recorded(run: Run, step: int, *, losses: bool) -> list[str]:
    """Lines on the records of a run up to `step`."""
    info, lines = run.info, []
    data = info["comparable"].get("data")
    if isinstance(data, dict) and data:
        lines.append("- data: " + ", ".join(_dataset(name, entry) for name, entry in data.items()))
    began = info.get("initial_weights")
    if isinstance(began, dict) and isinstance(began.get("checkpoint"), str):
        named = Path(began["checkpoint"])
        lines.append(f"- began with the weights of `{named.parent.parent.name}/{named.name}`")
    training, validation = (_until(records, step) for records in (run.training, run.validation))
    last = max(training, validation, key=lambda record: record.get("step", -1))
    if {"tokens", "seconds", "flops/model", "flops/dense"} <= last.keys():
        on = f" on {info['world_size']} x {info['devices']}" if {"world_size", "devices"} <= info.keys() else ""
        lines += [
            f"- {last['tokens']:,} tokens in {last['step']:,} steps, {last['seconds']:,.0f} seconds{on}",
            f"- {last['flops/model']:.3g} FLOPs; {last['flops/dense']:.3g} with full attention",
        ]
    if losses and "train/loss" in training:
        lines.append(f"- training loss {training['train/loss']:.4f} at step {training['step']:,}")
    if losses and LOSS in validation:
        bits = f", {validation['val/bits_per_byte']:.4f} bits per byte" if "val/bits_per_byte" in validation else ""
        lines.append(f"- validation loss {validation[LOSS]:.4f}{bits}, at step {validation['step']:,}")
    return lines


def _until(records: list[Record], step: int) -> Record:
    """The last of the records that is not after `step`; empty without one."""
    return next((record for record in reversed(records) if record["step"] <= step), {})


def _dataset(name: str, entry: Any) -> str:
    known = entry if isinstance(entry, dict) else {}
    weight = known.get("weight")
    share = f" ({weight:.1%} of the sequences)" if isinstance(weight, float) and weight < 1 else ""
    digest = f", SHA-256 `{known['sha256']}`" if isinstance(known.get("sha256"), str) else ""
    return f"`{name}`{share}{digest}"


def _program(command: list[str]) -> list[str]:
    """The words of a command without the place where the program is installed."""
    name = Path(command[0]).name
    # The name may have its command with it: `sepllm pretrain`.
    return [*(["python", "-m", "sepllm_train"] if name == "__main__.py" else name.split()), *command[1:]]
