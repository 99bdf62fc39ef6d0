"""Data sets of lm-evaluation-harness's tasks from local files in the hub's own fields, or from the hub itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import datasets

from sepllm_train.base.errors import UserError, first_line
from sepllm_train.base.files import hash_file
from sepllm_train.base.parsing import read_json_lines
from sepllm_train.evaluation.catalogue import SUFFIXES, data_folder, wanted


class Splits(datasets.DatasetDict):
    """Local files of a data set by split. A split that has no file is empty: examples may be drawn from it, and a task
    that is evaluated on it has no documents."""

    def __missing__(self, split: str) -> datasets.Dataset:
        return next(iter(self.values())).select([])


@contextmanager
def data_of(task: str, data_dir: Path | None, cache: Path) -> Iterator[dict[str, Any]]:
    """In the block, the harness's tasks have their data sets from `data_dir`, from the hub where that is None.

    Gives the files that were read, with their hashes, by their paths in `data_dir`. cache: folder for what is made of
    them. datasets.load_dataset then raises UserError, with the data set, for one that is not there: tasks call it from
    code of their own.
    """
    hub = datasets.load_dataset
    files: dict[str, Any] = {}
    datasets.load_dataset = partial(_load, hub, task, data_dir, cache, files)
    try:
        yield files
    finally:
        datasets.load_dataset = hub


def _load(
    hub: Any,
    task: str,
    data_dir: Path | None,
    cache: Path,
    read: dict[str, Any],
    /,
    path: str,
    name: str | None = None,
    **more: Any,
) -> Any:
    """datasets.load_dataset, from local files where `data_dir` is given. hub: that of the library."""
    if data_dir is None or "data_files" in more:
        try:
            return hub(path, name, **more)
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            which = f"{path}, {name}" if name else path
            raise UserError(
                f"the data of {task} cannot be loaded ({which}: {first_line(error)}): give local files with --data-dir "
                f"DIR, as {wanted(Path('DIR'), path, name)}, or see that the Hugging Face hub can be reached."
            ) from None
    folder = data_folder(data_dir, path, name)
    if folder is None:
        raise UserError(f"{task} needs {wanted(data_dir, path, name)}, and the folder is not there.")
    split = more.get("split")
    if (folder / "README.md").is_file():
        with _read(folder):
            found = hub(str(folder), name, split=split, cache_dir=str(cache))
        read |= _hashes(data_dir, sorted(one for one in folder.rglob("*") if one.suffix in SUFFIXES))
        return Splits(found) if split is None else found
    files = sorted(one for one in folder.iterdir() if one.suffix in SUFFIXES)
    splits = Splits({file.stem: _read_split(file, cache) for file in files})
    if not files or (split is not None and str(split) not in splits):
        missing = f"{folder}/{split or 'test'}{' or '.join(SUFFIXES)}"
        raise UserError(f"{task} needs {missing}, and it is not there.")
    read |= _hashes(data_dir, files)
    return splits if split is None else splits[str(split)]


def _hashes(data_dir: Path, files: Iterable[Path]) -> dict[str, Any]:
    return {str(file.relative_to(data_dir)): {"path": str(file), "sha256": hash_file(file).sha256} for file in files}


def _read_split(file: Path, cache: Path) -> datasets.Dataset:
    with _read(file):
        if file.suffix == ".parquet":
            return datasets.Dataset.from_parquet(str(file), cache_dir=str(cache))
        records: list[dict[str, Any]] = []
        for number, record in read_json_lines(file, "a record is a JSON object on a line of its own"):
            # The library fills in what is missing.
            other = records[0].keys() ^ record.keys() if records else set()
            if other:
                raise UserError(f"line {number} of {file} and its first line do not both have {sorted(other)[0]!r}.")
            records.append(record)
        if not records:
            raise UserError(f"{file} is empty.")
        return datasets.Dataset.from_list(records)


@contextmanager
def _read(place: Path) -> Iterator[None]:
    """Raise UserError for a file that the library cannot read."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, TypeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"{place} cannot be read as a data set ({first_line(error)}).") from None
