"""Tasks of lm-evaluation-harness by name, with data from the hub or from local files, and needles that are made.

The paper's tasks have a local form of their own: a file is rewritten record by record to the fields that the harness's
task reads; prompts, targets and metrics are those of the task's own YAML file, which the definition made here includes.
All tasks have the general one of local_data.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from sepllm_train.base.errors import UserError, first_line
from sepllm_train.base.files import hash_file
from sepllm_train.base.parsing import read_json_lines
from sepllm_train.evaluation.catalogue import data_folder, data_sets, definitions, harness_tasks, refuse, wanted
from sepllm_train.evaluation.needles import KINDS

Record = dict[str, Any]
# What each field of a record must be; `list` stands for a list of strings.
Fields = Mapping[str, type]
_KINDS = {str: "a string", int: "an integer", list: "a list of strings"}
# In the order in which the harness looks for one to evaluate on.
EVALUATED = ("test", "validation")


@dataclass(frozen=True)
class EvalTask:
    """A task.

    Attributes:
        harness: its name in lm-evaluation-harness.
        definition: its YAML file, or the folder of a group's, below lm_eval/tasks.
        convert: from a record of a local file to the harness's fields; None where there is no local form.
        fields: what a record of a local file must have, and of what type.
        files: path below the data folder, by split.
        shots: examples in a prompt unless others are asked for; None for the harness's choice.
    """

    harness: str
    definition: str
    convert: Callable[[Record], Record] | None = None
    fields: Fields = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    shots: int | None = None


def _arc(record: Record) -> Record:
    labels = "ABCDEFGH"
    choices, answer = _choices(record, 2, len(labels))
    return {
        "question": record["question"],
        "choices": {"text": choices, "label": list(labels[: len(choices)])},
        "answerKey": labels[answer],
    }


def _openbookqa(record: Record) -> Record:
    made = _arc(record)
    return {"question_stem": made.pop("question"), **made}


def _piqa(record: Record) -> Record:
    (first, second), answer = _choices(record, 2, 2)
    return {"goal": record["question"], "sol1": first, "sol2": second, "label": answer}


def _logiqa(record: Record) -> Record:
    labels = "abcd"
    choices, answer = _choices(record, 2, len(labels))
    return {
        "context": record["context"],
        "question": record["question"],
        "options": choices,
        "label": labels[answer],
    }


def _choices(record: Record, least: int, most: int) -> tuple[list[str], int]:
    """The choices and the number of the right one. Raises ValueError."""
    choices, answer = record["choices"], record["answer"]
    if not least <= len(choices) <= most:
        wanted = most if least == most else f"{least} to {most}"
        raise ValueError(f"it has {len(choices)} choices and needs {wanted}")
    if answer not in range(len(choices)):
        raise ValueError(f"answer {answer} is not the number of one of the choices, from 0")
    return choices, answer


def same(record: Record) -> Record:
    """The record as it is."""
    return record


_CHOICE: Fields = {"question": str, "choices": list, "answer": int}
TASKS = {
    "arc_challenge": EvalTask(
        "arc_challenge", "arc/arc_challenge.yaml", _arc, _CHOICE,
        {"train": "arc/arc_challenge_train.jsonl", "test": "arc/arc_challenge_test.jsonl"},
    ),
    "arc_easy": EvalTask(
        "arc_easy", "arc/arc_easy.yaml", _arc, _CHOICE,
        {"train": "arc/arc_easy_train.jsonl", "test": "arc/arc_easy_test.jsonl"},
    ),
    "lambada": EvalTask(
        "lambada_openai", "lambada/lambada_openai.yaml", same, {"text": str}, {"test": "lambada_openai_test.jsonl"}
    ),
    "logiqa": EvalTask(
        "logiqa", "logiqa/logiqa.yaml", _logiqa, {"context": str, **_CHOICE},
        {"train": "logiqa/train.jsonl", "validation": "logiqa/eval.jsonl", "test": "logiqa/test.jsonl"},
    ),
    "piqa": EvalTask(
        "piqa", "piqa/piqa.yaml", _piqa, _CHOICE, {"train": "piqa_train.jsonl", "validation": "piqa_validation.jsonl"}
    ),
    "sciq": EvalTask("sciq", "sciq/sciq.yaml"),
    "wikitext": EvalTask(
        "wikitext", "wikitext/wikitext.yaml", same, {"page": str},
        {"validation": "wikitext2/valid.txt", "test": "wikitext2/test.txt"},
    ),
    "gsm8k_cot": EvalTask(
        "gsm8k_cot", "gsm8k/gsm8k-cot.yaml", same, {"question": str, "answer": str}, {"test": "gsm8k/test.jsonl"}
    ),
    "mmlu": EvalTask("mmlu", "mmlu/default", shots=5),
    "openbookqa": EvalTask(
        "openbookqa", "openbookqa/openbookqa.yaml", _openbookqa, _CHOICE,
        {"train": "openbookqa_train.jsonl", "test": "openbookqa_test.jsonl"},
    ),
}  # fmt: skip


def check_names(names: Iterable[str]) -> None:
    """Raise UserError for a name that neither the tasks here nor lm-evaluation-harness have, and for a task that cannot
    be evaluated here. Imports nothing large."""
    for name in names:
        if name in TASKS or name in KINDS:
            continue
        if name in definitions():
            refuse(name)
            continue
        known = {**TASKS, **KINDS, **definitions()}
        near = get_close_matches(name, known, 3) or get_close_matches(name, known, 1, cutoff=0)
        raise UserError(
            f"the task {name!r} is unknown: choose from {', '.join((*TASKS, *KINDS))}, or any of "
            f"lm-evaluation-harness; nearest: {', '.join(near)}."
        )


def check_data(names: Iterable[str], data_dir: Path) -> None:
    """Raise UserError for a task without its files in `data_dir`, as far as definitions name their data sets."""
    if not data_dir.is_dir():
        raise UserError(f"--data-dir {data_dir} is not a folder.")
    for name in names:
        if name in KINDS or own_files(name, data_dir):
            continue
        sets = data_sets(TASKS[name].harness if name in TASKS else name)
        missing = [(task, found) for task, found in sets.items() if data_folder(data_dir, *found) is None]
        if name in TASKS and TASKS[name].files and (missing or not sets):
            local_files(name, data_dir)
        for task, found in missing:
            raise UserError(f"{task} needs {wanted(data_dir, *found)}, and the folder is not there.")


def write_definition(name: str, data_dir: Path, folder: Path) -> dict[str, Any]:
    """Write the records and a YAML definition of a task to `folder`; gives where the data is from."""
    task = TASKS[name]
    found = local_files(name, data_dir)
    assert task.convert is not None
    files = {}
    for split, path in found.items():
        files[split] = str(folder / f"{split}.jsonl")
        lines = [json.dumps(record) for record in read_records(path, task.fields, task.convert)]
        Path(files[split]).write_text("\n".join(lines) + "\n", encoding="utf8")
    definition = {
        "include": str(definition_of(task)),
        "task": task.harness,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files, "cache_dir": str(folder / "cache")},
        "training_split": "train" if "train" in found else None,
        "validation_split": "validation" if "validation" in found else None,
        "test_split": "test" if "test" in found else None,
    }
    (folder / "task.yaml").write_text(yaml.safe_dump(definition), encoding="utf8")
    return {
        "source": str(data_dir),
        "files": {split: {"path": str(path), "sha256": hash_file(path).sha256} for split, path in found.items()},
    }


def definition_of(task: EvalTask) -> Path:
    """The harness's own definition of a task."""
    folder = harness_tasks()
    assert folder is not None
    return folder / task.definition


