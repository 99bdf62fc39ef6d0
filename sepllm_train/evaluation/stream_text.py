"""The tokens of a text, as a stream."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.readers import Corpus
from data_prep.tokenizers import Tokenizer
from sepllm_train.base.console import quantity, say
from sepllm_train.base.errors import UserError
from sepllm_train.base.files import write_json
from sepllm_train.base.parsing import read_json_if_any

TOKENS = "tokens.bin"
_ABOUT = "tokens.json"
WORKING_FILES = (TOKENS, _ABOUT)
_TYPE = np.dtype("<u4")


def check_text(paths: Iterable[Path | str]) -> None:
    """Raise UserError for files that are not there, or neither .txt nor .jsonl."""
    Corpus([Path(path) for path in paths])


def check_output(output: Path) -> None:
    """Raise UserError when `output` is, or lies under, what is not a folder."""
    there = next((place for place in (output, *output.parents) if os.path.lexists(place)), None)
    if there is not None and not os.path.isdir(there):
        raise UserError(f"--output {output}: {there} is not a folder; choose another --output.")


class TokenStream:
    """Documents of .txt and .jsonl files as tokens, each document followed by the end-of-document token.

    They are tokenised once, into a file: what a document takes meanwhile would otherwise come and go in the memory of
    the stream. repeat: begin again at the end. Raises UserError for files that are not there.
    """

    def __init__(self, paths: list[str], tokenizer: Tokenizer, *, unwrap: bool = False, repeat: bool = False) -> None:
        self.paths = [Path(path) for path in paths]
        self.tokenizer = tokenizer
        self.unwrap = unwrap
        self.repeat = repeat
        check_text(self.paths)

    def identity(self) -> dict[str, Any]:
        """Values that must be the same for a stream to be continued."""
        return {
            "files": [[path.name, path.stat().st_size] for path in self.paths],
            "tokenizer": self.tokenizer.sha256,
            "unwrap": self.unwrap,
            "repeat": self.repeat,
        }

    def prepare(self, folder: Path, limit: int | None) -> Path:
        """Write the first `limit` tokens (None: all) to `folder`/tokens.bin, unless they are there; gives its path.

        Raises UserError for text of fewer than two tokens, and when the file cannot be written.
        """
        path, about = folder / TOKENS, {**self.identity(), "limit": limit}
        if _is_whole(path, folder / _ABOUT, about):
            return path
        say(f"tokenising {', '.join(path.name for path in self.paths)}")
        aside, count = path.with_suffix(".partial"), 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with open(aside, "wb") as file:
                for ids in self._documents():
                    ids = ids if limit is None else ids[: limit - count]
                    file.write(ids.astype(_TYPE).tobytes())
                    count += len(ids)
                    if count == limit:
                        break
                file.flush()
                os.fsync(file.fileno())
            if count < 2:
                raise UserError(f"the text has fewer than 2 tokens: {', '.join(map(str, self.paths))}.")
            # In this order a stop leaves tokens that are made again, never those of another text.
            (folder / _ABOUT).unlink(missing_ok=True)
            aside.replace(path)
            write_json(folder / _ABOUT, {**about, "count": count})
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror}): choose another --output.") from None
        finally:
            with suppress(OSError):
                aside.unlink(missing_ok=True)
        say(f"{quantity(count)} tokens")
        return path

    def length(self, path: Path) -> float:
        """Tokens of a prepared file; inf when it begins again at its end."""
        return math.inf if self.repeat else path.stat().st_size // _TYPE.itemsize

    def chunks(self, path: Path, size: int, skip: int = 0) -> Iterator[np.ndarray]:
        """int64 arrays of `size` tokens of a prepared file, the last one shorter; the first `skip` are left out."""
        total = path.stat().st_size // _TYPE.itemsize
        with open(path, "rb") as file:
            file.seek(skip % total * _TYPE.itemsize if self.repeat else skip * _TYPE.itemsize)
            while True:
                found = file.read(size * _TYPE.itemsize)
                while self.repeat and len(found) < size * _TYPE.itemsize:
                    file.seek(0)
                    found += file.read(size * _TYPE.itemsize - len(found))
                if not found:
                    return
                yield np.frombuffer(found, dtype=_TYPE).astype(np.int64)

    def _documents(self) -> Iterator[np.ndarray]:
        for document in Corpus(self.paths, unwrap=self.unwrap):
            pieces = self.tokenizer.encode_batch(self.tokenizer.split(document.text))
            yield np.array([*(index for piece in pieces for index in piece), self.tokenizer.eod], dtype=np.int64)


def _is_whole(path: Path, beside: Path, about: dict[str, Any]) -> bool:
    """True when `path` holds the tokens of `about`, all of them, as the file `beside` it says."""
    try:
        return read_json_if_any(beside) == {**about, "count": path.stat().st_size / _TYPE.itemsize}
    except OSError:
        return False
