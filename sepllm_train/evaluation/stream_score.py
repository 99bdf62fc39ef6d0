"""Perplexity of a text without end: every token is predicted from what the cache holds when it comes."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torch.nn.functional as F

from sepllm_train.base.console import duration, quantity, say
from sepllm_train.base.errors import UserError
from sepllm_train.base.files import write_json
from sepllm_train.evaluation.options import ScoreOptions
from sepllm_train.evaluation.results import missing
from sepllm_train.evaluation.stream_model import Opened, check_context
from sepllm_train.evaluation.stream_report import RESULT, read_stream
from sepllm_train.evaluation.stream_state import FOLDER, load_state, save_state
from sepllm_train.evaluation.stream_text import WORKING_FILES, TokenStream
from sepllm_train.generation.choice import AttentionChoice
from sepllm_train.hf.hooks import cache_argument

SAY_EVERY = 10.0
# Types of the attributes of Progress.
_PROGRESS: dict[str, Any] = {
    "tokens": int,
    "predicted": int,
    "nats": float | int,
    "seconds": float | int,
    "points": list,
    "since": list,
}


@dataclass
class Progress:
    """Progress of a stream. `nats` is the sum over all predicted tokens, `points` what was noted on the way."""

    tokens: int = 0
    predicted: int = 0
    nats: float = 0.0
    seconds: float = 0.0
    points: list[dict[str, Any]] = field(default_factory=list)
    # Tokens, nats and seconds at the last point.
    since: list[float] = field(default_factory=lambda: [0, 0, 0.0, 0.0])

    @property
    def perplexity(self) -> float:
        """exp of the mean loss so far."""
        return perplexity(self.nats, self.predicted)

    def note(self, mean_length: float) -> None:
        """Add a point: the loss since the start and since the last point, and what it took."""
        tokens, predicted, nats, seconds = self.since
        self.points.append(
            {
                "tokens": self.tokens,
                "loss": self.nats / max(1, self.predicted),
                "perplexity": self.perplexity,
                "part_loss": (self.nats - nats) / max(1, self.predicted - predicted),
                "seconds": self.seconds,
                "seconds_per_token": (self.seconds - seconds) / max(1, self.tokens - tokens),
                "mean_length": mean_length,
                "resident_bytes": psutil.Process().memory_info().rss,
            }
        )
        self.since = [self.tokens, self.predicted, self.nats, self.seconds]


def perplexity(nats: float, tokens: int) -> float:
    """exp(nats / tokens); inf beyond what a float holds, nan of nan."""
    mean = nats / max(1, tokens)
    return math.inf if mean > 700 else math.exp(mean)


def score(
    opened: Opened, cache: Any, choice: AttentionChoice, text: TokenStream, how: ScoreOptions, output: Path
) -> dict[str, Any]:
    """Score a text and write `output`/result.json; the same call continues a stream that was stopped.

    Gives the result: loss (nats per token) and perplexity, the counted mean length of the cache, seconds, and points on
    the way. Raises KeyboardInterrupt after SIGINT or SIGTERM, once the state is saved; UserError when `output` is of
    another stream, the text has not two tokens or does not fit the model's context, or logits are not finite.
    """
    how.check()
    identity = {
        "model": opened.name,
        "fingerprint": opened.fingerprint(),
        **choice.describe(),
        "text": text.identity(),
        "tokens_asked": how.tokens,
        "chunk": how.chunk,
        "every": how.every,
    }
    finished = _finished(output, identity)
    if finished is not None:
        say(f"{output} is finished: {len(finished['points'])} points, perplexity {finished['perplexity']:.3f}.")
        return finished
    progress = _resume(output, cache, identity)
    tokens = text.prepare(output, how.tokens)
    total = text.length(tokens)
    asked = total if how.tokens is None else min(total, how.tokens)
    check_context(cache, choice.name, asked, "give --tokens N of at most {context}")
    device = next(opened.model.parameters()).device
    left = None if how.tokens is None else how.tokens - progress.tokens
    run = _Run(cache, how, output, identity, progress)
    with torch.inference_mode(), _signals_noted() as signals:
        for ids, targets in _pairs(text.chunks(tokens, how.chunk, progress.tokens), left):
            run.take(*_nats(opened.model, cache, ids, targets, device))
            if signals:
                run.save()
                say(f"stopped at {progress.tokens:,} tokens; the same command continues.")
                raise KeyboardInterrupt
    if not progress.points or progress.points[-1]["tokens"] != progress.tokens:
        progress.note(cache.mean_length)
    result = {
        **identity,
        "loss": progress.nats / progress.predicted,
        "perplexity": progress.perplexity,
        "tokens": progress.tokens,
        "seconds": progress.seconds,
        "positions_used": cache.positions,
        "mean_length": cache.mean_length,
        "mean_length_by_formula": cache.policies[0].mean_length,
        "cache_bytes": cache.nbytes,
        "differences": list(cache.differences),
        "machine": {"torch": torch.__version__, "threads": torch.get_num_threads(), "device": str(device)},
        "points": progress.points,
    }
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / RESULT, result)
    _clean(output)
    say(f"perplexity {result['perplexity']:.3f} over {progress.tokens:,} tokens; {output / RESULT}")
    return result


@contextmanager
def _signals_noted() -> Iterator[list[int]]:
    """Numbers of the signals to stop that have come, which end nothing: in the middle of a forward the cache is neither
    here nor there. A second one ends the program as ever, without saving."""
    noted: list[int] = []

    def note(number: int, frame: Any) -> None:
        if noted:
            raise KeyboardInterrupt
        noted.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Run:
    """A stream that is running: counts, tells, saves."""

    def __init__(
        self, cache: Any, how: ScoreOptions, output: Path, identity: dict[str, Any], progress: Progress
    ) -> None:
        self.cache, self.how, self.output, self.identity, self.progress = cache, how, output, identity, progress
        self.begun = self.said = self.saved = self.clock = time.monotonic()
        self.first = progress.tokens

    def take(self, tokens: int, predicted: int, nats: float) -> None:
        """Count a chunk."""
        progress, now = self.progress, time.monotonic()
        progress.seconds += now - self.clock
        progress.tokens += tokens
        progress.predicted += predicted
        progress.nats += nats
        early = progress.tokens in (1024, 8192)
        if early or progress.tokens % self.how.every == 0:
            progress.note(self.cache.mean_length)
        if now - self.said >= SAY_EVERY:
            self._tell(now)
        if now - self.saved >= self.how.save_every:
            self.save()
        self.clock = time.monotonic()

    def save(self) -> None:
        """Write the state."""
        self.output.mkdir(parents=True, exist_ok=True)
        save_state(self.output, self.cache, {"identity": self.identity, "progress": asdict(self.progress)})
        self.saved = time.monotonic()

    def _tell(self, now: float) -> None:
        progress, asked = self.progress, self.how.tokens
        rate = (progress.tokens - self.first) / (now - self.begun)
        left = "" if asked is None else f" | ETA {duration((asked - progress.tokens) / rate)}"
        share = "" if asked is None else f"/{quantity(asked)}"
        say(
            f"{quantity(progress.tokens)}{share} tokens | perplexity {progress.perplexity:.3f} | {rate:,.0f} tok/s | "
            f"cache {self.cache.mean_length:.1f} keys{left}"
        )
        self.said = now


def _pairs(chunks: Iterator[np.ndarray], left: int | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(ids, targets) of each chunk, int64, up to `left` tokens: targets are those that follow, one fewer at the end."""
    ids = next(chunks, None)
    while ids is not None:
        following = next(chunks, None)
        if left is not None:
            ids = ids[:left]
            left -= len(ids)
            following = following if left else None
        yield ids, ids[1:] if following is None else np.concatenate((ids[1:], following[:1]))
        ids = following


