"""Runs of weights alone, which were not trained in their folder but made of something else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sepllm_train.base.files import write_json, write_whole
from sepllm_train.base.secrets import masked
from sepllm_train.config.schema import Config
from sepllm_train.config.stored import FILE, to_yaml
from sepllm_train.training import checkpoint as checkpoints


def write_run(
    folder: Path,
    config: Config,
    model: Any,
    source: dict[str, Any],
    identities: dict[str, Any],
    state: dict[str, Any] | None = None,
) -> Path:
    """Write `model` as the only checkpoint of a run, without an optimizer, with config.yaml and run.json; gives its
    path. In a process grid of one.

    source: what run.json has on the origin of the weights, and the `status`. identities: `identity` and `schedule` of
    the checkpoint. state: its counters, None for those of step 0. Raises UserError when it cannot be written.
    """
    path = checkpoints.save_weights(folder, model, identities, state)
    text = to_yaml(config)
    write_whole(folder / FILE, text.encode(), private=masked(text) != text)
    step = 0 if state is None else state["step"]
    run = {"name": config.name, **source, "identity": identities["identity"], "steps": step}
    write_json(folder / "run.json", run, indent=2)
    return path
