"""Options of evaluations and streams, and baselines as they are typed. Imports nothing large."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from sepllm_train.base.errors import UserError
from sepllm_train.generation.choice import ATTENTIONS, AttentionChoice

_TEXTS = ("classes", "positions")
# `paper` among the baselines. On GSM8K the paper's FixLLM of interval 5 keeps the share of keys that is nearest to that
# of its nine separators (docs/evaluation.md).
PAPER = "paper"
PAPER_INTERVAL = 5
_LLAMA3 = "period+comma+question+exclamation+semicolon+colon+space+newline+bos"
# Baselines by one word: the training-free ones of the paper's Tables 1 and 15, and the separators of its release for
# Llama 3, which has no tab and takes the token that begins a text as one.
PRESETS = {
    "fixllm5": "fixed:initial=3:window=256:interval=5",
    "fixllm4": "fixed:initial=3:window=256:interval=4",
    "llama3": f"pattern:initial=3:window=256:classes={_LLAMA3}",
}


def nearest(name: str, known: Iterable[str]) -> str:
    """Words that end a list of the `known` names: which of them is nearest to a mistyped one."""
    return f"; the nearest is {get_close_matches(name, list(known), 1, cutoff=0)[0]}"


def baseline(asked: AttentionChoice, text: str) -> AttentionChoice:
    """Another attention from NAME or NAME:KEY=VALUE:..., such as streaming:window=380; a name of PRESETS stands for its
    text, and settings after it replace those.

    What the text does not name is as in `asked`. Several classes are joined by +. Raises UserError.
    """
    first, *own = text.split(":")
    name, *settings = [*PRESETS.get(first, first).split(":"), *own]
    if name not in ATTENTIONS:
        known = (*ATTENTIONS, *PRESETS)
        raise UserError(
            f"the baseline {name!r} is unknown: choose from {', '.join(known)}, or {PAPER} for dense, streaming and "
            "fixed (several classes of a baseline are joined by +, not by commas)"
            f"{nearest(name, (*known, PAPER))}."
        )
    given: dict[str, Any] = {}
    for setting in settings:
        key, _, value = setting.partition("=")
        if key not in ATTENTIONS[name]:
            raise UserError(
                f"{setting!r} in the baseline {text} does not apply to {name}, which takes "
                f"{', '.join(ATTENTIONS[name]) or 'no settings'}."
            )
        if key in _TEXTS and value:
            given[key] = value.replace("+", ",")
        elif key not in _TEXTS and value.isdecimal():
            given[key] = int(value)
        else:
            raise UserError(
                f"{setting!r} in the baseline {text} is not KEY=VALUE with "
                f"{'a text' if key in _TEXTS else 'a whole number'}."
            )
    return replace(asked, name=name, label=text, **given)


def with_baselines(asked: AttentionChoice, baselines: Sequence[str]) -> list[AttentionChoice]:
    """The attention that is asked for and its baselines.

    `paper` stands for dense, streaming and fixed, less the one that is asked for itself. Raises UserError for a
    baseline that is not understood.
    """
    fixed = "fixed" if asked.interval is not None else f"fixed:interval={PAPER_INTERVAL}"
    made = [asked]
    for text in baselines:
        texts = [one for one in ("dense", "streaming", fixed) if one.split(":")[0] != asked.name]
        made += [baseline(asked, one) for one in (texts if text == PAPER else [text])]
    return made


# Options of `sepllm evaluate`, and the keys of a run that stand for them.
_KEYS = {
    "--data-dir": "evaluation.data_dir",
    "--num-fewshot": "evaluation.shots",
    "--truncate": "evaluation.truncate=true",
    "--tasks": "evaluation.tasks",
    "--haystack FILE": "evaluation.data_dir=DIR as DIR/baber/paul_graham_essays/train.jsonl",
}


@contextmanager
def in_keys() -> Iterator[None]:
    """Name options in the UserErrors of the block by the keys of a run's configuration."""
    try:
        yield
    except UserError as error:
        raise type(error)(re.sub("|".join(_KEYS), lambda found: _KEYS[found[0]], str(error))) from None


@dataclass(frozen=True)
class NeedleOptions:
    """Needle tasks that are made. lengths: tokens of a prompt with its answer, None for the model's context, at most
    4,096. count: records of each length. haystack: a text file, None for the essays that RULER takes from the hub."""

    lengths: tuple[int, ...] | None = None
    count: int = 100
    seed: int = 0
    haystack: Path | None = None

    def check(self) -> None:
        """Raise UserError for numbers that make no sense, and a haystack that is not there."""
        lengths = self.lengths or ()
        for name, least in (("--lengths", min(lengths, default=1)), ("--count", self.count)):
            if least < 1:
                raise UserError(f"{name} {least} must be at least 1.")
        if self.lengths == () or len(set(lengths)) < len(lengths):
            raise UserError("--lengths names none, or one twice.")
        if self.haystack is not None and not self.haystack.is_file():
            raise UserError(f"--haystack {self.haystack} is not a file.")


@dataclass(frozen=True)
class EvaluationOptions:
    """tasks: names as `sepllm evaluate` takes them. data_dir: None for the hub. limit: the first documents of each task
    only. shots: examples in a prompt, None for each task's own number. batch_size: sequences in a forward, which
    changes no result."""

    tasks: tuple[str, ...]
    data_dir: Path | None = None
    limit: int | None = None
    shots: int | None = None
    batch_size: int = 8
    truncate: bool = False
    needles: NeedleOptions = NeedleOptions()

    def check(self) -> None:
        """Raise UserError for numbers that make no sense."""
        for name, value, least in (
            ("--limit", self.limit, 1),
            ("--num-fewshot", self.shots, 0),
            ("--batch-size", self.batch_size, 1),
        ):
            if value is not None and value < least:
                raise UserError(f"{name} {value} must be at least {least}.")
        if len(set(self.tasks)) < len(self.tasks):
            raise UserError("--tasks names a task twice.")
        self.needles.check()


@dataclass(frozen=True)
class ScoreOptions:
    """tokens: at most so many, None for all of the text. chunk: tokens given to the model in a call, which changes
    nothing but the speed: 1 is how text is generated. every: tokens between points of the result. save_every: seconds
    between saved states."""

    tokens: int | None = None
    chunk: int = 1024
    every: int = 65536
    save_every: float = 60.0

    def check(self) -> None:
        """Raise UserError for numbers that make no sense."""
        for name in ("chunk", "every"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name}={getattr(self, name)} must be at least 1.")
        if self.tokens is not None and self.tokens < 2:
            raise UserError(f"--tokens={self.tokens} must be at least 2: the first token predicts the second.")
        if self.every % self.chunk:
            raise UserError(f"--every={self.every} must be a multiple of --chunk={self.chunk}.")
