"""Hydra: where the configurations are, their schema, and its errors as one sentence."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from typing import TypeVar, cast, get_args, get_origin

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc

from sepllm_train.base.errors import UserError
from sepllm_train.config import schema
from sepllm_train.config.folder import config_folder
from sepllm_train.config.keys import hints_of, nearest
from sepllm_train.config.overrides import is_group, plus, settled, without_options
from sepllm_train.config.stored import check_types

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
    _refuse_unknown(config, kind, kind)
    try:
        with _without_environment():
            result = OmegaConf.to_object(config)
    except (OmegaConfBaseException, RecursionError) as error:
        raise UserError(one_sentence(error, kind)) from None
    assert isinstance(result, kind)
    check_types(result)
    return result


def configuration_of(overrides: Sequence[str]) -> schema.Config:
    """The checked configuration that `overrides` of a run make, as for scripts/pretrain.py. Raises UserError."""
    return _configuration_of(overrides, "pretrain", "schema", schema.Config)


def _configuration_of(words: Sequence[str], primary: str, name: str, kind: type[C]) -> C:
    """As `compose_and_run` composes it."""
    register_schema(name, kind)
    overrides = settled(words, kind)
    try:
        with _without_environment(), initialize_config_dir(str(config_folder()), version_base="1.3"):
            composed = compose(primary, overrides=overrides)
    except _COMPOSITION_ERRORS as error:
        raise UserError(one_sentence(error, kind)) from None
    return to_dataclasses(composed, kind)


def compose_and_run(task: Callable[[C], None], words: Sequence[str], primary: str, name: str, kind: type[C]) -> None:
    """Compose configs/`primary`.yaml, whose schema is `kind` under the name `name`, with `words`, and call `task`.

    With an option of Hydra's, such as --cfg job, it prints what there is, after the same checks, and calls nothing.
    Raises UserError.
    """
    config = _configuration_of(without_options(words), primary, name, kind)
    if not any(word.startswith("-") for word in words):
        task(config)
        return
    # Hydra reads the words from the command line of the process.
    typed, sys.argv = sys.argv, [sys.argv[0], *settled(words, kind)]
    try:
        with _without_environment():
            hydra.main(version_base="1.3", config_path=str(config_folder()), config_name=primary)(lambda _: None)()
    finally:
        sys.argv = typed


class _Withheld(Exception):
    """An interpolation asked for a variable of the environment."""


@contextmanager
def _without_environment() -> Iterator[None]:
    """Refuse ${oc.env:NAME} in the block: config.yaml and the records of a run would hold what it stands for."""

    def refuse(name: object, *default: object) -> None:
        raise _Withheld(str(name))

    OmegaConf.register_new_resolver("oc.env", refuse, replace=True)
    try:
        yield
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)


def _refuse_unknown(config: DictConfig, kind: type, whole: type, group: str = "") -> None:
    """Raise UserError for a key that `kind` does not have: +KEY and ++KEY add any, which nothing would read."""
    hints = hints_of(kind)
    for key in map(str, config):
        name = f"{group}{key}"
        hint = hints.get(key)
        if hint is None:
            raise UserError(_no_key(name, whole))
        inner = config._get_node(key)
        if is_dataclass(hint.kind) and isinstance(inner, DictConfig):
            _refuse_unknown(inner, cast(type, hint.kind), whole, f"{name}.")
        elif get_origin(hint.kind) is dict and isinstance(inner, DictConfig) and not inner._is_none():
            held = get_args(hint.kind)[1]
            for entry in map(str, inner) if is_dataclass(held) else ():
                node = inner._get_node(entry)
                if isinstance(node, DictConfig):
                    _refuse_unknown(node, cast(type, held), whole, f"{name}.{entry}.")


def _no_key(name: str, kind: type) -> str:
    near = nearest(name, kind)
    return f"configuration: there is no key {name}{f' (did you mean {near}?)' if near else ''}; " + (
        "sepllm pretrain --keys prints every key." if kind is schema.Config else "--cfg job prints every key."
    )


def one_sentence(error: BaseException, kind: type = schema.Config) -> str:
    """Message of Hydra or OmegaConf in a sentence, without its layout, with the nearest known name if one is near."""
    text = str(error.__cause__ or error) if isinstance(error, HydraException) else str(error)
    if missing := re.search(r"Could not find '([^']+)'", str(error)):
        return f"configuration: there is no {missing[1]}.yaml in configs/; {_known_files(missing[1])}."
    if not isinstance(error, HydraException | OmegaConfBaseException):
        return "configuration: what a group takes is the name of a file in configs/, such as model=pythia160m."
    if unknown := re.search(r"Could not override '([^']+)'", str(error)):
        if plus(unknown[1]) != unknown[1]:
            return f"configuration: {unknown[1]}s are added with a plus: {plus(unknown[1])}=NAME."
        if is_group(unknown[1]):
            return (
                f"configuration: {unknown[1]} takes the name of a file in configs/; {_known_files(unknown[1] + '/')}."
            )
        return _no_key(unknown[1], kind)
    if there := re.search(r"already at '([^']+)'", str(error)):
        return f"configuration: {there[1]} is a key already: write it without the plus, {there[1]}=VALUE."
    if withheld := re.search(r"_Withheld raised while resolving interpolation: (\S+)", str(error)):
        return (
            f"configuration: ${{oc.env:{withheld[1]}}} would be written into the records of the run: let the shell put "
            f'it in if it is no secret, KEY="${withheld[1]}"; secrets stay in the environment, where W&B finds its own.'
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
