"""A run as a stock model of transformers: in memory, or as a folder that from_pretrained loads."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from sepllm_train.base.console import say
from sepllm_train.base.errors import UserError, first_line
from sepllm_train.base.files import write_whole
from sepllm_train.base.quiet import quiet
from sepllm_train.config.schema import one_of
from sepllm_train.hf import weights
from sepllm_train.hf.architecture import FAMILIES, model_type, to_theirs
from sepllm_train.hf.card import model_card
from sepllm_train.hf.compare import Sides, compare
from sepllm_train.hf.folder import altered_export, refuse_existing, whole_folder, write_mark
from sepllm_train.hf.pattern import ATTENTION
from sepllm_train.hf.separators import CONFIG_KEY
from sepllm_train.hf.tokenizer import save_tokenizer
from sepllm_train.model.build import PRECISIONS
from sepllm_train.runs.open import TrainedRun
from sepllm_train.training.checkpoint.load import SafeReader

# What a checkpoint holds besides weights.
_OTHERS = ("optimizer.", "rng.")


def in_memory(run: TrainedRun, dtype: torch.dtype | None = torch.float32) -> Any:
    """A run as a model of transformers on the CPU; writes nothing.

    dtype: of the weights, None for the run's; a wider one adds nothing, since the finer copies that an optimizer has
    are not the model that was validated. The run's data is not needed. A model that was trained with separators
    attends fully until the pattern is put on it (sepllm_train.hf.apply_pattern).

    Raises UserError as `TrainedRun.token_pattern` and `model_type` do, and when `dtype` cannot hold the weights.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, GenerationConfig

    pattern, end = run.token_pattern, run.tokenizer.eod
    config = to_theirs(run.config, run.vocabulary, end)
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    dtype = dtype or PRECISIONS[run.config.training.precision]
    tensors = dict(_tensors(run, dtype))
    model, info = kind.from_pretrained(None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True)
    _check_filled(model, info)
    if not pattern.dense:
        setattr(model.config, CONFIG_KEY, pattern.to_dict())
    model.generation_config = GenerationConfig(bos_token_id=end, eos_token_id=end, pad_token_id=end)
    return model.eval()


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
    pattern, tokenizer = run.token_pattern, run.tokenizer
    precision = dtype or run.config.training.precision
    one_of("--dtype", precision, tuple(PRECISIONS))
    with whole_folder(output) as aside:
        model = in_memory(run, PRECISIONS[precision])
        model.save_pretrained(aside)
        for file in aside.glob("*.safetensors"):
            # Written so that nobody but the user may read it.
            shutil.copymode(aside / "config.json", file)
        architecture, parameters = type(model).__name__, model.num_parameters()
        del model
        if not pattern.dense:
            _guard(aside / "config.json")
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


def _guard(path: Path) -> None:
    """Name our attention in config.json: transformers loads no model with an attention that nobody has registered."""
    content = json.loads(path.read_text(encoding="utf8"))
    write_whole(path, (json.dumps({**content, "attn_implementation": ATTENTION}, indent=2) + "\n").encode())


def _tensors(run: TrainedRun, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of theirs. Raises UserError when the checkpoint cannot be read or `dtype` is too small."""
    family = FAMILIES[model_type(run.config)]
    for name, whole in _weights(run.checkpoint.path):
        for target, tensor in weights.to_theirs(family, run.config.model, run.vocabulary, name, whole):
            converted = tensor.to(dtype)
            if not converted.isfinite().all():
                raise UserError(f"{run.folder} has weights in {target} that {dtype} cannot hold: use another --dtype.")
            yield target, converted


def _weights(checkpoint: Path) -> Iterator[tuple[str, Tensor]]:
    """The weights of a checkpoint, whole, one after another; what else it holds is not read."""
    reader = SafeReader(checkpoint)
    try:
        entries = reader.read_metadata().state_dict_metadata
        for name in sorted(entries):
            if name.startswith(_OTHERS):
                continue
            entry = entries[name]
            assert isinstance(entry, TensorStorageMetadata)
            tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
            with quiet():
                torch_checkpoint.load({name: tensor}, storage_reader=reader, no_dist=True)
            yield name, tensor
    except (OSError, RuntimeError, KeyError, pickle.UnpicklingError, CheckpointException) as error:
        raise UserError(f"the checkpoint {checkpoint} cannot be read ({first_line(error)}).") from None
