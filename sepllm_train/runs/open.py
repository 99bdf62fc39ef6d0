"""A trained run as one object: configuration, checkpoint, tokenizer, patterns, weights and held-out text.

`open_run` reads config.yaml and checks the files of a checkpoint. Everything else is read on first use, and torch and
megatron-core are imported no earlier than that.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sepllm_train.base.console import note
from sepllm_train.base.errors import RankError, UserError
from sepllm_train.base.files import hash_file
from sepllm_train.base.parsing import read_json_if_any
from sepllm_train.base.shapes import COUNT, require_shape
from sepllm_train.config import stored
from sepllm_train.config.compatibility import DATA, TOKENIZER, VOCABULARY
from sepllm_train.config.schema import AttentionConfig, Config, DataConfig, LoggingConfig, ParallelConfig, require

if TYPE_CHECKING:
    import numpy as np
    import torch

    from data_prep.tokenizers import Tokenizer
    from sepllm_train.data.corpus import Corpus
    from sepllm_train.generation.pattern import TokenPattern
    from sepllm_train.model.gpt import SepGPTModel
    from sepllm_train.model.pattern import AttentionPattern


_IDENTITY = {VOCABULARY: int, TOKENIZER: str, DATA: dict}


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Folder of a checkpoint and the content of its state.json."""

    path: Path
    state: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> Checkpoint:
        """Read state.json. Raises UserError when that fails, or it lacks what every run and imported model records."""
        from sepllm_train.training.checkpoint import read_state
        from sepllm_train.training.checkpoint.files import STATE

        state = read_state(path)
        require_shape(state, {"identity": _IDENTITY}, path / STATE, "choose another checkpoint")
        return cls(path, state)

    @property
    def identity(self) -> dict[str, Any]:
        """Settings of the run that wrote it which a run that resumes from it must share."""
        return dict(self.state["identity"])

    @property
    def step(self) -> int:
        """Steps of training; 0 for an imported model."""
        return int(self.state["state"]["step"])

    @property
    def tokens(self) -> int:
        """Tokens of training; 0 for an imported model, of which they are not known."""
        return int(self.state["state"]["tokens"])

    @property
    def vocabulary(self) -> int:
        """Entries of the model's vocabulary, without padding."""
        return int(self.state["identity"]["model.vocabulary"])

    @property
    def attention(self) -> AttentionConfig:
        """The attention it was trained with."""
        settings = {
            key.removeprefix("attention."): value
            for key, value in self.identity.items()
            if key.startswith("attention.")
        }
        remedy = "restore it, or take another checkpoint"
        return stored.from_mapping(AttentionConfig, settings, f"{self.path}:", remedy, group="attention.")

    @cached_property
    def manifest_sha256(self) -> str:
        """Hash of the manifest, which holds the hash of every other file."""
        from sepllm_train.training.checkpoint.files import MANIFEST

        return hash_file(self.path / MANIFEST).sha256

    def record(self) -> dict[str, Any]:
        """Its place, hash and progress, for the JSON of what was made of it."""
        return {
            "checkpoint": str(self.path),
            "manifest_sha256": self.manifest_sha256,
            "step": self.step,
            "tokens": self.tokens,
        }


