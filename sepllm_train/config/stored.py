"""config.yaml of a run: written whole, and read as what it holds, without interpolation and within bounds.

A stored configuration may come from elsewhere. ${...} in it is text, never the value of a variable of this machine.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast, get_args, get_origin

import yaml

from sepllm_train.base.errors import UserError
from sepllm_train.base.parsing import read_yaml, read_yaml_texts
from sepllm_train.config.keys import Hint, hints_of, nearest
from sepllm_train.config.schema import Config

C = TypeVar("C")

FILE = "config.yaml"


def read_config(path: Path) -> Config:
    """The configuration in a stored config.yaml. Raises UserError when it is not there or not a configuration."""
    remedy = "restore it, or give the folder of another run"
    content = read_yaml(path, remedy)
    return from_mapping(Config, content, f"{path}:", remedy, texts=lambda: read_yaml_texts(path, remedy))


def to_yaml(config: Any) -> str:
    """A configuration, dataclasses or a mapping, as the text of config.yaml, which reads back as the same values."""
    content = config if isinstance(config, Mapping) else asdict(config)
    return yaml.dump(content, Dumper=_Dumper, default_flow_style=False, allow_unicode=True, sort_keys=False)


def from_mapping(
    kind: type[C], content: Mapping[str, Any], where: str, remedy: str, *, group: str = "", texts: Any = None
) -> C:
    """A dataclass of the configuration from stored values; keys that are missing get their defaults.

    where, remedy: begin and end of the sentence on what is wrong. texts: function that gives the same mapping with the
    scalars as they are typed, for text that was not quoted. Raises UserError for an unknown key or another type.
    """
    hints = hints_of(kind)
    values: dict[str, Any] = {}
    for key, value in content.items():
        name = f"{group}{key}"
        if key not in hints:
            near = nearest(name, Config)
            raise UserError(f"{where} there is no key {name}{f' (did you mean {near}?)' if near else ''}: {remedy}.")
        hint = hints[key]
        if is_dataclass(hint.kind):
            if not isinstance(value, dict):
                raise UserError(f"{where} {name} must be a mapping of keys, not {_shown(value)}: {remedy}.")
            inner = None if texts is None else _inside(texts, key)
            values[key] = from_mapping(cast(type, hint.kind), value, where, remedy, group=f"{name}.", texts=inner)
        else:
            typed = value if texts is None else _as_typed(value, hint, _inside(texts, key))
            values[key] = _converted(typed, hint, name, where, remedy)
    try:
        return kind(**values)
    except UserError as error:
        raise UserError(f"{where} {error}") from None


def check_types(values: Any, group: str = "") -> None:
    """Raise UserError for a value of another type than its key's: an interpolation may stand for anything."""
    for key, hint in hints_of(type(values)).items():
        value, name = getattr(values, key), f"{group}{key}"
        several = get_origin(hint.kind) is dict and isinstance(value, dict)
        inner = Hint(get_args(hint.kind)[1]) if several else hint
        for place, held in {f"{name}.{k}": v for k, v in value.items()}.items() if several else [(name, value)]:
            if is_dataclass(held):
                check_types(held, f"{place}.")
            else:
                _converted(held, inner, place, "configuration:", "sepllm pretrain --keys explains every key")


def _inside(texts: Any, key: str) -> Any:
    def inner() -> Any:
        outer = texts()
        return outer.get(key) if isinstance(outer, dict) else None

    return inner


def _as_typed(value: Any, hint: Hint, texts: Callable[[], Any]) -> Any:
    """A value of a text key that YAML reads as something else, as it is typed: 2024_01_15, 3.10, on."""
    if hint.kind is str and isinstance(value, bool | int | float):
        return texts()
    if hint.text and isinstance(value, list) and any(isinstance(one, bool | int | float) for one in value):
        return [text if isinstance(one, bool | int | float) else one for one, text in zip(value, texts(), strict=True)]
    return value


def _converted(value: Any, hint: Hint, name: str, where: str, remedy: str) -> Any:
    """A stored value as its key holds it. Raises UserError for another type."""
    if value is None and hint.optional:
        return None
    if hint.kind is Any:
        if _holds_a_group(value):
            raise UserError(f"{where} {name} must be values, not a whole group of keys: {remedy}.")
        return value
    if get_origin(hint.kind) is list or hint.kind is list:
        if not isinstance(value, list):
            raise UserError(f"{where} {name} must be a list, not {_shown(value)}: {remedy}.")
        entry = Hint(*get_args(hint.kind))
        return [_converted(one, entry, name, where, remedy) for one in value]
    fits = {
        str: isinstance(value, str),
        bool: isinstance(value, bool),
        int: isinstance(value, int) and not isinstance(value, bool),
        float: isinstance(value, int | float) and not isinstance(value, bool),
    }
    if not fits.get(hint.kind, False):
        if hint.kind not in fits:
            raise UserError(f"{where} {name} must be a mapping of keys, not {_shown(value)}: {remedy}.")
        what = {str: "text", bool: "true or false", int: "a whole number", float: "a number"}[hint.kind]
        raise UserError(f"{where} {name} must be {what}, not {_shown(value)}: {remedy}.")
    return float(value) if hint.kind is float else value


def _holds_a_group(value: Any) -> bool:
    """True where an interpolation stands for a whole group: ${model}."""
    if isinstance(value, dict):
        return any(map(_holds_a_group, value.values()))
    return any(map(_holds_a_group, value)) if isinstance(value, list) else is_dataclass(value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


class _Dumper(yaml.SafeDumper):
    """YAML that every reader takes for the same values: text that looks like a number or a word of YAML is quoted."""

    words: ClassVar[frozenset[str]] = frozenset(("y", "yes", "n", "no", "true", "false", "on", "off", "null", "~"))

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def text(self, data: str) -> yaml.ScalarNode:
        quotes = data.lower() in self.words or _is_number(data)
        return self.represent_scalar("tag:yaml.org,2002:str", data, style="'" if quotes else None)


_Dumper.add_representer(str, _Dumper.text)


def _is_number(text: str) -> bool:
    """True for text that Python or YAML may read as a number."""
    if re.fullmatch(r"[-+.\d_][-+.\d_eExXoObBa-fA-F:]*", text) and re.search(r"\d", text):
        return True
    try:
        float(text)
    except ValueError:
        return False
    return True
