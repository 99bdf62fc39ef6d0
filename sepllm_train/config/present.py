"""Files that a configuration names, looked for before torch is imported."""

from __future__ import annotations

import os
from pathlib import Path

from sepllm_train.base.errors import UserError
from sepllm_train.base.parsing import read_json_if_any
from sepllm_train.config.schema import Config

# `status` in run.json of weights without an optimizer, by the command that made them.
IMPORTED, AVERAGED = "imported", "averaged"


def require_data(config: Config) -> None:
    """Raise UserError for datasets and checkpoints of a configuration that are not there: before torch is imported.

    Under torchrun the ranks look together, later: one of them alone may not see a file.
    """
    if "RANK" in os.environ:
        return
    for entry in (*config.data.prefixes, *config.data.validation_prefixes):
        prefix = entry.get("path") if isinstance(entry, dict) else entry
        if isinstance(prefix, str):
            require_dataset(prefix)
    refuse_weights_alone(config)
    finished = None if config.dry_run else finished_run(config)
    if finished is not None:
        raise UserError(f"{finished_advice(finished)}.")
    # What the run begins with: not read any more by one that continues, which training sees from its folder.
    key = "init_from" if config.resume in ("auto", "never") else "resume"
    path = getattr(config, key)
    begun = (Path(config.run_root).expanduser() / config.name).exists()
    if path is not None and not begun and not Path(path).expanduser().exists():
        raise UserError(
            f"{key}={path}: there is no checkpoint there; give a run folder or RUN/checkpoints/step_NNNNNNNN"
            + (", or resume=auto or never." if key == "resume" else ".")
        )


def require_dataset(prefix: str) -> None:
    """Raise UserError for a dataset that is not there or not whole."""
    from data_prep.sidecar import dataset_prefix, read_header

    read_header(os.path.abspath(dataset_prefix(prefix)))


def refuse_weights_alone(config: Config) -> None:
    """Raise UserError where a run would take the folder of weights without an optimizer, or continue from them."""
    folder = Path(config.run_root) / config.name
    sources = [] if config.resume in ("auto", "never") else [Path(config.resume).expanduser()]
    for path in (folder, *sources):
        run = path.parent.parent if path.parent.name == "checkpoints" else path
        status = read_json_if_any(run / "run.json").get("status")
        if status in (IMPORTED, AVERAGED):
            raise UserError(
                f"{run} holds {status} weights without an optimizer, from which no run continues: train on with "
                f"init_from={run} name=NEW."
            )


def finished_advice(folder: Path) -> str:
    """Advice where `folder` holds a finished run."""
    return (
        f"{folder} holds a finished run: choose another name=, or train on with resume={folder} name=NEW and more "
        "training.steps"
    )


def finished_run(config: Config) -> Path | None:
    """The run's folder where it holds a finished run."""
    folder = Path(config.run_root) / config.name
    used = (folder / "metrics.jsonl").exists()
    return folder if used and read_json_if_any(folder / "run.json").get("status") == "finished" else None
