"""Names of lm-evaluation-harness's tasks, groups and tags and of their data sets, read from its YAML files without
importing it; and where local files of a data set are looked for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from sepllm_train.base.errors import UserError

# Keys of a definition, each at the beginning of its line; a list may follow.
_KEYS = b"task|group|class|tag|include|dataset_path|dataset_name|unsafe_code|doc_to_image|doc_to_audio"
_KEY = re.compile(rb"^[\"']?(" + _KEYS + rb")[\"']?:[ \t]*([^\n]*)\n?((?:[ \t]*-[^\n]*\n?)*)", re.MULTILINE)
# Files of a split, by its name.
SUFFIXES = (".jsonl", ".parquet")


def harness_tasks() -> Path | None:
    """The folder of the harness's definitions; None where it is not installed."""
    spec = find_spec("lm_eval")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / "tasks"


@cache
def definitions() -> dict[str, tuple[Path, ...]]:
    """The YAML file of each task and group, and those of the tasks of each tag, by name; empty without the harness.

    It has some 14,000 files, which takes about a second.
    """
    folder = harness_tasks()
    found: dict[str, tuple[Path, ...]] = {}
    tags: dict[str, tuple[Path, ...]] = {}
    for path in sorted(folder.rglob("*.yaml")) if folder is not None else ():
        keys = scalars(path)
        named = keys.get("group") or keys.get("task")
        if not named:
            continue
        found.setdefault(named[0], (path,))
        for tag in keys.get("tag", ()) if "group" not in keys else ():
            tags[tag] = (*tags.get(tag, ()), path)
    return tags | found


@cache
def scalars(path: Path) -> dict[str, list[str]]:
    """Texts of the keys of a definition that are read here, of what it includes too; a list has several."""
    own: dict[str, list[str]] = {}
    for key, value, listed in _KEY.findall(path.read_bytes()):
        # A list under `task` names the members of a group.
        texts = [value] if value.strip() or key == b"task" else [line.strip()[1:] for line in listed.splitlines()]
        own[key.decode()] = [text for one in texts if (text := _text(one.decode()))]
    found: dict[str, list[str]] = {}
    for included in own.pop("include", ()):
        place = path.parent / included
        if place.is_file():
            found |= scalars(place)
    merged = found | own
    if "class" in merged:
        # To the harness it is a task, whatever group it names.
        merged.pop("group", None)
    return merged


def needed(name: str) -> dict[str, Path]:
    """The definitions of a task, or of all tasks and groups that a group or a tag stands for, by name."""
    found: dict[str, Path] = {}
    ahead = [name]
    while ahead:
        for path in definitions().get(ahead.pop(), ()):
            keys = scalars(path)
            own = (keys.get("group") or keys["task"])[0]
            if own not in found and "group" in keys:
                ahead += _members(yaml.load(path.read_bytes(), _Definition).get("task"))
            found[own] = path
    return found


def refuse(name: str) -> None:
    """Raise UserError for a name whose tasks cannot be evaluated here."""
    for task, path in needed(name).items():
        keys = scalars(path)
        part = "" if task == name else f" of {name}"
        if keys.get("unsafe_code", ["false"]) != ["false"]:
            raise UserError(f"the task {task}{part} runs code that the model writes, which is not done here.")
        if "doc_to_image" in keys or "doc_to_audio" in keys:
            raise UserError(f"the task {task}{part} shows images or sounds, which no model here takes.")
        if "llm_judge" in task:
            raise UserError(f"the task {task}{part} is judged by another language model, which is not called here.")


def data_sets(name: str) -> dict[str, tuple[str, str | None]]:
    """Name and configuration on the hub of the data set of each task that a name stands for; without those that their
    definitions do not name."""
    found: dict[str, tuple[str, str | None]] = {}
    for task, path in needed(name).items():
        keys = scalars(path)
        configuration = keys.get("dataset_name")
        if keys.get("dataset_path") and "group" not in keys:
            named = configuration is not None and configuration not in ([], ["null"])
            found[task] = keys["dataset_path"][0], configuration[0] if configuration and named else None
    return found


def data_folder(data_dir: Path, path: str, configuration: str | None) -> Path | None:
    """The folder with local files of a data set: PATH/CONFIGURATION in `data_dir`, whose slashes may be double
    underscores, or a copy of its repository on the hub, which has a README.md, as PATH. None where there is none."""
    for root in (data_dir / path, data_dir / path.replace("/", "__")):
        folder = root / configuration if configuration not in (None, "default") else root
        if (root / "README.md").is_file():
            return root
        if folder.is_dir():
            return folder
    return None


def wanted(data_dir: Path, path: str, configuration: str | None) -> str:
    """The files of a data set that are looked for, in words."""
    folder = data_dir / path / (configuration or "")
    return f"{folder}/SPLIT{' or '.join(SUFFIXES)} (SPLIT: train, validation, test), in the fields of {path} on the hub"


class _Definition(yaml.SafeLoader):
    """YAML in which functions are named."""


_Definition.add_multi_constructor("!", lambda loader, suffix, node: None)


def _members(listed: Any) -> Iterator[str]:
    """The names in the list of a group's members; an entry may be a group of its own or change a task's settings."""
    for entry in listed if isinstance(listed, list) else ():
        if isinstance(entry, str):
            yield entry
        elif isinstance(entry, dict):
            yield from (one for one in (entry.get("task"), entry.get("group")) if isinstance(one, str))
            yield from _members(entry.get("task"))


def _text(text: str) -> str:
    return re.sub(r"\s+#.*$", "", text).strip().strip("\"'")
