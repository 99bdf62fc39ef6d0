"""Folders that are there whole or not at all, and the weights in those of transformers."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from sepllm_train.base.errors import UserError, first_line
from sepllm_train.base.files import PARTIAL, hash_file, sync_folder, write_whole

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
# Holds the SHA-256 of every other file of an exported model. A file of its own, since what is in config.json goes along
# when transformers saves a model that was trained further.
MARK = "sepllm_export.json"


def refuse_existing(output: Path, foreign: Callable[[Path], str | None], *, overwrite: bool) -> None:
    """Raise UserError when `output` is there, unless it may be overwritten: `foreign` tells why it is not what the
    program wrote, or None.

    Before that, what a killed overwriting has left is put in order: the old folder gets its name back when the new one
    had not taken it yet, and goes when it had.
    """
    try:
        _restore(output)
    except OSError as error:
        raise UserError(f"cannot write {output} ({error.strerror or first_line(error)}).") from None
    if not output.exists() and not output.is_symlink():
        return
    if not overwrite:
        raise UserError(f"{output} exists already: choose another name or pass --overwrite.")
    why = foreign(output)
    if why is not None:
        raise UserError(f"{output} is not overwritten, since {why}: choose another name, or remove it yourself.")


def write_mark(folder: Path) -> None:
    """Write the hashes by which `altered_export` knows what the program wrote."""
    content = {"format": 1, "files": _hashes(folder)}
    write_whole(folder / MARK, (json.dumps(content, indent=1) + "\n").encode())


def altered_export(folder: Path) -> str | None:
    """Why a folder is not an exported model as it was written, or None. Raises UserError when it cannot be read."""
    expected = read_object(folder / MARK).get("files")
    if not isinstance(expected, dict):
        return f"it has no {MARK} of this program's"
    found = _hashes(folder)
    changed = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    return f"its {changed[0]} is not as this program wrote it" if changed else None


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file, or nothing where there is none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


@contextmanager
def whole_folder(output: Path) -> Iterator[Path]:
    """Gives a folder to write in, which becomes `output` at the end of the block, in place of one that is there.

    Its name until then is `<output>.partial`; it is removed when the block fails. Raises UserError where it cannot be
    written.
    """
    aside = output.with_name(output.name + PARTIAL)
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        yield aside
        for path in aside.rglob("*"):
            _sync(path)
        sync_folder(aside)
        _put(aside, output)
        sync_folder(output.parent)
    except OSError as error:
        raise UserError(f"cannot write {output} ({error.strerror or first_line(error)}).") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


class SafetensorsFolder:
    """The tensors of a transformers model by name, read one at a time.

    Raises UserError when there are none in safetensors' format.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = self._find()

    @property
    def names(self) -> set[str]:
        """Names of the tensors."""
        return set(self._files)

    def read(self, name: str) -> Tensor:
        """A tensor. Raises UserError when it is not there or its file cannot be read."""
        if name not in self._files:
            raise UserError(f"{self.folder} has no tensor {name}: it is not the model of its config.json.")
        with self._open(self._files[name]) as file:
            return file.get_tensor(name)

    def types(self, names: Iterable[str]) -> set[str]:
        """safetensors' names of the types of these tensors, such as F32. Raises UserError as `read` does."""
        by_file: dict[str, list[str]] = {}
        for name in sorted(names):
            by_file.setdefault(self._files[name], []).append(name)
        found = set()
        for file_name, mine in by_file.items():
            with self._open(file_name) as file:
                found |= {file.get_slice(name).get_dtype() for name in mine}
        return found

    @contextmanager
    def _open(self, file_name: str) -> Iterator[Any]:
        """A file to read tensors of in the block. Raises UserError where that fails."""
        from safetensors import SafetensorError, safe_open

        path = self.folder / file_name
        try:
            with safe_open(path, framework="pt") as file:
                yield file
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read ({first_line(error)}): copy it again.") from None

    def _find(self) -> dict[str, str]:
        """The file of each tensor."""
        from safetensors import SafetensorError, safe_open

        index, single = self.folder / _INDEX, self.folder / _SINGLE
        try:
            if index.is_file():
                files = dict(json.loads(index.read_text(encoding="utf8"))["weight_map"])
                if all(Path(file).name == file for file in files.values()):
                    return files
                raise ValueError("it names files outside of the folder")
            if single.is_file():
                with safe_open(single, framework="pt") as file:
                    return dict.fromkeys(file.keys(), _SINGLE)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise UserError(f"the weights in {self.folder} cannot be read ({first_line(error)}).") from None
        if any(self.folder.glob("*.bin")):
            raise UserError(
                f"{self.folder} has its weights as pickles (.bin), which can run code when they are read: convert them "
                "to safetensors with transformers' save_pretrained."
            )
        raise UserError(f"{self.folder} has no {_SINGLE}: give the folder of a transformers model.")


def _put(aside: Path, output: Path) -> None:
    """Rename the folder `aside` to `output`; one that is there goes when the other has its place."""
    if not output.exists():
        os.rename(aside, output)
        return
    old = _removed(output)
    _remove(old)
    os.rename(output, old)
    try:
        os.rename(aside, output)
    except BaseException:
        os.rename(old, output)
        raise
    _remove(old)


def _restore(output: Path) -> None:
    """Put in order what a process left that was killed in `_put`."""
    old = _removed(output)
    if not old.exists():
        return
    if output.exists() or output.is_symlink():
        _remove(old)
    else:
        os.rename(old, output)


def _removed(output: Path) -> Path:
    """Name of the folder that had the name `output`, until the new one has it."""
    return output.with_name(f"{output.name}.removed{PARTIAL}")


def _remove(folder: Path) -> None:
    """Remove a folder, or the link to one; what it points to stays."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)


def _hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in a folder but the mark, by its path in there."""
    files = [path for path in sorted(folder.rglob("*")) if not path.is_dir() and path != folder / MARK]
    return {path.relative_to(folder).as_posix(): hash_file(path).sha256 for path in files}


def _sync(path: Path) -> None:
    """Put a file or folder on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
