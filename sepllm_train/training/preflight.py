"""Checks of a configuration at the start of a run, for programs that start runs: before the first of them."""

from __future__ import annotations

from sepllm_train.config.present import require_data
from sepllm_train.config.schema import Config
from sepllm_train.config.validate import validate
from sepllm_train.metrics.trackers import check_tracker
from sepllm_train.model.build import check_model
from sepllm_train.model.pattern import AUTO
from sepllm_train.training.schedules import schedule_of


def check_config(config: Config, world_size: int, *, data: bool = True) -> None:
    """Check a configuration as a run of `world_size` processes does before it opens its data.

    data: also that its datasets are there. Raises UserError.
    """
    validate(config, world_size)
    if data:
        require_data(config)
    check_model(config)
    check_tracker(config.logging)
    if config.attention.separators != AUTO:
        schedule_of(config)
