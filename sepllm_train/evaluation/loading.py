"""Tasks ready to be evaluated by lm-evaluation-harness: with their data, and examples to be shown."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from sepllm_train.base.errors import UserError, first_line
from sepllm_train.evaluation.catalogue import needed
from sepllm_train.evaluation.needles import KINDS
from sepllm_train.evaluation.options import NeedleOptions
from sepllm_train.evaluation.tasks import (
    TASKS,
    EvalTask,
    check_data,
    check_names,
    definition_of,
    own_files,
    read_text,
    write_definition,
)

if TYPE_CHECKING:
    from sepllm_train.evaluation.harness import SeparatorLM


# What the harness's tasks raise for records that do not have what they read.
RECORD_ERRORS = (LookupError, TypeError, AttributeError, ValueError, TemplateError)


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
        """The split of the documents that are evaluated, of the first task of a group."""
        task = next(iter(self.tasks["tasks"].values()))
        own = task.config.test_split if task.has_test_docs() else task.config.validation_split
        return own or ("test" if task.has_test_docs() else "validation")


@contextmanager
def load_tasks(
    names: Sequence[str],
    data_dir: Path | None,
    shots: int | None,
    lm: SeparatorLM | None = None,
    needles: NeedleOptions | None = None,
) -> Iterator[list[Loaded]]:
    """The tasks, from the hub where `data_dir` is None; what is made of local files is removed at the end. A tag, or a
    group that has no score of its own, becomes the tasks that it stands for.

    shots: examples in each prompt, None for the task's own number. lm: whose tokenizer and context needles are made
    for. Raises UserError for an unknown task, one that cannot be evaluated here, files that are missing or not in their
    form, and data that the hub does not give.
    """
    import datasets

    datasets.disable_progress_bars()
    check_names(names)
    if data_dir is not None:
        check_data(names, data_dir)
    with tempfile.TemporaryDirectory(prefix="sepllm_evaluation_") as made:
        found: list[Loaded] = []
        for number, name in enumerate(names):
            folder = Path(made) / str(number)
            folder.mkdir()
            if name in KINDS:
                found.append(_load_needles(name, data_dir, folder, lm, needles or NeedleOptions()))
            else:
                found += _load(name, data_dir, folder, shots)
        twice = [one.name for one in found if [other.name for other in found].count(one.name) > 1]
        if twice:
            raise UserError(f"--tasks names {twice[0]} twice, once as a part of a tag or a group.")
        yield found


def _load_needles(
    name: str, data_dir: Path | None, folder: Path, lm: SeparatorLM | None, options: NeedleOptions
) -> Loaded:
    from sepllm_train.evaluation.local_data import data_of
    from sepllm_train.evaluation.needle_tasks import essays, needle_task

    assert lm is not None, "needles are made for a tokenizer and a context"

    def haystack() -> str:
        if options.haystack is not None:
            return read_text(options.haystack)
        try:
            with data_of(name, data_dir, folder):
                return essays()
        except UserError:
            raise UserError(
                f"{name} hides its needles in a text: give one with --haystack FILE, or see that the Hugging Face hub, "
                "which has RULER's essays, can be reached."
            ) from None

    task, data = needle_task(name, lm.tok_encode, lm.max_length, options, haystack)
    return Loaded(name, name, {"tasks": {name: task}}, 0, data)


def _load(name: str, data_dir: Path | None, folder: Path, shots: int | None) -> list[Loaded]:
    from lm_eval.tasks import TaskManager

    from sepllm_train.evaluation.local_data import data_of

    task = TASKS.get(name) or EvalTask(name, "")
    data: dict[str, Any] = {"source": "hub" if data_dir is None else str(data_dir)}
    if data_dir is not None and own_files(name, data_dir):
        data, data_dir, place = write_definition(name, data_dir, folder), None, str(folder)
    elif task.definition:
        path = definition_of(task)
        place = str(path if path.is_dir() else path.parent)
    else:
        # Not all of the harness's folder, which takes long. Of several folders a tag would have the last one's tasks.
        place = os.path.commonpath([path.parent for path in needed(name).values()])
    manager = TaskManager(include_path=place, include_defaults=False)
    try:
        with data_of(name, data_dir, folder / "cache") as files:
            loaded = manager.load([task.harness])
    except UserError:
        raise
    except IndexError:
        raise UserError(
            f"{name} has no documents in the split that it is evaluated on, or one whose label is none of its choices: "
            f"see {data['source']}."
        ) from None
    except (ImportError, OSError, RuntimeError, *RECORD_ERRORS) as error:
        raise UserError(f"the task {name} cannot be loaded ({type(error).__name__}: {first_line(error)}).") from None
    data |= {"files": files} if files else {}
    for one in loaded["tasks"].values():
        _set_shots(name, one, task.shots if shots is None else shots)
    groups = loaded["groups"]
    roots = [groups[task.harness]] if task.harness in groups else loaded["tasks"].values()
    parts = {harness: part for root in roots for harness, part in _scored(root).items()}
    return [
        Loaded(
            name if harness == task.harness else harness,
            harness,
            part,
            max(one.config.num_fewshot for one in part["tasks"].values()),
            data,
        )
        for harness, part in parts.items()
    ]


def _set_shots(name: str, task: Any, wanted: int | None) -> None:
    """Set the number of examples of a task; one whose own number is 0 keeps it, as in the harness."""
    own = task.config.num_fewshot
    used = own or 0 if wanted is None or own == 0 else wanted
    evaluated = task.config.test_split if task.has_test_docs() else task.config.validation_split
    how = task.config.fewshot_config
    # Of the documents that are evaluated the one that is asked is not shown.
    asked = how.split == evaluated if how.split else how.samples is None and not task.has_training_docs()
    pool = max(0, len(task.sampler.df) - asked)
    if used > pool:
        raise UserError(f"{name} has {pool} examples to show and --num-fewshot asks for {used}.")
    task.set_config(key="num_fewshot", value=used)


def _scored(part: Any) -> dict[str, dict[str, Any]]:
    """Input of the harness's evaluation by the name of the score: a task, a group that has a score, or the parts of a
    group without one."""
    from lm_eval.api.group import Group

    if not isinstance(part, Group):
        return {part.task_name: {"tasks": {part.task_name: part}}}
    if part.has_aggregation:
        groups = {one.name: one for one in (part, *part.get_all_groups())}
        return {part.name: {"tasks": {one.task_name: one for one in part.get_all_tasks()}, "groups": groups}}
    return {name: found for child in part for name, found in _scored(child).items()}