@dataclass(frozen=True, eq=False)
class TrainedRun:
    """A trained run, opened by `open_run`; the properties are read on first use and kept.

    Attributes:
        folder: the run's.
        config: as it was trained, with the held-out text that was asked for.
        checkpoint: the one whose weights are used.
        skipped: newer checkpoints, which are damaged, with the reasons.
        tokenizer_file: the tokenizer that was given; None to look for it in the run's folder and beside its data.
        own_data: False where another dataset than the run's was asked for.
    """

    folder: Path
    config: Config
    checkpoint: Checkpoint
    skipped: dict[Path, str] = field(default_factory=dict)
    tokenizer_file: Path | None = None
    own_data: bool = True

    @property
    def vocabulary(self) -> int:
        """Entries of the model's vocabulary, without padding."""
        return self.checkpoint.vocabulary

    @property
    def averaged(self) -> list[int]:
        """Steps of the checkpoints whose mean the weights are; none where they are as trained or imported."""
        path, remedy = self.folder / "run.json", "restore it, or average the checkpoints again"
        content = read_json_if_any(path)
        require_shape(content, {"averaged_from?": {"checkpoints": [{"step": COUNT}]}}, path, remedy)
        source = content.get("averaged_from", {"checkpoints": []})
        return [checkpoint["step"] for checkpoint in source["checkpoints"]]

    @cached_property
    def pattern(self) -> AttentionPattern:
        """Attention pattern of training, in terms of separator classes."""
        from sepllm_train.model.pattern import resolve_pattern

        return resolve_pattern(self.config.attention, self.config.model.layers)

    @cached_property
    def token_pattern(self) -> TokenPattern:
        """Attention pattern of training in terms of token ids, also of a dense run.

        Raises UserError where it depends on more than the tokens, and as `tokenizer` and `classes` do.
        """
        from sepllm_train.generation.pattern import TokenPattern

        placement = self.config.attention.placement
        require(
            placement == "natural",
            f"attention.placement={placement} of {self.folder} is for training alone: which tokens are separators "
            "depends on their place in the training data, not on the tokens.",
        )
        return TokenPattern.of_run(self.pattern, self.classes, self.tokenizer.eod)

    @property
    def tokenizer(self) -> Tokenizer:
        """The run's tokenizer; the tokens of the data are not needed.

        Raises UserError when it is not found, or is not the one the run was trained with.
        """
        return self._tokens[0]

    @property
    def classes(self) -> np.ndarray:
        """u8 [vocabulary]: separator class of each entry, as the data was annotated for training.

        Without the data's side-car they are those of the tokenizer's strings, where an older side-car may count two
        classes as one. Raises UserError as `tokenizer` does.
        """
        return self._tokens[1]

    @cached_property
    def _tokens(self) -> tuple[Tokenizer, np.ndarray]:
        from sepllm_train.runs.vocabulary import tokenizer_and_classes

        return tokenizer_and_classes(self.folder, self.config.data, self.checkpoint.identity, self.tokenizer_file)

    @cached_property
    def model(self) -> SepGPTModel:
        """The model in one process, for use inside one block of `alone`. Raises UserError as `load_model` does."""
        return self.load_model()

    def load_model(self, config: Config | None = None, device: torch.device | None = None) -> SepGPTModel:
        """Load the weights, in the precision of training. Every rank of the process grid calls it.

        config: by `config_for`, None for the run's in one process. Raises UserError when the checkpoint cannot be read
        as what the model needs, and for weights that are not finite.
        """
        from sepllm_train.distributed.launch import ALONE, device_of
        from sepllm_train.training import checkpoint as checkpoints

        if config is None:
            config = in_one_process(self.config)
        model = checkpoints.load_for_evaluation(
            self.checkpoint.path, config, self.vocabulary, device or device_of(ALONE)
        )
        refuse_not_finite(self.checkpoint.path, model.named_parameters())
        return model

    @cached_property
    def corpus(self) -> Corpus:
        """The dataset, opened inside `alone`.

        Raises UserError when it is not what the run needs, or part of its training data would count as held out.
        """
        from sepllm_train.data.corpus import open_corpus
        from sepllm_train.runs.held_out import check_data

        corpus = open_corpus(self.config.data)
        check_data(self.folder, self.config, corpus, self.checkpoint.identity, own=self.own_data)
        return corpus

    @cached_property
    def validation(self) -> Any:
        """Held-out samples, in the order of validation in training. Raises UserError as `corpus` does."""
        from sepllm_train.runs.held_out import held_out_samples

        return held_out_samples(self.config, self.corpus)

    def sample_count(self, asked: int | None) -> int:
        """Number of held-out samples to take: `asked`, None for as many as validation in training, at most all.

        Raises UserError when none are asked for.
        """
        require(asked is None or asked >= 1, f"--samples {asked} must be at least 1.")
        return min(asked or self.config.training.validation_samples or 1, len(self.validation))

    def describe(self, samples: int) -> dict[str, Any]:
        """Run, checkpoint and text from which a result was computed, for its JSON."""
        from sepllm_train.runs.held_out import validated_on

        checkpoint = self.checkpoint
        return {
            "run": str(self.folder),
            "checkpoint": {
                "path": str(checkpoint.path),
                "step": checkpoint.step,
                "tokens": checkpoint.tokens,
                "manifest_sha256": checkpoint.manifest_sha256,
            },
            "attention": {k: v for k, v in asdict(self.config.attention).items() if k != "backend"},
            "precision": self.config.training.precision,
            "data": {source.prefix: source.header.files[".bin"].sha256 for source in self.corpus.sources},
            "held_out": self.config.data.validation_fraction,
            **validated_on(self.corpus),
            "sequence_length": self.config.data.sequence_length,
            "samples": samples,
        }


