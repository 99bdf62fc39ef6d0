"""JSON and YAML that users or other programs may have written.

What is read has a bounded size, depth and range of numbers. Everything else raises UserError with one sentence: the
place, what is wrong, and `remedy`, which ends it.
"""

from __future__ import annotations

import json
import math
import re
import stat
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import yaml

from sepllm_train.base.errors import UserError, first_line

# Larger than any file of its kind that is read whole; a larger one is another file by mistake.
LARGEST_JSON = 1 << 28
LARGEST_YAML = 1 << 20
# Objects inside of objects: no file that this project reads has ten.
DEEPEST = 64
# Whole numbers fit 64 bits: larger ones cannot become tensors, times or counts.
_WIDEST_INTEGER = 1 << 64
# Above every FLOP that a run may count, which 64 bits do not hold.
WIDEST_COUNT = 10**40
# Half of a character that is written as two can be in no name of a file, and cannot be printed.
_MAYBE_HALF = re.compile(r"\\u[dD][89a-fA-F]")
# Without one of these no number in a text is out of range.
_MAYBE_OUT_OF_RANGE = re.compile(r"\d{19}|[eE]\+?\d{3}")


def parse_json(
    text: str | bytes, where: str | Path, remedy: str, *, nan: bool = False, widest: int = _WIDEST_INTEGER
) -> Any:
    """The value that a JSON text holds. where: names the text, as in "tasks.jsonl line 3". A byte order mark is passed
    over. nan: accept NaN and infinities, which are not JSON but which Python writes. widest: whole numbers from here on
    are refused."""
    try:
        if isinstance(text, bytes):
            text = text.decode("utf8")
        text = text.removeprefix("\ufeff")
        bounded: dict[str, Any] = {}
        if _MAYBE_OUT_OF_RANGE.search(text):
            bounded = {
                "parse_int": partial(_whole_number, widest=widest),
                "parse_float": float if nan else _finite_number,
            }
        value = json.loads(text, parse_constant=None if nan else _refuse_constant, **bounded)
        _check_depth(value)
        if _MAYBE_HALF.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON (line {error.lineno}: {error.msg}): {remedy}.") from None
    except (UnicodeError, _OutOfRange, RecursionError) as error:
        raise _refusal(error, where, "JSON", remedy) from None
    return value


def parse_json_object(
    text: str | bytes, where: str | Path, remedy: str, *, nan: bool = False, widest: int = _WIDEST_INTEGER
) -> dict[str, Any]:
    """The JSON object that a text holds, as `parse_json`."""
    content = parse_json(text, where, remedy, nan=nan, widest=widest)
    if not isinstance(content, dict):
        raise UserError(f"{where} does not hold a JSON object: {remedy}.")
    return content


def read_json(path: Path, remedy: str, *, nan: bool = False) -> dict[str, Any]:
    """The JSON object in a file."""
    return parse_json_object(read_bytes(path, remedy), path, remedy, nan=nan)


def read_json_if_any(path: Path) -> dict[str, Any]:
    """The JSON object in a file, empty where there is none that can be read."""
    try:
        return read_json(path, "", nan=True)
    except UserError:
        return {}


def read_json_lines(path: Path, remedy: str, *, nan: bool = False) -> Iterator[tuple[int, dict[str, Any]]]:
    """The JSON objects in a file of one per line, with the numbers of their lines from 1; blank lines are
    passed over."""
    content = read_bytes(path, remedy)
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if line.strip():
            yield number, parse_json_object(line, f"{path} line {number}", remedy, nan=nan)


def read_yaml(path: Path, remedy: str) -> dict[str, Any]:
    """The mapping in a YAML file that was stored: no interpolation, no aliases, no dates; 1e-3 is a number."""
    return parse_yaml(read_bytes(path, remedy, LARGEST_YAML, "YAML"), path, remedy)


def read_yaml_texts(path: Path, remedy: str) -> dict[str, Any]:
    """The mapping in a YAML file as `read_yaml`, with every scalar as the text that is typed there."""
    return parse_yaml(read_bytes(path, remedy, LARGEST_YAML, "YAML"), path, remedy, _StoredYamlTexts)


