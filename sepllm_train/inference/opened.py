"""A trained run to generate from: of its data only the tokenizer is needed."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from data_prep.sample import prepare_sample
from data_prep.separators import classify
from data_prep.sidecar import HEADER_SUFFIX, with_suffix
from data_prep.tokenizers import Tokenizer, load_tokenizer
from sepllm_train.analysis.runs import find_checkpoint
from sepllm_train.attention_pattern import resolve_pattern
from sepllm_train.config.schema import Config, DataConfig, LoggingConfig, ParallelConfig, require
from sepllm_train.config.validate import validate
from sepllm_train.data.corpus import cache_folder
from sepllm_train.errors import UserError
from sepllm_train.inference.pattern import TokenPattern
from sepllm_train.model.build import build_model, check_model
from sepllm_train.model.gpt import SepGPTModel
from sepllm_train.training.checkpoint import load_weights, read_state

# A tokenizer in the run's own folder.
_NAMES = ("tokenizer.json", "tokenizer.model")


@dataclass(frozen=True, eq=False)
class Opened:
    """What is read of a run before its weights; `pattern` is that of training, also where it attends fully."""

    config: Config
    checkpoint: Path
    vocabulary: int
    tokenizer: Tokenizer
    pattern: TokenPattern

    def model(self, device: torch.device) -> SepGPTModel:
        """The model with its weights, in the process grid of `config`. Every rank calls it.

        Raises UserError when the checkpoint cannot be loaded.
        """
        model = build_model(self.config, self.vocabulary).to(device)
        load_weights(self.checkpoint, [model])
        return model.eval()


def config_for(config: Config, tensor: int, world_size: int) -> Config:
    """A run's configuration for generation in `tensor` processes, whatever layout it was trained in.

    Raises UserError when there are `world_size` processes instead, or the model cannot be split so.
    """
    require(tensor >= 1, f"--tensor {tensor} must be at least 1.")
    require(
        world_size == tensor,
        f"--tensor {tensor} takes {tensor} processes and {world_size} were started: "
        f"torchrun --nproc-per-node={tensor} scripts/generate.py ... --tensor {tensor}"
        + (", or python alone." if tensor == 1 else "."),
    )
    config = replace(
        config,
        parallel=ParallelConfig(tensor=tensor),
        training=replace(config.training, recompute="none", compile=False, loss_chunk=0),
        logging=LoggingConfig(),
    )
    validate(config, world_size)
    check_model(config)
    return config


def open_run(folder: Path, config: Config, step: int | None, tokenizer: Path | None) -> Opened:
    """Open a run whose configuration, by `config_for`, is `config`.

    step: number of the checkpoint, None for the newest whole one. tokenizer: its file, None to look for it in the run's
    folder and beside its data. Raises UserError when there is no whole checkpoint or tokenizer, the tokenizer is not
    the run's, or the pattern is not one of single tokens.
    """
    checkpoint = find_checkpoint(folder, step)
    identity = read_state(checkpoint)["identity"]
    placement = config.attention.placement
    require(
        placement == "natural",
        f"nothing can be generated with attention.placement={placement} of {folder}: which tokens are separators "
        "depends on their place in the training data, not on the tokens.",
    )
    path = tokenizer or next((folder / name for name in _NAMES if (folder / name).is_file()), None)
    # The sample corpus, which would be made now, has nothing to tell that the tokenizer does not.
    prefixes = [] if path is not None and config.data.source == "sample" else _prefixes(config.data)
    found = load_tokenizer(path or _beside(prefixes, folder))
    # An imported model may have no tokenizer on record.
    known = identity["data (hash of the tokenizer)"]
    require(
        known in ("", found.sha256),
        f"{found.path} is not the tokenizer that {folder} was trained with: give its file with --tokenizer.",
    )
    vocabulary = identity["model.vocabulary"]
    require(
        found.vocab_size <= vocabulary,
        f"{found.path} has {found.vocab_size:,} entries, the model {vocabulary:,}: it is another model's tokenizer.",
    )
    classes = np.zeros(vocabulary, dtype=np.uint8)
    classes[: found.vocab_size] = _classes(prefixes, found)
    pattern = resolve_pattern(config.attention, config.model.layers)
    return Opened(config, checkpoint, vocabulary, found, TokenPattern.of_run(pattern, classes, found.eod))


def _prefixes(data: DataConfig) -> list[Path]:
    """Prefixes of a run's datasets, which may be gone."""
    if data.source == "sample":
        return [prepare_sample(cache_folder(data), vocab_size=data.sample_vocabulary, source=data.sample_text)]
    paths = [entry["path"] if isinstance(entry, dict) else str(entry) for entry in data.prefixes]
    return [Path(path.removesuffix(".bin").removesuffix(".idx")).expanduser() for path in paths]


def _beside(prefixes: list[Path], folder: Path) -> Path:
    """The tokenizer's copy beside the data. Raises UserError when there is none."""
    for prefix in prefixes:
        for suffix in (".tokenizer.json", ".tokenizer.model"):
            if with_suffix(prefix, suffix).is_file():
                return with_suffix(prefix, suffix)
    where = ", ".join(str(prefix) for prefix in prefixes)
    raise UserError(f"the tokenizer of {folder} is not beside its data ({where}): give its file with --tokenizer.")


def _classes(prefixes: list[Path], tokenizer: Tokenizer) -> np.ndarray:
    """u8 [entries]: separator classes as the data was annotated for training, or else as the tokenizer tells."""
    for prefix in prefixes:
        try:
            header = json.loads(with_suffix(prefix, HEADER_SUFFIX).read_text(encoding="utf8"))
            if header["tokenizer"]["sha256"] != tokenizer.sha256:
                continue
            classes = np.zeros(tokenizer.vocab_size, dtype=np.uint8)
            for entry in header["classes"]:
                classes[entry["ids"]] = entry["number"]
        except (OSError, ValueError, KeyError, TypeError, IndexError):
            continue
        return classes
    return classify(tokenizer.token_bytes())
