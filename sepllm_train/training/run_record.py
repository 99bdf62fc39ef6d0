"""Records of a run beside its checkpoints: run.json, metrics.jsonl, bad_steps.jsonl and the tracker's copy of them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from sepllm_train.base.console import say
from sepllm_train.base.errors import UserError
from sepllm_train.base.secrets import masked_values
from sepllm_train.config.compatibility import BLEND_ORDER
from sepllm_train.config.curriculum import batch_schedule_of, curriculum_of
from sepllm_train.config.schema import Config
from sepllm_train.data.corpus import Corpus
from sepllm_train.metrics.log import MetricsLog
from sepllm_train.metrics.trackers import start_mirror
from sepllm_train.training import run_folder
from sepllm_train.training.facts import Facts
from sepllm_train.training.folder_watch import FolderWatch
from sepllm_train.training.initial_weights import initial_record
from sepllm_train.training.prepare import Prepared


class Journal:
    """The records that rank 0 writes while a run trains: the logs of steps and bad steps, the tracker's mirror, and the
    status in run.json.

    The logs are cut back to the step that the run resumes from, None from scratch.
    """

    def __init__(self, prepared: Prepared, resumed: int | None, world_size: int, device: torch.device) -> None:
        config, self.folder = prepared.config, prepared.entry.folder
        self.run = run_record(config, prepared, world_size, device)
        run_folder.describe(self.folder, config, self.run)
        self.metrics, self.bad_steps = (MetricsLog(self.folder / name) for name in run_folder.LOGS)
        for log in (self.metrics, self.bad_steps):
            log.rewind(-1 if resumed is None else resumed)
        self.watch = FolderWatch(self.folder, (self.metrics, self.bad_steps))
        self.mirror = start_mirror(
            config.logging,
            self.metrics,
            self.folder,
            config.name,
            lambda: run_facts(config, self.run, self.folder, prepared.corpus, prepared.facts),
        )

    def end(self, status: str) -> None:
        """Record how the run ended, and close the mirror."""
        self.write_status(status)
        self.close_mirror(status)

    def write_status(self, status: str) -> None:
        """Record the status in run.json; a disk that cannot take it gives a warning."""
        file = self.folder / "run.json"
        try:
            if self.watch.owns_folder():
                run_folder.write_run(self.folder, {**self.run, "status": status})
        except (OSError, UserError) as error:
            # How the run ended must not be hidden by a disk that is full.
            reason = (error.strerror if isinstance(error, OSError) else None) or str(error).rstrip(".")
            say(f"warning: {file} cannot be written ({reason}): it does not say {status!r}.")

    def close_mirror(self, status: str) -> None:
        """Let the tracker finish."""
        if self.mirror is not None:
            self.mirror.close(status)


def run_record(config: Config, prepared: Prepared, world_size: int, device: torch.device) -> dict[str, Any]:
    """Content of run.json. Runs are comparable when all of `comparable` is equal."""
    facts, corpus, batches = prepared.facts, prepared.corpus, batch_schedule_of(config)
    return {
        "name": config.name,
        "identity": prepared.recorded_identity,
        "schedule": prepared.schedule,
        "origin": prepared.entry.origin,
        "initial_weights": initial_record(prepared.initial, prepared.entry.checkpoint),
        "parameters": facts.parameters,
        "steps": config.training.steps,
        "curriculum": curriculum_of(config) or None,
        **({"batch_schedule": batches, "tokens": facts.tokens} if batches else {}),
        "comparable": {
            "data": corpus.identity(),
            **({BLEND_ORDER: order} if (order := prepared.recorded_identity.get(BLEND_ORDER, 1)) > 1 else {}),
            # Bits per byte are of other bytes with it.
            **({"prefix_bytes": corpus.prefix_bytes} if corpus.prefix_bytes else {}),
            "tokenizer": corpus.tokenizer_sha256,
            "vocabulary": facts.vocabulary,
            "sequence_length": config.data.sequence_length,
            "seed_of_data_order": config.seed,
            "validation_fraction": config.data.validation_fraction,
            "validation_samples": config.training.validation_samples,
            # Losses are of other labels with it.
            **({"mask_boundary_loss": True} if config.data.mask_boundary_loss else {}),
            **({"validation_data": corpus.validation_identity()} if corpus.validation else {}),
            **({"earlier_data": prepared.entry.earlier_data} if prepared.entry.earlier_data else {}),
        },
        "attention": {
            "pattern": config.attention.pattern,
            "initial_tokens": config.attention.initial_tokens,
            "window": config.attention.window,
            "window_choices": config.attention.window_choices,
            "separators": config.attention.separators,
            "placement": config.attention.placement,
            "keep_share": config.attention.keep_share,
            "full_layers": config.attention.full_layers,
            **({"restart_positions": True} if config.attention.restart_positions else {}),
            **({} if prepared.choice is None else {"auto": prepared.choice.record()}),
        },
        "backends": facts.backends,
        "flops_per_token": facts.flops_per_token,
        "devices": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "world_size": world_size,
    }


def run_facts(config: Config, run: dict[str, Any], folder: Path, corpus: Corpus, facts: Facts) -> dict[str, Any]:
    """Description of a run for a tracker: the whole configuration under its own keys; beside it `run` (run.json),
    `environment` (environment.json of the run's folder, with the git state), `derived` numbers and `datasets`. Secrets
    are masked."""
    found: dict[str, Any] = masked_values(
        {
            **asdict(config),
            "run": run,
            "environment": run_folder.read_environment(folder),
            "derived": facts.record(),
            "datasets": datasets(corpus),
        }
    )
    return found


def datasets(corpus: Corpus) -> dict[str, Any]:
    """By name, the header of each dataset of the blend without its tables of vocabulary entries."""
    return {
        source.name: {
            "prefix": source.prefix,
            "weight": weight,
            "tokens": source.header.tokens,
            "documents": source.header.documents,
            "bytes": source.header.bytes,
            "tokenizer": asdict(source.header.tokenizer),
            "files": {f"{source.name}{suffix}": asdict(file) for suffix, file in source.header.files.items()},
            "separator_density": {entry.name: entry.density for entry in source.header.classes},
            "separator_count": {entry.name: entry.count for entry in source.header.classes},
        }
        for source, weight in zip(corpus.sources, corpus.weights(), strict=True)
    }