def parse_yaml(
    text: str | bytes, where: str | Path, remedy: str, loader: type[yaml.SafeLoader] | None = None
) -> dict[str, Any]:
    """The mapping in a YAML text, as `read_yaml`."""
    try:
        # The text given as such: PyYAML would guess at the encoding of bytes.
        content = yaml.load(text.decode("utf-8-sig") if isinstance(text, bytes) else text, loader or _StoredYaml)
        _check_depth(content)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}: " if mark else ""
        raise UserError(f"{where} is not YAML ({line}{error.problem}): {remedy}.") from None
    except yaml.YAMLError as error:
        raise UserError(f"{where} is not YAML ({first_line(error)}): {remedy}.") from None
    except (UnicodeError, _OutOfRange, RecursionError) as error:
        raise _refusal(error, where, "YAML", remedy) from None
    if not isinstance(content, dict):
        raise UserError(f"{where} does not hold a YAML mapping: {remedy}.")
    return content


def _refusal(error: Exception, where: str | Path, kind: str, remedy: str) -> UserError:
    """The sentence on a text that is of its language but beyond the bounds, or no text."""
    if isinstance(error, UnicodeDecodeError):
        return UserError(f"{where} is not UTF-8 text: {remedy}.")
    if isinstance(error, UnicodeEncodeError):
        reason = "half of a character"
    else:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
    return UserError(f"{where} is not {kind} of this kind ({reason}): {remedy}.")


class _OutOfRange(Exception):
    """A value beyond the bounds."""


class _StoredYaml(yaml.SafeLoader):
    """YAML as OmegaConf writes it."""

    # Without dates, which are text here, and with numbers like 1e-3, which PyYAML takes for text.
    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":timestamp", ":float", ":int"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "an alias, which stored files do not have", mark)
        return super().compose_node(parent, index)

    def construct_number(self, node: Any) -> int | float:
        text = node.value.replace("_", "")
        if re.fullmatch(r"[-+]?\d+", text):
            return _whole_number(text)
        return float(re.sub(r"\.(?=inf|nan)", "", text, flags=re.IGNORECASE))


_StoredYaml.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d[\d_]*(\.[\d_]*)?|\.\d[\d_]*)([eE][-+]?\d+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"),
    list("-+0123456789."),
)
_StoredYaml.add_constructor("tag:yaml.org,2002:float", _StoredYaml.construct_number)
_StoredYaml.add_constructor("tag:yaml.org,2002:int", _StoredYaml.construct_number)


class _StoredYamlTexts(_StoredYaml):
    """The same with text for every scalar."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}


def read_bytes(path: Path, remedy: str, largest: int | None = None, kind: str = "JSON") -> bytes:
    """The bytes of a plain file of at most `largest` (default: LARGEST_JSON)."""
    largest = LARGEST_JSON if largest is None else largest
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path} is not a plain file: {remedy}.")
        if status.st_size > largest:
            raise UserError(f"{path} has {status.st_size:,} bytes, too many for a {kind} file of this kind: {remedy}.")
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: {remedy}.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): {remedy}.") from None


def _whole_number(text: str, widest: int = _WIDEST_INTEGER) -> int:
    # Python's own limit is 4,300 digits, whose conversion takes its time.
    if len(text) > 64 or not -widest < (value := int(text)) < widest:
        raise _OutOfRange(f"a number of {len(text)} digits")
    return value


def _finite_number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _OutOfRange(f"the number {text[:20]}, beyond the range of floats")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise _OutOfRange(f"{name}, which is not a number of JSON")


def _check_depth(value: Any) -> None:
    """Raise _OutOfRange for containers nested deeper than DEEPEST."""
    level = [value]
    for _ in range(DEEPEST):
        level = [inner for outer in level for inner in _containers(outer)]
        if not level:
            return
    raise _OutOfRange("nested too deeply")


def _containers(value: Any) -> list[Any]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [one for one in inner if isinstance(one, dict | list)]
