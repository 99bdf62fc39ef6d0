"""Overrides as they are typed: text keys keep their text; a word that cannot be read is answered with one that can.

Hydra reads `name=2024_01_15` as a number and `name=a=b` not at all. Here a value of a text key is quoted for Hydra
first, so that `name`, paths and tags are what was typed. `null` stays null where a key may be without a value.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from typing import Any, get_origin

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from sepllm_train.base.errors import UserError
from sepllm_train.base.secrets import masked
from sepllm_train.config.folder import config_folder
from sepllm_train.config.keys import Hint, hint_of, keys_of, nearest

# Options of Hydra whose value is the next word.
_WITH_VALUE = ("--cfg", "-c", "--package", "-p")
_OVERRIDE = re.compile(r"(\+\+|\+|~)?([^=\s+~'\"\[\]{}(),][^=\s'\"\[\]{}(),]*)=(.*)", re.DOTALL)
_REMOVAL = re.compile(r"~([^=\s]+)(=.*)?", re.DOTALL)
_QUOTED = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", re.DOTALL)
# Characters of a word, and brackets inside of brackets: more of them are no setting.
_LONGEST, _DEEPEST = 1 << 16, 32
# What a key of such a type holds.
_SIMPLE = {int: "a whole number", float: "a number", bool: "true or false"}
_LONGEST_NAME = 200
_OPENING, _CLOSING = "[{(", "]})"


def settled(words: Sequence[str], kind: type) -> list[str]:
    """`words` of a command line for the configuration `kind` as Hydra is to read them. Options of Hydra stay.

    Raises UserError for the first word that cannot be read, with the words that can.
    """
    options = _options(words)
    return [word if place in options else _settled(words, place, kind) for place, word in enumerate(words)]


def without_options(words: Sequence[str]) -> list[str]:
    """The overrides among `words`, without Hydra's options and their values."""
    options = _options(words)
    return [word for place, word in enumerate(words) if place not in options]


def _options(words: Sequence[str]) -> set[int]:
    """Places of Hydra's options and of their values."""
    own = {place for place, word in enumerate(words) if word.startswith("-")}
    return own | {place + 1 for place in own if words[place] in _WITH_VALUE}


def values_of(kind: type, words: Sequence[str], option: str) -> dict[str, Any]:
    """The values that KEY=VALUE `words` of `option` give to keys of the dataclass `kind`. Raises UserError."""
    values = {}
    for place, word in enumerate(words):
        try:
            parsed = _parsed(_settled(words, place, kind), word)
        except UserError as error:
            raise UserError(f"{option}: {str(error).removeprefix('configuration: ')}") from None
        values[parsed.key_or_group] = parsed.value()
    return values


def quoted(text: str) -> str:
    """`text` as a quoted value of an override. Interpolations in it stay interpolations."""
    inner = re.sub(r"(\\*)'", lambda quote: quote[1] * 2 + "\\'", text)
    inner = re.sub(r"(\\+)$", lambda end: end[1] * 2, inner)
    return f"'{inner}'"


def literal(text: str) -> str:
    """`text` as a quoted value of an override that is taken as it is, also where it has ${...}."""
    return quoted(re.sub(r"(\\*)\$\{", lambda start: start[1] * 2 + "\\${", text))


def _settled(words: Sequence[str], place: int, kind: type) -> str:
    """A word with its value quoted where its key is text."""
    word = words[place]
    if len(word) > _LONGEST:
        raise UserError(
            f"configuration: {_short(word, 40)} has {len(word):,} characters: an override has at most {_LONGEST:,}."
        )
    found = _OVERRIDE.fullmatch(word)
    if removed := _REMOVAL.fullmatch(word):
        above = hint_of(kind, removed[1].rpartition(".")[0])
        if above is not None and get_origin(above.kind) is dict:
            return word
        raise UserError(
            f"configuration: {_short(word)}: keys cannot be taken away, only set: leave out what chose them, or give "
            "the key another value."
        )
    if found is None:
        raise UserError(_not_an_override(words, place, kind))
    sign, key, value = found[1] or "", found[2], found[3]
    if not sign and plus(key) != key and "." not in key:
        raise UserError(f"configuration: {key}s are added with a plus: write {plus(key)}={_short(value) or 'NAME'}.")
    if sign and re.match(r"hydra\b", key):
        raise UserError(f"configuration: {key} is of Hydra itself, which takes no keys that it does not have.")
    hint = hint_of(kind, key)
    if hint is None or is_dataclass(hint.kind):
        # What is left is a group of configs/ and the name of a file there.
        named = not value.startswith("{") and len(value) > _LONGEST_NAME
        if named or len(key) > _LONGEST_NAME:
            raise UserError(f"configuration: there is no key or file {_short(word)}; known groups are in configs/.")
    if hint is not None:
        value = _typed(value, hint)
    if (depth := _deepest(value)) > _DEEPEST and not _QUOTED.fullmatch(value):
        raise UserError(
            f"configuration: {_short(word)} has brackets inside of brackets {depth} deep: no key takes that."
        )
    made = f"{sign}{key}={value}"
    try:
        parsed = _parsed(made, word)
    except UserError:
        raise UserError(_unreadable(words, place, hint)) from None
    if parsed.is_sweep_override():
        raise UserError(
            f"configuration: {_short(word)} gives several values, and a run takes one: a list is written in brackets, "
            f"'{_short(sign + key)}=[A,B]', and a number without commas."
        )
    return made


