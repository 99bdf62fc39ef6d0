"""A run as a stock model of transformers: in memory, or as a folder that from_pretrained loads."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sep_attention import FOREVER
from torch import Tensor

from sepllm_train.base.console import say
from sepllm_train.base.errors import UserError
from sepllm_train.base.files import whole_folder, write_whole
from sepllm_train.config.schema import Config, one_of
from sepllm_train.generation.pattern import TokenPattern
from sepllm_train.hf import weights
from sepllm_train.hf.architecture import FAMILIES, model_type, to_theirs
from sepllm_train.hf.folder import altered_export, refuse_existing, write_mark
from sepllm_train.hf.separators import CONFIG_KEY
from sepllm_train.hf.tokenizer import save_tokenizer
from sepllm_train.hf.verify import Sides, compare
from sepllm_train.model.build import PRECISIONS
from sepllm_train.runs.open import TrainedRun, refuse_not_finite
from sepllm_train.training.checkpoint.load import StoredTensors

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
it: config.json names the attention `sepllm`, which `sepllm_train.hf` brings. Copies that are saved where this package
is imported keep that name; `load_model` finds the pattern in every copy. To look at it with full attention all the
same: `AutoModelForCausalLM.from_pretrained("FOLDER", attn_implementation="sdpa")`.
"""
_LOAD_DENSE = "The model attends fully: any program that loads models of this class computes what was trained.\n"


def in_memory(run: TrainedRun, dtype: torch.dtype | None = torch.float32) -> Any:
    """A run as a model of transformers on the CPU; writes nothing.

    dtype: of the weights, None for the run's; a wider one adds nothing, since the finer copies that an optimizer has
    are not the model that was validated. The run's data is not needed. A model that was trained with separators
    attends fully until the pattern is put on it (sepllm_train.hf.apply_pattern).

    Raises UserError as `TrainedRun.token_pattern` and `model_type` do, and when `dtype` cannot hold the weights.
    """
    shape = Shape(run.config, run.vocabulary, run.token_pattern, run.tokenizer.eod)
    dtype = dtype or PRECISIONS[run.config.training.precision]
    return shape.filled(_weights(run.checkpoint.path), dtype, run.folder)


