"""A model of transformers as a checkpoint of ours, in a folder that opens like a run's."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_prep.separators import classify
from data_prep.tokenizers import Tokenizer, load_tokenizer
from sepllm_train.base.console import say
from sepllm_train.base.errors import UserError, first_line
from sepllm_train.base.files import whole_folder
from sepllm_train.base.parsing import read_json_if_any
from sepllm_train.config.present import IMPORTED
from sepllm_train.config.schema import AttentionConfig, Config, DataConfig, ModelConfig, TrainingConfig, require
from sepllm_train.data.corpus import Corpus, open_corpus
from sepllm_train.distributed.launch import alone
from sepllm_train.generation.pattern import TokenPattern
from sepllm_train.hf import weights
from sepllm_train.hf.architecture import FAMILIES, attention_of, read_theirs, to_ours
from sepllm_train.hf.folder import refuse_existing
from sepllm_train.hf.separators import CONFIG_KEY, trained_pattern
from sepllm_train.hf.verify import Sides, compare
from sepllm_train.hf.weights import SafetensorsFolder
from sepllm_train.model.build import PRECISIONS, build_model, check_model
from sepllm_train.model.pattern import resolve_pattern
from sepllm_train.runs.variations import base_attention
from sepllm_train.runs.vocabulary import TOKENIZER_NAMES, header_classes, pad_classes
from sepllm_train.runs.write import write_run
from sepllm_train.training import checkpoint as checkpoints
from sepllm_train.training.checkpoint.files import checkpoints_of, step_of

# By safetensors' name of a type.
_PRECISION_OF = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}


@dataclass(frozen=True)
class Vocabulary:
    """Facts known of the tokens: the tokenizer's file (None without one), its hash, the class of each entry of the
    model's vocabulary (u8 [V], None when not known), and the id that ends a document."""

    tokenizer: Tokenizer | None
    sha256: str
    classes: np.ndarray | None
    end_of_document: int | None


