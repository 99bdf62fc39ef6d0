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

from data_prep.tokenizers import Tokenizer
from sepllm_train.base.console import say
from sepllm_train.base.errors import UserError, first_line
from sepllm_train.base.files import write_whole
from sepllm_train.base.quiet import quiet
from sepllm_train.config.schema import one_of
from sepllm_train.generation.pattern import TokenPattern
from sepllm_train.hf import weights
from sepllm_train.hf.architecture import FAMILIES, model_type, to_theirs
from sepllm_train.hf.card import model_card
from sepllm_train.hf.compare import Sides, compare
from sepllm_train.hf.folder import altered_export, refuse_existing, whole_folder, write_mark
from sepllm_train.hf.pattern import ATTENTION
from sepllm_train.hf.separators import CONFIG_KEY
from sepllm_train.hf.tokenizer import save_tokenizer
from sepllm_train.model.build import PRECISIONS
from sepllm_train.runs.source import Source, open_source
from sepllm_train.training.checkpoint.files import newest, step_of
from sepllm_train.training.checkpoint.load import SafeReader

# What a checkpoint holds besides weights.
_OTHERS = ("optimizer.", "rng.")


def in_memory(
    run_folder: Path | str,
    step: int | None = None,
    dtype: torch.dtype | None = torch.float32,
    *,
    tokenizer: Path | str | None = None,
) -> tuple[Any, TokenPattern | None, Tokenizer]:
    """A run as (model of transformers on the CPU, the pattern it was trained with, its tokenizer); writes nothing.

    step: number of the checkpoint, None for the newest whole one. dtype: of the weights, None for the run's; a wider
    one adds nothing, since the finer copies that an optimizer has are not the model that was validated. tokenizer: its
    file where it is not beside the run's data. The data itself is not needed. The pattern is None for a run that
    attends fully; otherwise the model attends fully until the pattern is put on it (sepllm_train.hf.apply_pattern).

    Raises UserError as `open_source` and `model_type` do.
    """
    source = open_source(run_folder, step, tokenizer)
    own = None if source.pattern.dense else source.pattern
    return build(source, dtype or _dtype_of(source)), own, source.tokenizer


def build(source: Source, dtype: torch.dtype) -> Any:
    """The model of transformers of a run, on the CPU, with weights of `dtype`.

    Raises UserError as `model_type` does, and when `dtype` cannot hold the weights.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, GenerationConfig

    config = to_theirs(source.config, source.vocabulary, source.tokenizer.eod)
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    tensors = dict(_tensors(source, dtype))
    model, info = kind.from_pretrained(None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True)
    _check_filled(model, info)
    if not source.pattern.dense:
        setattr(model.config, CONFIG_KEY, source.pattern.to_dict())
    end = source.tokenizer.eod
    model.generation_config = GenerationConfig(bos_token_id=end, eos_token_id=end, pad_token_id=end)
    return model.eval()


def export_run(
    run_folder: Path | str,
    output: Path | str,
    *,
    step: int | None = None,
    dtype: str | None = None,
    tokenizer: Path | str | None = None,
    overwrite: bool = False,
) -> None:
    """Write a run to the folder `output`, which appears when its logits were found equal to those of the run.

    dtype: fp32, bf16 or fp16, None for the run's precision. Other arguments as for `in_memory`. Raises UserError as
    `open_source` and `model_type` do, for an `output` that is there, when the logits differ, and without a `step` when
    the newest checkpoint is damaged. overwrite: replace an `output` that is still what an export wrote, byte by byte.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    output = Path(output)
    refuse_existing(output, altered_export, overwrite=overwrite)
    if step is None:
        _refuse_older(Path(run_folder))
    source = open_source(run_folder, step, tokenizer)
    precision = dtype or source.config.training.precision
    one_of("--dtype", precision, tuple(PRECISIONS))
    with whole_folder(output) as aside:
        model = build(source, PRECISIONS[precision])
        model.save_pretrained(aside)
        for file in aside.glob("*.safetensors"):
            # Written so that nobody but the user may read it.
            shutil.copymode(aside / "config.json", file)
        architecture, parameters = type(model).__name__, model.num_parameters()
        del model
        if not source.pattern.dense:
            _guard(aside / "config.json")
        note = save_tokenizer(source.tokenizer, aside)
        theirs, info = AutoModelForCausalLM.from_pretrained(
            aside, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        _check_filled(theirs, info)
        differences = compare(_sides(source, PRECISIONS[precision]), theirs)
        card = model_card(source, architecture, differences, precision, note)
        write_whole(aside / "README.md", card.encode())
        write_mark(aside)
    if note is not None:
        say(f"warning: {output} has no tokenizer of transformers, only {source.tokenizer.path.name}: {note}")
    largest = ", ".join(f"{value:.2g} ({name})" for name, value in differences.items())
    say(
        f"{output}: {architecture} of {parameters:,} parameters in {precision}, from step "
        f"{source.state['state']['step']}; largest difference of logits {largest}"
    )


def _refuse_older(run_folder: Path) -> None:
    """Raise UserError when the newest checkpoint is damaged: older weights must not be given on unnoticed."""
    damaged: dict[Path, str] = {}
    whole = newest(run_folder, damaged)
    if whole is not None and damaged:
        checkpoint, reason = next(iter(damaged.items()))
        raise UserError(
            f"the newest checkpoint {checkpoint} is damaged ({reason}): give --checkpoint {step_of(whole)} to export "
            "the newest whole one."
        )


def _check_filled(model: Any, info: dict[str, Any]) -> None:
    """Raise RuntimeError when transformers tells that weights are missing, which it fills with random numbers, or that
    there are others."""
    wrong = {key: found for key, found in info.items() if found}
    if wrong:
        raise RuntimeError(f"the weights do not fill {type(model).__name__}: {wrong}")


def _sides(source: Source, dtype: torch.dtype) -> Sides:
    return Sides(source.config, source.vocabulary, source.checkpoint, source.classes, source.tokenizer.eod, dtype)


def _guard(path: Path) -> None:
    """Name our attention in config.json: transformers loads no model with an attention that nobody has registered."""
    content = json.loads(path.read_text(encoding="utf8"))
    write_whole(path, (json.dumps({**content, "attn_implementation": ATTENTION}, indent=2) + "\n").encode())


def _dtype_of(source: Source) -> torch.dtype:
    return PRECISIONS[source.config.training.precision]


def _tensors(source: Source, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of theirs. Raises UserError when the checkpoint cannot be read or `dtype` is too small."""
    family = FAMILIES[model_type(source.config)]
    for name, whole in _weights(source.checkpoint):
        for target, tensor in weights.to_theirs(family, source.config.model, source.vocabulary, name, whole):
            converted = tensor.to(dtype)
            if not converted.isfinite().all():
                raise UserError(
                    f"{source.folder} has weights in {target} that {dtype} cannot hold: use another --dtype."
                )
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