def _parsed(made: str, word: str) -> Override:
    """Hydra's reading of an override; `word` is what was typed."""
    try:
        return OverridesParser.create().parse_override(made)
    except (HydraException, OmegaConfBaseException, ValueError, TypeError, RecursionError):
        raise UserError(f"{_short(word)} cannot be read: write KEY=VALUE.") from None


def _typed(value: str, hint: Hint) -> str:
    """A value for Hydra: quoted where the type says text."""
    stripped = value.strip()
    if hint.text:
        return _entries(stripped) if _list_like(stripped) else value
    if hint.kind is not str or _QUOTED.fullmatch(stripped) or (hint.optional and stripped == "null"):
        return value
    return quoted(stripped)


def _entries(value: str) -> str:
    """A list with its entries quoted; of an entry {path: PATH, ...} the path."""
    inner = value[1:-1]
    return f"[{','.join(_entry(part.strip()) for part in _parts(inner))}]" if inner.strip() else value


def _entry(part: str) -> str:
    if part.startswith("{") and part.endswith("}"):
        return "{" + ",".join(_field(field) for field in _parts(part[1:-1])) + "}"
    return part if _QUOTED.fullmatch(part) or not part else quoted(part)


def _field(field: str) -> str:
    key, colon, value = field.partition(":")
    if key.strip() != "path" or not colon or _QUOTED.fullmatch(value.strip()):
        return field
    return f"{key}:{quoted(value.strip())}"


def _list_like(value: str) -> bool:
    return value.startswith("[") and value.endswith("]")


def _parts(text: str) -> Iterator[str]:
    """`text` split at the commas that are in no brackets and no quotes."""
    depth, begin, quote, skip = 0, 0, "", False
    for place, character in enumerate(text):
        if skip:
            skip = False
        elif quote:
            skip = character == "\\"
            quote = "" if character == quote else quote
        elif character in "'\"" and not text[begin:place].strip():
            quote = character
        elif character in _OPENING:
            depth += 1
        elif character in _CLOSING:
            depth = max(0, depth - 1)
        elif character == "," and not depth:
            yield text[begin:place]
            begin = place + 1
    yield text[begin:]


def _deepest(value: str) -> int:
    depth = deepest = 0
    for character in value:
        depth += (character in _OPENING) - (character in _CLOSING)
        deepest = max(deepest, depth)
    return deepest


def _unreadable(words: Sequence[str], place: int, hint: Hint | None) -> str:
    """Sentence about a word KEY=VALUE whose value Hydra cannot read."""
    word = words[place]
    key, _, value = word.partition("=")
    if value.startswith("="):
        once = f"{key}={value.lstrip('=')}"
        return f"configuration: {_short(word)} has two equals signs: write {_short(once)}."
    whole = _rejoined(words, place)
    if whole is not None:
        return (
            f"configuration: {_short(word)} was cut off at a space by the shell: put quotes around the whole of it, "
            f"{_for_shell(whole)}."
        )
    if hint is not None and hint.kind in _SIMPLE:
        return f"configuration: the value of {_short(word)} is not {_SIMPLE[hint.kind]}."
    return (
        f"configuration: the value of {_short(word)} cannot be read: lists are written '{_short(key)}=[A,B]', entries "
        f"of several values '{_short(key)}=[{{KEY: VALUE, KEY: VALUE}}]', in single quotes for the shell, and text "
        f"with other characters in quotes of its own, {_short(key)}='\"TEXT\"'."
    )