def import_model(
    model_folder: Path | str,
    output: Path | str,
    *,
    attention: Sequence[str] = (),
    data: Sequence[str] = (),
    overwrite: bool = False,
) -> None:
    """Write a model of transformers to the folder `output` as the checkpoint of step 0 of a run, weights alone.

    attention: KEY=VALUE of the attention it is to have from now on; without them, that which it was exported with, and
    full attention for any other model. data: prefixes of datasets made with its tokenizer, for config.yaml.

    `output` appears when its logits were found equal to those of the model. Raises UserError for a model that ours
    does not have, weights that are not safetensors, an `output` that is there, and when the logits differ. overwrite:
    replace an `output` that is an imported model without training since.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder, output = Path(model_folder), Path(output)
    refuse_existing(output, _trained, overwrite=overwrite)
    theirs = read_theirs(folder)
    tensors = SafetensorsFolder(folder)
    corpus = open_corpus(DataConfig(source="prefixes", prefixes=list(data))) if data else None
    words = _vocabulary(folder, corpus, theirs.vocab_size)
    config = _config(theirs, tensors, output, words, attention, data)
    vocabulary = theirs.vocab_size
    recorded = checkpoints.identity(config, vocabulary, {} if corpus is None else corpus.identity(), words.sha256)
    classes = np.zeros(vocabulary, dtype=np.uint8) if words.classes is None else words.classes
    with whole_folder(output) as aside:
        source = {"status": IMPORTED, "imported_from": str(folder.resolve())}
        identities = {"identity": recorded, "schedule": checkpoints.schedule_identity(config)}
        with alone(config):
            saved = write_run(aside, config, _filled(config, theirs.model_type, tensors), source, identities)
        if words.tokenizer is not None:
            shutil.copyfile(words.tokenizer.path, aside / TOKENIZER_NAMES[words.tokenizer.kind])
        model = _load(folder)
        parameters = model.num_parameters()
        rounded = PRECISIONS[config.training.precision]
        differences = compare(Sides(config, vocabulary, saved, classes, words.end_of_document, rounded), model)
    largest = ", ".join(f"{value:.2g} ({name})" for name, value in differences.items())
    say(
        f"{output}: {type(model).__name__} of {parameters:,} parameters as step 0 in {config.training.precision}, "
        f"attention {config.attention.pattern}; largest difference of logits {largest}"
    )


def _trained(output: Path) -> str | None:
    """Reason why a folder is not an imported model as it was written, or None."""
    status = read_json_if_any(output / "run.json").get("status")
    if status != IMPORTED:
        return f"the status in its run.json is {status!r}, not {IMPORTED!r}"
    later = [checkpoint.name for checkpoint in checkpoints_of(output) if step_of(checkpoint) > 0]
    return f"it was trained until {later[-1]}" if later else None


def _load(folder: Path) -> Any:
    """The model as transformers reads it, in fp32. Raises UserError where it does not."""
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", use_safetensors=True
        )
    except Exception as error:  # transformers raises errors of many kinds
        raise UserError(f"transformers cannot load {folder} ({first_line(error)}).") from None


def _config(
    theirs: Any,
    tensors: SafetensorsFolder,
    output: Path,
    words: Vocabulary,
    overrides: Sequence[str],
    data: Sequence[str],
) -> Config:
    """The configuration of a run of this model. Raises UserError for what it cannot be."""
    model, qk_norm = to_ours(theirs, output.name)
    wanted = weights.their_names(FAMILIES[theirs.model_type], model)
    _check_names(wanted, model, theirs.model_type, tensors)
    trained = AttentionConfig(pattern="dense")
    pattern = _pattern(theirs, tensors.folder / "config.json")
    if pattern is not None:
        found = attention_of(pattern, words.classes)
        if found is None:
            say(
                f"warning: the separators in {tensors.folder / 'config.json'} are not classes of the tokenizer's "
                "entries, so config.yaml has attention.pattern=dense: choose others with --attention."
            )
        trained = found or trained
    if overrides:
        trained = base_attention(trained, overrides)
    config = Config(
        name=output.name,
        run_root=str(output.parent),
        model=model,
        attention=replace(trained, qk_norm=qk_norm),
        data=DataConfig(
            source="prefixes" if data else "sample",
            prefixes=list(data),
            sequence_length=theirs.max_position_embeddings,
        ),
        training=TrainingConfig(precision=_precision(tensors, wanted)),
    )
    check_model(config)
    own = resolve_pattern(config.attention, model.layers)
    require(
        words.classes is not None or config.attention.pattern != "sep",
        f"attention.pattern=sep needs to know which tokens are separators: put the tokenizer into {tensors.folder}, or "
        "give --data PREFIX.",
    )
    require(
        words.end_of_document is not None or not own.separate_documents,
        f"attention.separate_documents=true needs the token that ends a document: put the tokenizer into "
        f"{tensors.folder}.",
    )
    return config


def _pattern(theirs: Any, path: Path) -> TokenPattern | None:
    """The pattern that the model was exported with. Raises UserError when it cannot be read."""
    try:
        pattern = trained_pattern(theirs)
        if pattern is not None and not isinstance(pattern.interval, int | None):
            raise TypeError(f"interval {pattern.interval!r} is not a number")
    except (ValueError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
        raise UserError(f"{CONFIG_KEY} in {path} cannot be used: {first_line(error)}.") from None
    return pattern


def _precision(tensors: SafetensorsFolder, names: set[str]) -> str:
    """The precision that holds all weights, which need not be that of config.json. Raises UserError for other types."""
    types = tensors.types(names)
    unknown = sorted(types - _PRECISION_OF.keys())
    require(not unknown, f"{tensors.folder} has weights of type {unknown[:1]}: fp32, bf16 and fp16 can be imported.")
    return _PRECISION_OF[types.pop()] if len(types) == 1 else "fp32"


def _vocabulary(folder: Path, corpus: Corpus | None, entries: int) -> Vocabulary:
    """Find what is known of the tokens, from the data if there is some and the tokenizer in the model's folder."""
    own = []
    # SentencePiece's file first: a tokenizer.json beside it was made from it.
    for path in (folder / name for name in sorted(TOKENIZER_NAMES.values(), reverse=True)):
        if path.is_file():
            try:
                own.append(load_tokenizer(path))
            except UserError as error:
                say(f"warning: {path} is left out: {error}")
    if corpus is not None:
        source = corpus.sources[0]
        used = load_tokenizer(Path(source.prefix).parent / source.header.tokenizer.file)
        if used.sha256 not in [tokenizer.sha256 for tokenizer in own]:
            say(
                f"warning: {source.prefix} was made with another tokenizer file than {folder} has: this is right only "
                "if both give the same ids."
            )
        classes = pad_classes(header_classes(source.header), entries)
        return Vocabulary(used, used.sha256, classes, used.eod)
    if not own:
        return Vocabulary(None, "", None, None)
    return Vocabulary(own[0], own[0].sha256, pad_classes(classify(own[0].token_bytes()), entries), own[0].eod)


def _check_names(wanted: set[str], model: ModelConfig, kind: str, tensors: SafetensorsFolder) -> None:
    """Raise UserError when a tensor is missing, or one is there that our model has no place for."""
    family = FAMILIES[kind]
    missing = sorted(wanted - tensors.names)
    require(not missing, f"{tensors.folder} has no tensor {missing[:1]}: it is not the model of its config.json.")
    tied = {family.outside[weights.OUTPUT]} if model.tied_embeddings else set()
    extra = sorted(name for name in tensors.names - wanted - tied if not name.endswith(family.ignored))
    require(not extra, f"{tensors.folder} has a tensor {extra[:1]}, which our model has no place for.")


@torch.no_grad()
def _filled(config: Config, kind: str, tensors: SafetensorsFolder) -> Any:
    """Our model with the weights of theirs."""
    assert config.model.vocabulary is not None
    family = FAMILIES[kind]
    model = build_model(config, config.model.vocabulary)
    for name, parameter in model.named_parameters():
        tensor = weights.to_ours(family, config.model, name, tensors.read)
        rows = config.model.vocabulary if name in weights.VOCABULARY else len(parameter)
        require(
            tensor.shape == parameter[:rows].shape,
            f"{tensors.folder}: the tensor for {name} has the shape {list(tensor.shape)}, and its config.json asks "
            f"for {list(parameter[:rows].shape)}.",
        )
        # Rows of padding are 0 already.
        parameter[:rows].copy_(tensor)
    return model
