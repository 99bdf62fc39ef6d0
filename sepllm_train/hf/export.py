"""A run as a stock model of transformers: in memory, or as a folder that from_pretrained loads."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sepllm_train.base.console import say
from sepllm_train.base.errors import UserError
from sepllm_train.base.files import whole_folder, write_whole
from sepllm_train.base.parsing import read_json
from sepllm_train.config.schema import Config, one_of
from sepllm_train.generation.pattern import TokenPattern
from sepllm_train.hf import weights
from sepllm_train.hf.architecture import FAMILIES, model_type, to_theirs
from sepllm_train.hf.card import model_card
from sepllm_train.hf.folder import altered_export, refuse_existing, write_mark
from sepllm_train.hf.guard import MODULE
from sepllm_train.hf.separators import CONFIG_KEY
from sepllm_train.hf.tokenizer import save_tokenizer
from sepllm_train.hf.verify import Sides, compare
from sepllm_train.model.build import PRECISIONS
from sepllm_train.runs.open import TrainedRun, refuse_not_finite
from sepllm_train.training.checkpoint.load import StoredTensors


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
        sides = Sides(
            run.config, run.vocabulary, run.checkpoint.path, run.classes, tokenizer.eod, PRECISIONS[precision]
        )
        differences = compare(sides, _stock(aside), None if run.token_pattern.dense else partial(_alone, aside))
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


def _stock(folder: Path) -> Any:
    """The model in a folder in transformers' own class."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    _check_filled(model, info)
    return model


def _alone(folder: Path) -> Any:
    """The model in a folder as one without this package loads it, by the module beside its weights."""
    from sepllm_train.hf import modeling_sepllm

    content = read_json(folder / "config.json", "export the run again")
    module, name = content["auto_map"]["AutoModelForCausalLM"].split(".")
    if (folder / f"{module}.py").read_bytes() != MODULE.read_bytes():
        raise RuntimeError(f"{folder} has another {module}.py than this package.")
    masked: Any = type(name, (getattr(modeling_sepllm, name),), {"kernels": False})
    return masked.from_pretrained(folder, dtype=torch.float32, local_files_only=True)


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
