"""A trained run opened for reading in one process: its configuration, weights and held-out samples."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch.utils.data import Dataset
from yaml import YAMLError

from sepllm_train.base.console import note
from sepllm_train.base.errors import UserError, first_line
from sepllm_train.config.load import one_sentence, to_config
from sepllm_train.config.schema import Config, DataConfig, ParallelConfig, require
from sepllm_train.data.corpus import Corpus, open_corpus
from sepllm_train.data.splits import build_datasets
from sepllm_train.distributed.launch import Launch, device_of, parallel_state, process_grid
from sepllm_train.model.gpt import SepGPTModel
from sepllm_train.model.pattern import AttentionPattern, resolve_pattern
from sepllm_train.training import checkpoint as checkpoints
from sepllm_train.training.checkpoint.files import MANIFEST, altered, damage, newest, step_folder, step_of

ALONE = Launch(rank=0, world_size=1, local_rank=0, by_torchrun=False)


@dataclass(frozen=True)
class CheckpointIdentity:
    """Which weights were read: place, step, tokens trained on, and the hash of the manifest, which holds the hash of
    every file."""

    path: str
    step: int
    tokens: int
    manifest_sha256: str


@dataclass(frozen=True)
class Run:
    """A trained model and what it is evaluated on.

    `config` is the run's, for one process and the data that was asked for; `pattern` that of training; `validation`
    gives the held-out samples, in the order in which validation in training takes them.
    """

    folder: Path
    config: Config
    model: SepGPTModel
    pattern: AttentionPattern
    corpus: Corpus
    validation: Any
    checkpoint: CheckpointIdentity


class TakingTurns(Dataset):
    """Sample i of k datasets is sample i // k of number i % k, up to the end of the shortest."""

    def __init__(self, datasets: Sequence[Any]) -> None:
        self.datasets = datasets

    def __len__(self) -> int:
        return len(self.datasets) * min(len(dataset) for dataset in self.datasets)

    def __getitem__(self, number: int) -> dict[str, Any]:
        place, source = divmod(number, len(self.datasets))
        return self.datasets[source][place]


@contextmanager
def alone(config: Config | None = None) -> Iterator[torch.device]:
    """One process as megatron-core's whole grid, taken down whatever happens; a grid of one that is there is used."""
    if parallel_state.model_parallel_is_initialized():
        require(dist.get_world_size() == 1, "an analysis runs in one process: start it without torchrun.")
        yield device_of(ALONE)
        return
    try:
        with process_grid(config or Config(), ALONE) as device:
            yield device
    except BaseException:
        # The grid leaves this to the end of the process, which here may go on.
        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
        if dist.is_initialized():
            dist.destroy_process_group()
        raise


def load_run(
    folder: Path | str,
    *,
    step: int | None = None,
    data: str | None = None,
    held_out: float | None = None,
) -> Run:
    """Open a run inside `alone`.

    step: number of the checkpoint, None for the newest whole one. data: prefix of another dataset, made with the same
    tokenizer. held_out: share of the data's last tokens that is held out, None for the run's own.

    The weights have the precision of training; only they are read. Raises UserError when there is no run or whole
    checkpoint, the data is not what the run needs, or part of its training data would count as held out.
    """
    folder = Path(folder)
    config = read_config(folder)
    path = find_checkpoint(folder, step)
    state = checkpoints.read_state(path)
    config = replace(
        config,
        parallel=ParallelConfig(),
        attention=replace(config.attention, backend="auto"),
        training=replace(config.training, recompute="none"),
        data=_data(config.data, data, held_out),
    )
    corpus = open_corpus(config.data)
    _check_data(folder, config, corpus, state["identity"], own=data is None)
    validation = held_out_samples(config, corpus)
    model = checkpoints.load_model(path, config, state["identity"]["model.vocabulary"], device_of(ALONE))
    manifest = hashlib.sha256((path / MANIFEST).read_bytes()).hexdigest()
    return Run(
        folder,
        config,
        model,
        resolve_pattern(config.attention, config.model.layers),
        corpus,
        validation,
        CheckpointIdentity(str(path), step_of(path), state["state"]["tokens"], manifest),
    )


def held_out_samples(config: Config, corpus: Corpus) -> Any:
    """The held-out samples of `config.data.sequence_length` tokens; sources take turns.

    Raises UserError when nothing is held out, or less than a sample.
    """
    sources = list(build_datasets(config, corpus)[1].values())
    require(
        bool(sources),
        "the run was trained without held-out documents (data.validation_fraction=0): name other text with --data and "
        "the share of its tokens to take with --held-out.",
    )
    return sources[0] if len(sources) == 1 else TakingTurns(sources)


