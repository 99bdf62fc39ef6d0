"""Trackers that mirror metrics.jsonl: Weights & Biases and TensorBoard."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sepllm_train.base.errors import UserError
from sepllm_train.config.schema import LoggingConfig
from sepllm_train.metrics.log import MetricsLog
from sepllm_train.metrics.mirror import Mirror, Tracker

__all__ = ["Mirror", "Tracker", "check_tracker", "start_mirror", "wandb_mode"]

# Module that a tracker needs -> the extra of setup.py that brings it.
_NEEDED = {"wandb": ("wandb", "wandb"), "tensorboard": ("tensorboard", "tensorboard")}


def check_tracker(logging: LoggingConfig) -> None:
    """Raise UserError when the tracker that is asked for is not installed, or has no key for mode=online."""
    if logging.tracker == "none":
        return
    module, extra = _NEEDED[logging.tracker]
    if importlib.util.find_spec(module) is None:
        raise UserError(
            f"logging.tracker={logging.tracker} needs the package {module}, which is not installed: "
            f"python -m pip install -e '.[{extra}]', or logging.tracker=none."
        )
    if logging.tracker == "wandb":
        from sepllm_train.metrics.wandb_tracker import has_key, host

        if logging.mode == "online" and not has_key():
            raise UserError(
                f"logging.mode=online needs an API key for {host()}: run `wandb login`, set WANDB_API_KEY, or take "
                "logging.mode=offline."
            )


def wandb_mode(logging: LoggingConfig) -> str:
    """online, offline or disabled: `auto` is what WANDB_MODE says, or online with an API key and offline without."""
    if logging.mode != "auto":
        return logging.mode
    from sepllm_train.metrics.wandb_tracker import has_key

    said = os.environ.get("WANDB_MODE", "")
    return said if said in ("online", "offline", "disabled") else "online" if has_key() else "offline"


def start_mirror(
    logging: LoggingConfig, metrics: MetricsLog, folder: Path, name: str, facts: Callable[[], dict[str, Any]]
) -> Mirror | None:
    """Mirror what `metrics` has and gets to the tracker that is asked for, of a run called `name` in `folder`.

    `facts` gives what describes the run, as nested dictionaries. None without a tracker.
    """
    tracker = _tracker_of(logging, folder, name, facts)
    if tracker is None:
        return None
    mirror = Mirror(tracker, metrics.path)
    mirror.start()
    metrics.mirror = mirror.log
    return mirror


def _tracker_of(logging: LoggingConfig, folder: Path, name: str, facts: Callable[[], dict[str, Any]]) -> Tracker | None:
    """The tracker that is asked for, or None."""
    if logging.tracker == "tensorboard":
        from sepllm_train.metrics.tensorboard_tracker import TensorBoardTracker

        return TensorBoardTracker(folder, facts())
    if logging.tracker == "wandb" and (mode := wandb_mode(logging)) != "disabled":
        from sepllm_train.metrics.wandb_tracker import WandbTracker

        return WandbTracker(logging, folder, name, mode, facts())
    return None
