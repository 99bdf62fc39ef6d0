"""The paper's tasks: their data from the hub, or from local files in the form of lm-evaluation-harness's own tasks.

A local file is rewritten record by record to the fields that the harness's task reads; prompts, targets and metrics are
those of the task's own YAML file, which the definition made here includes.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from sepllm_train.base.errors import UserError, first_line
from sepllm_train.base.files import hash_file
from sepllm_train.base.parsing import read_json_lines
from sepllm_train.evaluation.needles import KINDS
from sepllm_train.evaluation.options import NeedleOptions, nearest

if TYPE_CHECKING:
    from sepllm_train.evaluation.harness import SeparatorLM

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
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Loaded:
    """A task of the harness, ready to be evaluated. `harness` is its name there; `tasks` is what
    lm_eval.evaluator.evaluate takes; `data` says where the documents are from, `split` which of them are evaluated."""

    name: str
    harness: str
    tasks: Any
    shots: int
    data: dict[str, Any]

    @property
    def split(self) -> str:
        """The split of the documents that are evaluated."""
        task = next(iter(self.tasks["tasks"].values()))
        return task.config.test_split or task.config.validation_split


def check_names(names: Iterable[str]) -> None:
    """Raise UserError for a task that is not among the paper's."""
    known = (*TASKS, *KINDS)
    for name in names:
        if name not in known:
            raise UserError(f"the task {name!r} is unknown: choose from {', '.join(known)}{nearest(name, known)}.")


@contextmanager
def load_tasks(
    names: Sequence[str],
    data_dir: Path | None,
    shots: int | None,
    lm: SeparatorLM | None = None,
    needles: NeedleOptions | None = None,
) -> Iterator[list[Loaded]]:
    """The tasks, from the hub where `data_dir` is None; what is made of local files is removed at the end.

    shots: examples in each prompt, None for the task's own number. lm: whose tokenizer and context needles are made
    for. Raises UserError for an unknown task, files that are missing or not in their form, and data that the hub does
    not give.
    """
    import datasets

    datasets.disable_progress_bars()
    check_names(names)
    with tempfile.TemporaryDirectory(prefix="sepllm_evaluation_") as made:
        yield [
            _load_needles(name, lm, needles or NeedleOptions())
            if name in KINDS
            else _load(name, data_dir, Path(made) / name, shots)
            for name in names
        ]


def _load_needles(name: str, lm: SeparatorLM | None, options: NeedleOptions) -> Loaded:
    from sepllm_train.evaluation.needle_tasks import needle_task

    assert lm is not None, "needles are made for a tokenizer and a context"

    def haystack() -> str:
        if options.haystack is None:
            raise UserError(f"{name} hides its needles in a text: give one with --haystack FILE.")
        return read_text(options.haystack)

    task, data = needle_task(name, lm.tok_encode, lm.max_length, options, haystack)
    return Loaded(name, name, {"tasks": {name: task}, "groups": {}, "group_map": {}}, 0, data)


def _load(name: str, data_dir: Path | None, folder: Path, shots: int | None) -> Loaded:
    import datasets
    from lm_eval.tasks import TaskManager

    task = TASKS[name]
    if data_dir is None:
        place = _harness_tasks() / task.definition
        manager = TaskManager(include_path=str(place if place.is_dir() else place.parent), include_defaults=False)
        data: dict[str, Any] = {"source": "hub"}
    else:
        data = _write_definition(name, data_dir, folder)
        manager = TaskManager(include_path=str(folder), include_defaults=False)
    try:
        tasks = manager.load([task.harness])
    except (OSError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"the data of {name} cannot be loaded ({first_line(error)}): give local files with --data-dir, or see that "
            "the Hugging Face hub can be reached."
        ) from None
    wanted = task.shots if shots is None else shots
    for one in tasks["tasks"].values():
        used = wanted if wanted is not None else one.config.num_fewshot or 0
        pool = len(one.sampler.df) - (one.config.fewshot_config.split == one.config.test_split)
        if used > pool:
            raise UserError(f"{name} has {pool} examples to show and --num-fewshot asks for {used}.")
        one.set_config(key="num_fewshot", value=used)
    return Loaded(name, task.harness, tasks, used, data)


def _harness_tasks() -> Path:
    import lm_eval.tasks

    return Path(lm_eval.tasks.__file__).parent


def _write_definition(name: str, data_dir: Path, folder: Path) -> dict[str, Any]:
    """Write the records and a YAML definition of a task to `folder`; gives where the data is from."""
    task = TASKS[name]
    found = local_files(name, data_dir)
    assert task.convert is not None
    folder.mkdir()
    files = {}
    for split, path in found.items():
        files[split] = str(folder / f"{split}.jsonl")
        lines = [json.dumps(record) for record in read_records(path, task.fields, task.convert)]
        Path(files[split]).write_text("\n".join(lines) + "\n", encoding="utf8")
    definition = {
        "include": str(_harness_tasks() / task.definition),
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


def local_files(name: str, data_dir: Path) -> dict[str, Path]:
    """The files of a task by split, in `data_dir` or its folder eval. Raises UserError when none is to be evaluated."""
    if name in KINDS:
        return {}
    task = TASKS[name]
    if task.convert is None:
        raise UserError(
            f"{name} has no form for local files: leave --data-dir out to take it from the Hugging Face hub."
        )
    if not data_dir.is_dir():
        raise UserError(f"--data-dir {data_dir} is not a folder.")
    places = {split: [data_dir / path, data_dir / "eval" / path] for split, path in task.files.items()}
    found = {split: place for split, both in places.items() for place in both[::-1] if place.is_file()}
    if not any(split in found for split in EVALUATED):
        wanted = " or ".join(str(places[split][0]) for split in EVALUATED if split in places)
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