def read_config(folder: Path) -> Config:
    """config.yaml of a run. Raises UserError when it is not there or not a configuration."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(f"{path} does not exist: give the folder of a run, such as runs/NAME.")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(path))
        assert isinstance(merged, DictConfig)
        return to_config(merged)
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {one_sentence(error)}") from None
    except (OSError, ValueError, YAMLError) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}).") from None


def find_checkpoint(folder: Path, step: int | None = None) -> Path:
    """The checkpoint of `step`, or the newest whole one, with a note on stderr of newer ones that are damaged.

    Raises UserError when there is none, or it is damaged.
    """
    reasons: dict[Path, str] = {}
    if step is None:
        path = newest(folder, reasons)
        if path is None:
            damaged = next((f" (the newest: {reason})" for reason in reasons.values()), "")
            raise UserError(f"{folder} has no whole checkpoint{damaged}: train it to its first one.")
        for skipped, why in reasons.items():
            note(f"skipped the damaged checkpoint {skipped} ({why})")
    else:
        path = step_folder(folder / checkpoints.FOLDER, step)
        if not path.is_dir():
            known = ", ".join(str(step_of(found)) for found in checkpoints.checkpoints_of(folder))
            raise UserError(f"{folder} has no checkpoint of step {step}: there are {known or 'none'}.")
    reason = damage(path) or altered(path, 0, 1)
    if reason is not None:
        raise UserError(f"the checkpoint {path} is damaged, {reason}: choose another with --checkpoint.")
    return path


def describe(run: Run, samples: int) -> dict[str, Any]:
    """What a result was computed from, for its JSON."""
    return {
        "run": str(run.folder),
        "checkpoint": asdict(run.checkpoint),
        "attention": {k: v for k, v in asdict(run.config.attention).items() if k != "backend"},
        "precision": run.config.training.precision,
        "data": {source.prefix: source.header.files[".bin"].sha256 for source in run.corpus.sources},
        "held_out": run.config.data.validation_fraction,
        **validated_on(run.corpus),
        "sequence_length": run.config.data.sequence_length,
        "samples": samples,
    }


def validated_on(corpus: Corpus) -> dict[str, Any]:
    """For the JSON of a result: the datasets that are validated on in place of held-out documents, if there are any."""
    found = {source.prefix: source.header.files[".bin"].sha256 for source in corpus.validation}
    return {"validation_data": found} if found else {}


def _data(own: DataConfig, prefix: str | None, held_out: float | None) -> DataConfig:
    """The run's data settings with what was asked for in their place."""
    return replace(
        own,
        source=own.source if prefix is None else "prefixes",
        prefixes=own.prefixes if prefix is None else [prefix],
        validation_fraction=own.validation_fraction if held_out is None else held_out,
        validation_prefixes=own.validation_prefixes if prefix is None and held_out is None else [],
        workers=0,
    )


def _check_data(folder: Path, config: Config, corpus: Corpus, identity: dict[str, Any], *, own: bool) -> None:
    """Raise UserError unless `corpus` has the run's tokens and holds out nothing that the run was trained on."""
    names = ", ".join(source.prefix for source in corpus.sources)
    if corpus.tokenizer_sha256 != identity["data (hash of the tokenizer)"]:
        raise UserError(
            f"{folder} was trained on another vocabulary: {names} was made with another tokenizer than the run's data "
            f"({corpus.vocabulary:,} entries, the model has {identity['model.vocabulary']:,})."
        )
    trained = identity["data (hash of the tokens)"]
    if own and corpus.identity() != trained:
        raise UserError(
            f"{names} is no longer the data that {folder} was trained on, so what was held out is not known: give "
            "--data PREFIX of other text."
        )
    if own and corpus.validation_identity() != identity.get(checkpoints.VALIDATION_DATA, {}):
        raise UserError(
            f"data.validation_prefixes of {folder} are no longer what it was validated on: give --data PREFIX of other "
            "text and --held-out SHARE."
        )
    hashes = {entry["sha256"] for entry in corpus.identity().values()}
    for seen in checkpoints.trained_on(identity):
        fraction, shared = seen["validation_fraction"], hashes & {entry["sha256"] for entry in seen["data"].values()}
        if shared and config.data.validation_fraction > fraction:
            raise UserError(
                f"--held-out {config.data.validation_fraction:g} of {names} would include documents that {folder} was "
                f"trained on: it held out {fraction:g}."
            )