def _not_an_override(words: Sequence[str], place: int, kind: type) -> str:
    """Sentence about a word that is no KEY=VALUE."""
    word = words[place]
    before = words[place - 1] if place else ""
    after = words[place + 1] if place + 1 < len(words) else ""
    name = word.lstrip("+")
    if "=" not in word and after.startswith("="):
        value = after.lstrip("=") or (words[place + 2] if place + 2 < len(words) else "VALUE")
        return f"configuration: an override has no spaces around its equals sign: write {_short(f'{word}={value}')}."
    if before.endswith("=") and "=" not in word:
        return f"configuration: a value stands right behind the equals sign: write {_short(before + word)}."
    if "=" in before and "=" not in word:
        return (
            f"configuration: {_short(word)} is no KEY=VALUE: if it belongs to the word before it, put quotes around "
            f"both, {_for_shell(f'{before} {word}')}."
        )
    if name and "=" not in name and (hint_of(kind, name) is not None or is_group(name)):
        value = after if after and "=" not in after and not after.startswith(("-", "+")) else "VALUE"
        return f"configuration: {_short(word)} has no value: write {_short(f'{plus(name)}={value}')}."
    for group in ("experiment", "suite"):
        if name in _files(group):
            return f"configuration: {_short(word)} is no KEY=VALUE: write +{group}={name}."
    if ":" in name and "=" not in name:
        key, _, value = name.partition(":")
        if hint_of(kind, key) is not None:
            meant = f"{key}={value.strip()}"
            return f"configuration: {_short(word)} has a colon for an equals sign: write {_short(meant)}."
    if "=" in name and not name.startswith("=") and _QUOTED.fullmatch(name):
        return f"configuration: {_short(word)} has quotes that are meant for the shell: write {_short(name[1:-1])}."
    near = nearest(name.partition("=")[0], kind)
    hint = f"; did you mean {near}?" if near else ": model.layers=2, +experiment=demo_sep."
    return f"configuration: {_short(word)} cannot be read: overrides are written KEY=VALUE, quoted for the shell{hint}"


def option_advice(words: Sequence[str], place: int, kind: type) -> str:
    """The override that a word with dashes in front seems to mean, as "write KEY=VALUE", or nothing."""
    name, equals, value = words[place].lstrip("-").replace("-", "_").partition("=")
    after = words[place + 1] if place + 1 < len(words) else ""
    if equals:
        value = words[place].partition("=")[2]
    else:
        value = after if after and not after.startswith(("-", "+")) and "=" not in after else "VALUE"
    if is_group(name):
        return f"write {plus(name)}={_short(value)}"
    known = [key.name for key in keys_of(kind)]
    same = [key for key in known if key == name or key.endswith(f".{name}")]
    near = same[0] if same else nearest(name, kind)
    return f"write {near}={_short(value)}" if near else ""


def plus(group: str) -> str:
    """A key as it is typed: experiments and suites are added with a plus."""
    return f"+{group}" if group in ("experiment", "suite") else group


def is_group(name: str) -> bool:
    """True for a group of configs/."""
    return re.fullmatch(r"\w{1,40}", name) is not None and (config_folder() / name).is_dir()


def _files(group: str) -> list[str]:
    return [path.stem for path in (config_folder() / group).glob("*.yaml")]


def _rejoined(words: Sequence[str], place: int) -> str | None:
    """The word and those after it up to the bracket that closes its last one; None where none is open."""
    word = words[place]
    for end in range(place + 1, min(len(words), place + 64) + 1):
        whole = " ".join(words[place:end])
        if _balance(whole) == 0:
            return whole if end > place + 1 else None
    return f"{word}{']' * max(0, _balance(word))}" if _balance(word) > 0 else None


def _balance(text: str) -> int:
    return sum((character in _OPENING) - (character in _CLOSING) for character in text)


def _for_shell(word: str) -> str:
    """A word in quotes for the shell."""
    quote = '"' if "'" in word else "'"
    return f"{quote}{_short(word, 200)}{quote}"


def _short(text: str, most: int = 80) -> str:
    """At most so many characters, on one line."""
    line = masked(" ".join(text.split()))
    return line if len(line) <= most else f"{line[: most - 3]}..."
