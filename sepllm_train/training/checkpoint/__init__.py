"""Checkpoints of a run: whole or not there, of any layout, written while the run continues.

identity  what a checkpoint must have in common with the run that continues from it
metadata  torch's description of the tensors, read without running it
files     folders: manifest, which are whole, which is the newest, which are dropped
shards    what a rank holds: model, optimizer, RNG state as parts of whole tensors
save      the writer in the background
load      reading without running code, and a hash over the state of training
"""

from sepllm_train.training.checkpoint.files import (
    FOLDER,
    checkpoints_of,
    find,
    named_by_latest,
    newest,
    read_state,
    refuse_if_all_damaged,
    tidy,
)
from sepllm_train.training.checkpoint.identity import (
    IDENTITY_SHAPE,
    blend_order,
    check_identity,
    check_unseen,
    earlier_data,
    identity,
    schedule_identity,
    trained_on,
)
from sepllm_train.training.checkpoint.load import (
    altered_on_any_rank,
    digest,
    digests,
    load,
    load_for_evaluation,
    load_weights,
)
from sepllm_train.training.checkpoint.save import Outcome, Saver, save_weights
from sepllm_train.training.checkpoint.shards import whole_weights

__all__ = [
    "FOLDER",
    "IDENTITY_SHAPE",
    "Outcome",
    "Saver",
    "altered_on_any_rank",
    "blend_order",
    "check_identity",
    "check_unseen",
    "checkpoints_of",
    "digest",
    "digests",
    "earlier_data",
    "find",
    "identity",
    "load",
    "load_for_evaluation",
    "load_weights",
    "named_by_latest",
    "newest",
    "read_state",
    "refuse_if_all_damaged",
    "save_weights",
    "schedule_identity",
    "tidy",
    "trained_on",
    "whole_weights",
]
