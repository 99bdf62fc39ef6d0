"""The data of a run must stay what it was at its start: the files are mapped into memory, not read once."""

from __future__ import annotations

from pathlib import Path

from data_prep.sidecar import DATA_SUFFIXES, with_suffix
from sepllm_train.base.errors import UserError
from sepllm_train.data.corpus import Corpus


class DataFiles:
    """Size and time of change of every file of a corpus, as they are when this is made."""

    def __init__(self, corpus: Corpus) -> None:
        sources = (*corpus.sources, *corpus.validation)
        paths = [with_suffix(source.prefix, suffix) for source in sources for suffix in DATA_SUFFIXES]
        self.found = {path: _stamp(path) for path in paths}

    def check(self) -> None:
        """Raise UserError when a file is no longer what it was. Costs one stat per file."""
        for path, before in self.found.items():
            now = _stamp(path)
            if now != before:
                raise UserError(
                    f"{path} {_difference(before, now)} while the run reads it: what was trained since the last "
                    "checkpoint is not saved. Put the data back, then start again, or train on the new data under "
                    "another name=."
                )


def _stamp(path: Path) -> tuple[int, int] | None:
    """(bytes, time of the last change in ns), None where there is no file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def _difference(before: tuple[int, int] | None, now: tuple[int, int] | None) -> str:
    """What became of a file, as the predicate of a sentence."""
    if now is None:
        return "has gone"
    if before is None or before[0] == now[0]:
        return "was written to"
    return f"changed from {before[0]:,} to {now[0]:,} bytes"