def refuse_not_finite(place: Path, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Raise RankError for the first of the named tensors of `place` that has a NaN or an infinity."""
    for name, tensor in tensors:
        if tensor.is_floating_point() and not tensor.isfinite().all():
            wrong = int((~tensor.isfinite()).sum())
            raise RankError(
                f"{place} has {wrong:,} of {tensor.numel():,} weights in {name} that are NaN or infinite in "
                f"{str(tensor.dtype).removeprefix('torch.')}: take another checkpoint, or copy it again."
            )


def open_run(
    folder: Path | str,
    step: int | None = None,
    *,
    tokenizer: Path | str | None = None,
    data: str | None = None,
    held_out: float | None = None,
) -> TrainedRun:
    """Open a trained run.

    step: number of the checkpoint, None for the newest whole one. tokenizer: its file, where it is not in the run's
    folder or beside its data. data: prefix of another dataset to evaluate on, made with the same tokenizer. held_out:
    share of the data's last tokens that is held out, None for the run's own.

    Raises UserError when there is no run or no whole checkpoint.
    """
    folder = Path(folder)
    config = read_config(folder)
    skipped: dict[Path, str] = {}
    checkpoint = Checkpoint.read(find_checkpoint(folder, step, skipped))
    config = replace(config, data=_evaluated(config.data, data, held_out))
    file = None if tokenizer is None else Path(tokenizer)
    return TrainedRun(folder, config, checkpoint, skipped, file, own_data=data is None)


def read_config(folder: Path) -> Config:
    """Read config.yaml of a run. Raises UserError when it is not there or not a configuration."""
    path = folder / stored.FILE
    if not path.is_file():
        raise UserError(f"{path} does not exist: give the folder of a run, such as runs/NAME.")
    return stored.read_config(path)


def find_checkpoint(folder: Path, step: int | None = None, skipped: dict[Path, str] | None = None) -> Path:
    """Find the checkpoint of `step`, or the newest whole one, with a note on stderr of newer ones that are damaged.

    Those are added to `skipped` with the reasons. Raises UserError when there is none, or it is damaged.
    """
    from sepllm_train.training.checkpoint.files import (
        FOLDER,
        altered,
        checkpoints_of,
        damage,
        newest,
        step_folder,
        step_of,
    )

    reasons = {} if skipped is None else skipped
    if step is None:
        path = newest(folder, reasons)
        if path is None:
            damaged = next((f" (the newest: {reason})" for reason in reasons.values()), "")
            raise UserError(f"{folder} has no whole checkpoint{damaged}: train it to its first one.")
        for left_out, why in reasons.items():
            note(f"skipped the damaged checkpoint {left_out} ({why})")
    else:
        path = step_folder(folder / FOLDER, step)
        if not path.is_dir():
            known = ", ".join(str(step_of(found)) for found in checkpoints_of(folder))
            raise UserError(f"{folder} has no checkpoint of step {step}: there are {known or 'none'}.")
    reason = damage(path) or altered(path, 0, 1)
    if reason is not None:
        raise UserError(f"the checkpoint {path} is damaged, {reason}: choose another step.")
    return path


def in_one_process(config: Config) -> Config:
    """Configuration of a run for its model in one process, whatever layout and machine it was trained in."""
    return replace(
        config,
        parallel=ParallelConfig(),
        attention=replace(config.attention, backend="auto"),
        training=replace(config.training, recompute="none"),
    )


def config_for(config: Config, tensor: int, world_size: int) -> Config:
    """Configuration of a run for generation in `tensor` processes, whatever layout it was trained in.

    Raises UserError when there are `world_size` processes instead, or the model cannot be split so.
    """
    from sepllm_train.config.validate import validate
    from sepllm_train.model.build import check_model

    require(tensor >= 1, f"--tensor {tensor} must be at least 1.")
    require(
        world_size == tensor,
        f"--tensor {tensor} takes {tensor} processes and {world_size} were started: "
        f"python -m sepllm_train.distributed.torchrun --nproc-per-node={tensor} -m sepllm_train generate ... --tensor "
        f"{tensor}" + (", or python alone." if tensor == 1 else "."),
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


def _evaluated(own: DataConfig, prefix: str | None, held_out: float | None) -> DataConfig:
    """The run's data settings with the dataset and the held-out share that were asked for."""
    if prefix is not None:
        own = replace(own, source="prefixes", prefixes=[prefix])
    if held_out is not None:
        own = replace(own, validation_fraction=held_out)
    return own if prefix is None and held_out is None else replace(own, validation_prefixes=[])
