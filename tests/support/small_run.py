"""The model of the tests that start real runs, and the short run of tests/training: a step takes milliseconds."""

from __future__ import annotations

import torch

from sepllm_train.cli.pretrain import pretrain
from sepllm_train.config.load import configuration_of

SMALL_MODEL = (
    "model.layers=2",
    "model.hidden=64",
    "model.heads=4",
    "model.ffn=128",
    "data.sequence_length=128",
    "data.workers=0",
)
SMALL_RUN = (
    "+experiment=demo_sep",
    *SMALL_MODEL,
    "training.steps=4",
    "training.validation_interval=2",
    "training.checkpoint_interval=2",
)


def train_here(*overrides: str) -> None:
    """Do in this process what scripts/pretrain.py does with `overrides`: a process of its own imports for seconds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        pretrain(configuration_of(list(overrides)))
    finally:
        torch.set_num_threads(threads)
