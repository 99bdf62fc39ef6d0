"""Hydra: where the configurations are, their schema, and its errors as one sentence."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable
from typing import TypeVar

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sepllm_train.base.errors import RunStopped, UserError
from sepllm_train.config import schema
from sepllm_train.config.folder import config_folder

C = TypeVar("C")

# The last two are what Hydra raises for a group that is given a number or a list of numbers.
_COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, ValueError, TypeError)


def register_schema(name: str = "schema", kind: type = schema.Config) -> None:
    """Store the dataclasses under the name that the primary configuration inherits from."""
    ConfigStore.instance().store(name=name, node=kind)


def to_config(config: DictConfig) -> schema.Config:
    """Check a composed configuration of a run and return it as dataclasses. Raises UserError."""
    return to_dataclasses(config, schema.Config)


def to_dataclasses(config: DictConfig, kind: type[C]) -> C:
    """Check a composed configuration and return it as `kind`. Raises UserError."""
    try:
        result = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise UserError(one_sentence(error, kind)) from None
    assert isinstance(result, kind)
    return result


def configuration_of(overrides: list[str]) -> schema.Config:
    """The checked configuration that `overrides` of a run make, as for scripts/pretrain.py. Raises UserError."""
    register_schema()
    try:
        with initialize_config_dir(str(config_folder()), version_base="1.3"):
            composed = compose("pretrain", overrides=overrides)
    except _COMPOSITION_ERRORS as error:
        raise UserError(one_sentence(error)) from None
    return to_config(composed)


def run_with_hydra(task: Callable[[schema.Config], None]) -> None:
    """Compose the configuration of a run from the command line and call `task` with it."""
    compose_and_run(task, "pretrain", "schema", schema.Config)


def compose_and_run(task: Callable[[C], None], primary: str, name: str, kind: type[C]) -> None:
    """Compose configs/`primary`.yaml, whose schema is `kind` under the name `name`, and call `task` with it.

    Hydra prints composition errors with a hint about its own variables and exits with 1; here they become one
    sentence and exit code 2, like every other mistake of the user's.
    """
    register_schema(name, kind)
    show_traceback = "HYDRA_FULL_ERROR" in os.environ
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")

    failures: list[UserError | RunStopped] = []
    composed = False

    @hydra.main(version_base="1.3", config_path=str(config_folder()), config_name=primary)
    def decorated(config: DictConfig) -> None:
        nonlocal composed
        composed = True
        # Raised through Hydra, the sentence would come with Hydra's own lines on every rank.
        try:
            task(to_dataclasses(config, kind))
        except (UserError, RunStopped) as error:
            failures.append(error)

    try:
        decorated()
    except _COMPOSITION_ERRORS as error:
        if show_traceback or (composed and not isinstance(error, HydraException | OmegaConfBaseException)):
            raise
        raise UserError(one_sentence(error, kind)) from None
    finally:
        if not show_traceback:
            del os.environ["HYDRA_FULL_ERROR"]
    if failures:
        raise failures[0]


def one_sentence(error: BaseException, kind: type = schema.Config) -> str:
    """Message of Hydra or OmegaConf in a sentence, without its layout, with the nearest known name if one is near."""
    text = str(error.__cause__ or error) if isinstance(error, HydraException) else str(error)
    if missing := re.search(r"Could not find '([^']+)'", str(error)):
        return f"configuration: there is no {missing[1]}.yaml in configs/; {_known_files(missing[1])}."
    if not isinstance(error, HydraException | OmegaConfBaseException):
        return "configuration: what a group takes is the name of a file in configs/, such as model=pythia160m."
    if unknown := re.search(r"Could not override '([^']+)'", str(error)):
        if unknown[1] == "experiment":
            return "configuration: experiments are added with a plus: +experiment=NAME."
        if (config_folder() / unknown[1]).is_dir():
            return (
                f"configuration: {unknown[1]} takes the name of a file in configs/; {_known_files(unknown[1] + '/')}."
            )
        return f"configuration: there is no key {unknown[1]}{_nearest_key(unknown[1], kind)}; " + (
            "sepllm pretrain --keys prints every key." if kind is schema.Config else "--cfg job prints every key."
        )
    if unreadable := re.search(r"Error parsing override '(.*)'", str(error)):
        return (
            f"configuration: {unreadable[1]!r} cannot be read: overrides are written KEY=VALUE, quoted for the shell."
        )
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    key = next((line.removeprefix("full_key:").strip() for line in lines if line.startswith("full_key:")), "")
    first = lines[0].rstrip(".") if lines else type(error).__name__
    if key and ("is not a ListConfig" in first or "DictConfig with ListConfig" in first):
        entry = "PREFIX" if key.endswith("prefixes") else "ENTRY"
        return f"configuration: {key} is a list: write it in brackets, '{key}=[{entry},...]'."
    return f"configuration: {key + ': ' if key and key not in first else ''}{first}."


def _known_files(wanted: str) -> str:
    """The files of the group in which `wanted` (GROUP/NAME) was looked for."""
    group, _, name = wanted.rpartition("/")
    known = sorted(path.stem for path in (config_folder() / group).glob("*.yaml"))
    near = difflib.get_close_matches(name, known, n=1)
    return (f"did you mean {near[0]}? " if near else "") + f"known are {', '.join(known)}"


def _nearest_key(wanted: str, kind: type) -> str:
    """', did you mean KEY?' for the configuration key nearest to `wanted`, or nothing."""
    default = OmegaConf.structured(kind)
    groups = {name: node for name, node in default.items() if OmegaConf.is_config(node)}
    keys = [f"{name}.{key}" for name, node in groups.items() for key in node] + list(default)
    near = difflib.get_close_matches(wanted, keys, n=1)
    return f" (did you mean {near[0]}?)" if near else ""
