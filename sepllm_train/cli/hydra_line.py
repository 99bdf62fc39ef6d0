"""Commands whose words are Hydra's overrides."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

C = TypeVar("C")


def run(command: str, words: Sequence[str], task: Callable[[C], None], primary: str, name: str, kind: type[C]) -> None:
    """Compose configs/`primary`.yaml with `words`, as `config.load.compose_and_run`, and call `task` with it.

    Hydra reads the command line of the process, which a run also records.
    """
    from sepllm_train.config.load import compose_and_run

    before = sys.argv
    program = before[0] if before and before[0].endswith(f"{command}.py") else f"sepllm {command}"
    sys.argv = [program, *words]
    try:
        compose_and_run(task, primary, name, kind)
    finally:
        sys.argv = before


def choices(group: str) -> list[str]:
    """Names of the files of a group of configs/."""
    from sepllm_train.config.folder import config_folder

    return sorted(path.stem for path in (config_folder() / group).glob("*.yaml"))
