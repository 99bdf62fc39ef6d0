"""The tokens of a text, as a stream."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.readers import Corpus
from data_prep.tokenizers import Tokenizer


class TokenStream:
    """Documents of .txt and .jsonl files as tokens, each document followed by the end-of-document token.

    repeat: begin again at the end. Raises UserError for files that are not there.
    """

    def __init__(self, paths: list[str], tokenizer: Tokenizer, *, unwrap: bool = False, repeat: bool = False) -> None:
        self.paths = [Path(path) for path in paths]
        self.tokenizer = tokenizer
        self.unwrap = unwrap
        self.repeat = repeat
        Corpus(self.paths)

    def identity(self) -> dict[str, Any]:
        """What must be the same for a stream to be continued."""
        return {
            "files": [[path.name, path.stat().st_size] for path in self.paths],
            "tokenizer": self.tokenizer.sha256,
            "unwrap": self.unwrap,
            "repeat": self.repeat,
        }

    def chunks(self, size: int, skip: int = 0) -> Iterator[np.ndarray]:
        """int64 arrays of `size` tokens, the last one shorter; the first `skip` tokens are left out."""
        held: list[np.ndarray] = []
        waiting = 0
        for ids in self._documents():
            if skip >= len(ids):
                skip -= len(ids)
                continue
            held.append(ids[skip:])
            waiting += len(ids) - skip
            skip = 0
            if waiting < size:
                continue
            joined = np.concatenate(held)
            whole = len(joined) // size * size
            yield from joined[:whole].reshape(-1, size)
            held, waiting = [joined[whole:]], len(joined) - whole
        if waiting:
            yield np.concatenate(held)

    def _documents(self) -> Iterator[np.ndarray]:
        while True:
            empty = True
            for document in Corpus(self.paths, unwrap=self.unwrap):
                empty = False
                pieces = self.tokenizer.encode_batch(self.tokenizer.split(document.text))
                ids = [index for piece in pieces for index in piece]
                yield np.array([*ids, self.tokenizer.eod], dtype=np.int64)
            if not self.repeat or empty:
                return