def _nats(model: Any, cache: Any, ids: np.ndarray, targets: np.ndarray, device: torch.device) -> tuple[int, int, float]:
    """Tokens, predicted tokens and their loss in nats of a chunk. Raises UserError for logits that are not finite."""
    output = model(torch.from_numpy(ids)[None].to(device), **{cache_argument(model): cache})
    logits = output.logits[0, : len(targets)]
    if not len(targets):
        return len(ids), 0, 0.0
    loss = float(F.cross_entropy(logits.float(), torch.from_numpy(targets).to(device), reduction="sum"))
    if not math.isfinite(loss):
        raise UserError(
            f"the model's logits are not finite within {cache.columns_seen:,} tokens: its weights are bad, or --dtype "
            "is too narrow for them; try --dtype fp32."
        )
    return len(ids), len(targets), loss


def _clean(output: Path) -> None:
    """Remove what only a stream that goes on needs."""
    shutil.rmtree(output / FOLDER, ignore_errors=True)
    for name in WORKING_FILES:
        (output / name).unlink(missing_ok=True)


def _finished(output: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    if not os.path.lexists(output / RESULT):
        return None
    result = read_stream(output)
    _same(output, result, identity)
    return result


def _resume(output: Path, cache: Any, identity: dict[str, Any]) -> Progress:
    saved = load_state(output, cache)
    if saved is None:
        return Progress()
    wrong = missing(saved, {"identity": dict, "progress": _PROGRESS})
    if wrong is None and not _is_progress(saved["progress"]):
        wrong = "progress"
    if wrong is not None:
        raise UserError(
            f"{output / FOLDER} cannot be read (its {wrong} is missing or of another type): remove it to begin again."
        )
    found, progress = saved["identity"], Progress(**saved["progress"])
    _same(output, found, identity)
    say(f"resumed at {progress.tokens:,} tokens from {output}")
    return progress


def _is_progress(content: dict[str, Any]) -> bool:
    """True for what can be the progress of a stream, its values being of their types."""
    since = content["since"]
    return (
        content.keys() == _PROGRESS.keys()
        and min(content["tokens"], content["predicted"]) >= 0
        and len(since) == 4
        and all(type(number) in (int, float) for number in since)
        and all(isinstance(point, dict) and missing(point, {"tokens": int}) is None for point in content["points"])
    )


def _same(output: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for key, value in json.loads(json.dumps(wanted)).items():
        if key != "model" and found.get(key) != value:
            raise UserError(
                f"{output} holds a stream with {key}={found.get(key)}, this one has {value}: choose another --output."
            )
