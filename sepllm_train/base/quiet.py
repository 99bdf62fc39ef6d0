"""Messages of libraries that are muted: the one list, each with its reason.

megatron-core and torch report optional packages, defaults and deprecations of their own to whoever writes for them. A
user of this package can act on none of these, so they are muted by message, never by library. A new message appears,
and fails tests/base/test_quiet.py, until it is mended at its root or listed here.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Muted:
    """A message that is not shown.

    `message`: regular expression for the start of the text. `reason`: who prints it, and why it needs no action.
    `logger`: name of the logger that prints it; None for a Python warning.
    """

    message: str
    reason: str
    logger: str | None = None


MUTED = (
    # Printed on import.
    Muted(".*Apex (is|are) not installed", "megatron-core; `optional_packages` reports the same in one line"),
    Muted(".*(Transformer Engine|transformer_engine).*not installed", "megatron-core; see `optional_packages`"),
    Muted(".*imports from `dynamic_context.py` will be removed", "megatron-core 0.16 about its own modules"),
    Muted(".*torch.jit.script_method. is deprecated", "megatron-core decorates its fused functions with it"),
    Muted(".*MimoModelConfig is experimental", "megatron-core 0.19 about a model that is not used"),
    Muted(
        "No CUDA runtime is found", "torch's CUDA build on a machine without a GPU", logger="torch.utils.cpp_extension"
    ),
    # Printed when the model is built.
    Muted(
        ".*full scope is deprecated", "megatron-core's own default of CUDA graphs, which are off; 0.19 renamed the key"
    ),
    Muted(
        ".*core_attn is from transformer_engine", "megatron-core on selective recomputation; that attention is not used"
    ),
    Muted(
        ".*it is recommended to set the environment variable CUDA_DEVICE_MAX_CONNECTIONS",
        "megatron-core on sequence parallelism; docs/running.md says when to set it",
    ),
    # Printed in a step.
    Muted(".*tp_group is None, using default tp group", "megatron-core's RowParallelLinear about its own call"),
    Muted(
        ".*(all_gather_into_tensor|reduce_scatter_tensor|_all_gather_base|_reduce_scatter_base).*deprecated",
        "torch about the collectives that megatron-core calls",
    ),
)


def mute() -> None:
    """Mute the messages of MUTED for the rest of the process; for programs. A second call adds nothing."""
    for muted in MUTED:
        if muted.logger is None:
            warnings.filterwarnings("ignore", message=muted.message)
    _mute_loggers()


@contextmanager
def quiet() -> Iterator[None]:
    """Mute the messages of MUTED inside the block; for imports and calls in a process whose warnings are not ours."""
    with warnings.catch_warnings():
        mute()
        yield


def _mute_loggers() -> None:
    for name in {muted.logger for muted in MUTED if muted.logger}:
        logger = logging.getLogger(name)
        if _is_shown not in logger.filters:
            logger.addFilter(_is_shown)


def _is_shown(record: logging.LogRecord) -> bool:
    """Filter of a logger: False for a message of MUTED."""
    text = record.getMessage()
    return not any(muted.logger == record.name and re.match(muted.message, text) for muted in MUTED)