@dataclass(frozen=True)
class Shape:
    """A run's model without its weights. vocabulary: entries without padding; end: token that ends a document."""

    config: Config
    vocabulary: int
    pattern: TokenPattern
    end: int

    def filled(self, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype, place: Path) -> Any:
        """The model of transformers with these weights, whole as checkpoints of `place` hold them, on the CPU.

        Raises UserError as `model_type` does, and when `dtype` cannot hold the weights.
        """
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

        config = to_theirs(self.config, self.vocabulary, self.end)
        kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        found = dict(self._theirs(tensors, dtype, place))
        model, info = kind.from_pretrained(None, config=config, state_dict=found, dtype=dtype, output_loading_info=True)
        _check_filled(model, info)
        return self._finished(model)

    def empty(self) -> Any:
        """The model of transformers without memory for its weights. Raises UserError as `model_type` does."""
        from transformers import AutoModelForCausalLM

        config = to_theirs(self.config, self.vocabulary, self.end)
        with torch.device("meta"):
            return self._finished(AutoModelForCausalLM.from_config(config))

    def _finished(self, model: Any) -> Any:
        """The model with what its files say besides."""
        from transformers import GenerationConfig

        if not self.pattern.dense:
            setattr(model.config, CONFIG_KEY, self.pattern.to_dict())
        model.generation_config = GenerationConfig(bos_token_id=self.end, eos_token_id=self.end, pad_token_id=self.end)
        return model.eval()

    def _theirs(
        self, found: Iterable[tuple[str, Tensor]], dtype: torch.dtype, place: Path
    ) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors of theirs. Raises UserError when `dtype` is too small."""
        family = FAMILIES[model_type(self.config)]
        for name, whole in found:
            for target, tensor in weights.to_theirs(family, self.config.model, self.vocabulary, name, whole):
                converted = tensor.to(dtype)
                if not converted.isfinite().all():
                    raise UserError(f"{place} has weights in {target} that {dtype} cannot hold: use another --dtype.")
                yield target, converted


def export_run(run: TrainedRun, output: Path | str, *, dtype: str | None = None, overwrite: bool = False) -> None:
    """Write a run to the folder `output`, which appears when its logits were found equal to those of the run.

    dtype: fp32, bf16 or fp16, None for the run's precision. overwrite: replace an `output` that is still what an export
    wrote, byte by byte. Raises UserError as `in_memory` does, for an `output` that exists, when the logits differ, and
    when a newer checkpoint was skipped because it is damaged.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    output = Path(output)
    refuse_existing(output, altered_export, overwrite=overwrite)
    _refuse_older(run)
    tokenizer = run.tokenizer
    precision = dtype or run.config.training.precision
    one_of("--dtype", precision, tuple(PRECISIONS))
    with whole_folder(output) as aside:
        model = in_memory(run, PRECISIONS[precision])
        with weights.writing_safetensors():
            model.save_pretrained(aside)
        for file in aside.glob("*.safetensors"):
            # Written so that nobody but the user may read it.
            shutil.copymode(aside / "config.json", file)
        architecture, parameters = type(model).__name__, model.num_parameters()
        del model
        note = save_tokenizer(tokenizer, aside)
        theirs, info = AutoModelForCausalLM.from_pretrained(
            aside, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        _check_filled(theirs, info)
        sides = Sides(
            run.config, run.vocabulary, run.checkpoint.path, run.classes, tokenizer.eod, PRECISIONS[precision]
        )
        differences = compare(sides, theirs)
        card = model_card(run, architecture, differences, precision, note)
        write_whole(aside / "README.md", card.encode())
        write_mark(aside)
    if note is not None:
        say(f"warning: {output} has no tokenizer of transformers, only {tokenizer.path.name}: {note}")
    largest = ", ".join(f"{value:.2g} ({name})" for name, value in differences.items())
    say(
        f"{output}: {architecture} of {parameters:,} parameters in {precision}, from step {run.checkpoint.step}; "
        f"largest difference of logits {largest}"
    )


def _refuse_older(run: TrainedRun) -> None:
    """Raise UserError when the newest checkpoint is damaged: older weights must not be given on unnoticed."""
    if run.skipped:
        checkpoint, reason = next(iter(run.skipped.items()))
        raise UserError(
            f"the newest checkpoint {checkpoint} is damaged ({reason}): give --checkpoint {run.checkpoint.step} to "
            "export the newest whole one."
        )


def _check_filled(model: Any, info: dict[str, Any]) -> None:
    """Raise RuntimeError when transformers tells that weights are missing, which it fills with random numbers, or that
    there are others."""
    wrong = {key: found for key, found in info.items() if found}
    if wrong:
        raise RuntimeError(f"the weights do not fill {type(model).__name__}: {wrong}")


def _weights(checkpoint: Path) -> Iterator[tuple[str, Tensor]]:
    """The weights of a checkpoint, whole, one after another; what else it holds is not read. Raises UserError when it
    cannot be read, and for weights that are not finite."""
    stored = StoredTensors(checkpoint)
    for name in stored.weights:
        whole = stored.read(name)
        refuse_not_finite(checkpoint, [(name, whole)])
        yield name, whole


def model_card(run: TrainedRun, architecture: str, differences: dict[str, float], dtype: str, note: str | None) -> str:
    """README.md of an exported run.

    differences: largest difference of logits by pattern. note: on the tokenizer, or None.
    """
    model, pattern = run.config.model, run.token_pattern
    separators = not pattern.dense
    largest = ", ".join(f"{value:.2g} under {name} attention" for name, value in differences.items())
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