def own_files(name: str, data_dir: Path) -> dict[str, Path]:
    """The files of a task in a form of its own by split, in `data_dir` or its folder eval; {} when none is to be
    evaluated."""
    files = TASKS[name].files if name in TASKS else {}
    places = {split: [data_dir / path, data_dir / "eval" / path] for split, path in files.items()}
    found = {split: place for split, both in places.items() for place in both[::-1] if place.is_file()}
    return found if any(split in found for split in EVALUATED) else {}


def local_files(name: str, data_dir: Path) -> dict[str, Path]:
    """`own_files`; raises UserError when there are none."""
    if not data_dir.is_dir():
        raise UserError(f"--data-dir {data_dir} is not a folder.")
    found = own_files(name, data_dir)
    if not found:
        files = TASKS[name].files
        wanted = " or ".join(str(data_dir / files[split]) for split in EVALUATED if split in files)
        raise UserError(f"{name} needs {wanted}, and it is not there.")
    return found


def read_records(path: Path, fields: Fields, convert: Callable[[Record], Record]) -> list[Record]:
    """The records of a local file, which must have `fields`, converted. Raises UserError for a line that is not so."""
    if path.suffix == ".txt":
        return [{"page": page} for page in articles(read_text(path))]
    records = []
    for number, record in read_json_lines(path, f"a record of its task has {', '.join(fields)}"):
        try:
            _check_fields(record, fields)
            # What else there is may be of another type in every line.
            records.append(convert({key: record[key] for key in fields}))
        except ValueError as error:
            raise UserError(f"line {number} of {path} is not a record of its task: {first_line(error)}.") from None
    if not records:
        raise UserError(f"{path} is empty.")
    return records


def read_text(path: Path) -> str:
    """The text of a file. Raises UserError where there is none."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}).") from None
    if not text.strip():
        raise UserError(f"{path} is empty.")
    return text


def _check_fields(record: Record, fields: Fields) -> None:
    """Raise ValueError unless a record has `fields`, each of its type."""
    for key, kind in fields.items():
        if key not in record:
            raise ValueError(f"it has no {key!r} and needs {', '.join(fields)}")
        # type() since a bool is an int to isinstance().
        if type(record[key]) is not kind or (kind is list and not all(isinstance(one, str) for one in record[key])):
            raise ValueError(f"its {key!r} must be {_KINDS[kind]}")


def articles(text: str) -> list[str]:
    """The articles of a WikiText file, each from its title (` = Title = `) on; the whole text where there is none."""
    starts = [match.start() for match in re.finditer(r"^ = [^=](?:.*[^=])? = $", text, re.MULTILINE)]
    bounds = [0, *starts[1:], len(text)] if starts else [0, len(text)]
    return [text[start:end] for start, end in pairwise(bounds)]
