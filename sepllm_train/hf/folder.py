"""Folders that are there whole or not at all, and the weights in those of transformers."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from data_prep.files import PARTIAL, sync_folder
from sepllm_train.errors import UserError, first_line

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


def refuse_existing(output: Path, mark: str, *, overwrite: bool) -> None:
    """Raise UserError when `output` is there, unless it may be overwritten: a folder that holds the file `mark`."""
    if not output.exists() and not output.is_symlink():
        return
    if not overwrite:
        raise UserError(f"{output} exists already: choose another name or pass --overwrite.")
    if not (output / mark).is_file():
        raise UserError(f"{output} has no {mark}, so it was not written by this program: it is not overwritten.")


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
        from safetensors import SafetensorError, safe_open

        if name not in self._files:
            raise UserError(f"{self.folder} has no tensor {name}: it is not the model of its config.json.")
        path = self.folder / self._files[name]
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read ({first_line(error)}): copy it again.") from None

    def types(self, names: Iterable[str]) -> set[str]:
        """safetensors' names of the types of these tensors, such as F32."""
        from safetensors import safe_open

        found = set()
        for file_name in {self._files[name] for name in names}:
            with safe_open(self.folder / file_name, framework="pt") as file:
                mine = [name for name in names if self._files[name] == file_name]
                found |= {file.get_slice(name).get_dtype() for name in mine}
        return found

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
    old = output.with_name(f"{output.name}.removed{PARTIAL}")
    shutil.rmtree(old, ignore_errors=True)
    os.rename(output, old)
    try:
        os.rename(aside, output)
    except OSError:
        os.rename(old, output)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    """Put a file or folder on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
