"""Statistics of a dataset's separators, and what attention over them would see."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.indexed import token_chunks
from data_prep.separators import class_numbers
from data_prep.sidecar import ClassEntry, check_known, dataset_prefix, open_classes, read_header
from sepllm_train.base.errors import UserError

_CHUNK = 1 << 22


@dataclass(frozen=True)
class Distances:
    """Distances in tokens between one chosen separator and the next, over the packed tokens."""

    mean: float
    p50: int
    p95: int
    max: int


@dataclass(frozen=True)
class VisibleShare:
    """Attended pairs over all causal pairs, for windows of `length` tokens one after the other.

    Query i sees key j <= i when j < initial, j is a chosen separator, or i - j < window. `mean_keys` is the mean number
    of visible keys for each query.
    """

    initial: int
    window: int
    length: int
    share: float
    mean_keys: float


@dataclass(frozen=True)
class Statistics:
    """Figures of `stats`; `density` is the fraction of the chosen separators among all tokens."""

    tokens: int
    documents: int
    bytes: int
    bytes_per_token: float
    classes: list[ClassEntry]
    separators: list[str]
    density: float
    distances: Distances | None
    visible: VisibleShare


class Gaps:
    """Histogram of the distances in tokens between one marked token and the next, over tokens given in pieces."""

    def __init__(self) -> None:
        self.histogram: Counter[int] = Counter()
        self._last: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._offset = 0

    def add(self, marked: NDArray[np.bool_]) -> None:
        """Continue with the next tokens: bool [tokens]."""
        positions = np.concatenate([self._last, np.flatnonzero(marked) + self._offset])
        values, counts = np.unique(np.diff(positions), return_counts=True)
        self.histogram.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
        self._last, self._offset = positions[-1:], self._offset + len(marked)

    def distances(self) -> Distances | None:
        """Mean, percentiles and maximum so far; None with fewer than two marked tokens."""
        if not self.histogram:
            return None
        gaps = np.array(sorted(self.histogram))
        counts = np.array([self.histogram[gap] for gap in gaps])
        ranks = np.cumsum(counts) / counts.sum()
        return Distances(
            mean=float((gaps * counts).sum() / counts.sum()),
            p50=int(gaps[np.searchsorted(ranks, 0.50)]),
            p95=int(gaps[np.searchsorted(ranks, 0.95)]),
            max=int(gaps[-1]),
        )


def statistics(
    prefix: str | Path, *, separators: str = "paper", initial: int = 3, window: int = 64, length: int = 2048
) -> Statistics:
    """Statistics of the dataset `prefix`; `separators` is `paper`, `all` or class names joined by commas.

    Raises UserError for an unknown class, a window below 1, or a length beyond the data.
    """
    if initial < 0 or window < 1 or length < 1:
        raise UserError(f"initial={initial}, window={window}, length={length}: at least 0, 1 and 1 are needed.")
    prefix = dataset_prefix(prefix)
    header = read_header(prefix)
    if length > header.tokens:
        raise UserError(f"A length of {length:,} is longer than the data ({header.tokens:,} tokens): choose less.")
    chosen = class_numbers(separators)
    check_known(prefix, header, [number in chosen for number in range(256)], "--separators")
    is_chosen = np.zeros(256, dtype=bool)
    is_chosen[list(chosen)] = True
    classes = open_classes(prefix)
    count = sum(entry.count for entry in header.classes if entry.number in chosen)
    return Statistics(
        tokens=header.tokens,
        documents=header.documents,
        bytes=header.bytes,
        bytes_per_token=header.bytes / header.tokens,
        classes=list(header.classes),
        separators=[entry.name for entry in header.classes if entry.number in chosen],
        density=count / header.tokens,
        distances=_gaps(classes, is_chosen).distances(),
        visible=_visible_share(classes, is_chosen, initial, window, length),
    )


def _gaps(classes: NDArray[np.uint8], is_chosen: NDArray[np.bool_]) -> Gaps:
    gaps = Gaps()
    for chunk in token_chunks(classes, _CHUNK):
        gaps.add(is_chosen[chunk])
    return gaps


def _visible_share(
    classes: NDArray[np.uint8], is_chosen: NDArray[np.bool_], initial: int, window: int, length: int
) -> VisibleShare:
    """Count pairs by key: key j of a window is seen by all length - j queries from it on, or by `window` of them."""
    windows = len(classes) // length
    separators_at = np.zeros(length, dtype=np.int64)
    for chunk in token_chunks(classes[: windows * length], length * max(1, _CHUNK // length)):
        separators_at += is_chosen[chunk].reshape(-1, length).sum(axis=0)
    separators_at[:initial] = windows
    queries = length - np.arange(length)
    near = np.minimum(queries, window)
    pairs = int((separators_at * queries + (windows - separators_at) * near).sum())
    return VisibleShare(
        initial=initial,
        window=window,
        length=length,
        share=pairs / (windows * length * (length + 1) // 2),
        mean_keys=pairs / (windows * length),
    )


def format_statistics(stats: Statistics) -> str:
    """The statistics as lines of text for people."""
    lines = [
        f"{stats.tokens:,} tokens in {stats.documents:,} documents, {stats.bytes_per_token:.3f} bytes per token",
        "",
        f"{'class':<20}{'tokens':>14}{'density':>10}  entries  description",
    ]
    for entry in stats.classes:
        mark = "*" if entry.name in stats.separators else " "
        lines.append(
            f"{mark} {entry.name:<18}{entry.count:>14,}{entry.density:>10.3%}{len(entry.ids):>9}  {entry.description}"
        )
    lines += ["", f"chosen separators (*): {stats.density:.3%} of all tokens"]
    if stats.distances:
        gaps = stats.distances
        lines.append(f"distance between them: mean {gaps.mean:.2f}, p50 {gaps.p50}, p95 {gaps.p95}, max {gaps.max:,}")
    visible = stats.visible
    lines.append(
        f"visible share of the causal triangle: {visible.share:.2%}, {visible.mean_keys:.1f} keys per query "
        f"(a={visible.initial}, n={visible.window}, S={visible.length:,})"
    )
    return "\n".join(lines)
