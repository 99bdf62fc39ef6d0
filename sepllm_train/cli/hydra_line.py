"""Commands whose words are Hydra's overrides."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

from sepllm_train.base.errors import UserError
from sepllm_train.base.secrets import masked_words

C = TypeVar("C")
# Options of Hydra that are passed on: they print a configuration.
HYDRA = ("--cfg", "-c", "--package", "-p", "--resolve", "--info", "-i")


def check_options(command: str, words: Sequence[str], kind: type) -> None:
    """Raise UserError for a word with dashes that is no option of Hydra's to print a configuration."""
    for place, word in enumerate(words):
        if word.startswith("-") and word.split("=")[0] not in HYDRA:
            from sepllm_train.config.overrides import option_advice

            shown = masked_words([word])[0]
            meant = option_advice(words, place, kind) if shown == word else ""
            advice = meant or "keys are written KEY=VALUE, without dashes"
            raise UserError(
                f"sepllm {command} has no option {shown}: {advice}; sepllm {command} --help lists the options."
            )


def run(command: str, words: Sequence[str], task: Callable[[C], None], primary: str, name: str, kind: type[C]) -> None:
    """Compose configs/`primary`.yaml with `words`, as `config.load.compose_and_run`, and call `task` with it.

    The command line of the process, which a run records, is that of `command`.
    """
    check_options(command, words, kind)
    from sepllm_train.config.load import compose_and_run

    before = sys.argv
    program = before[0] if before and before[0].endswith(f"{command}.py") else f"sepllm {command}"
    sys.argv = [program, *words]
    try:
        compose_and_run(task, words, primary, name, kind)
    finally:
        sys.argv = before


def choices(group: str) -> list[str]:
    """Names of the files of a group of configs/."""
    from sepllm_train.config.folder import config_folder

    return sorted(path.stem for path in (config_folder() / group).glob("*.yaml"))
