"""Loss and needles after a prompt of which a bounded number of keys is kept: one measurement for every way of keeping.

It imports torch and nothing that imports transformers, and so runs beside any version of it: KVPress needs an older
one than `sepllm_train.hf`. The two programs are in benchmarks/equal_memory.

Shape letters: B windows, L tokens of the prompt, T tokens that are predicted after it, V vocabulary.
"""

from __future__ import annotations

import argparse
import hashlib
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib import metadata
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data_prep.readers import Corpus
from data_prep.tokenizers import Tokenizer
from sepllm_train.base.console import duration, say
from sepllm_train.base.errors import UserError
from sepllm_train.base.files import hash_file, write_json
from sepllm_train.base.parsing import read_json_lines
from sepllm_train.base.statistics import token_mean
from sepllm_train.evaluation.results import EQUAL_MEMORY

FORMAT = 1
_PACKAGES = ("torch", "transformers", "kvpress", "tokenizers")
# Characters of which the first L + T + 1 tokens of a text surely are.
_CHARACTERS = 16


@dataclass
class PromptMemory:
    """A causal model of transformers that reads a prompt, keeps some of its keys, and continues from these.

    Attributes:
        name: the method, as in results.
        source: package that the method is from.
        budget: keys per layer and head that it may keep of a prompt; None for methods without one.
        settings: its numbers, for results.
        new_cache: makes an empty cache.
        count: keys per layer, head and row that the newest token of a cache saw, on average.
        reading: gives for the length of a prompt what is active while the prompt is read.
        argument: name of the cache among the arguments of the model.
    """

    name: str
    source: str
    budget: int | None
    settings: dict[str, Any]
    model: Any
    new_cache: Callable[[], Any]
    count: Callable[[Any], float]
    reading: Callable[[int], AbstractContextManager[Any]] = lambda length: nullcontext()
    argument: str = "past_key_values"

    def read(self, ids: Tensor) -> float:
        """Read prompts, i64 [B, L], from the start; returns the keys that are kept."""
        self._cache, self._seen = self.new_cache(), 0
        with self.reading(ids.shape[1]):
            self._forward(ids)
        return self.count(self._cache)

    def step(self, ids: Tensor) -> tuple[Tensor, float]:
        """Append a token to each row, i64 [B]; returns logits [B, V] and the keys that the token saw."""
        return self._forward(ids[:, None]), self.count(self._cache)

    def _forward(self, ids: Tensor) -> Tensor:
        # Tokens keep their places in the text, whatever was dropped before them.
        positions = torch.arange(self._seen, self._seen + ids.shape[1], device=ids.device).expand_as(ids)
        self._seen += ids.shape[1]
        given = {"input_ids": ids, "position_ids": positions, "logits_to_keep": 1, self.argument: self._cache}
        logits: Tensor = self.model(**given).logits[:, -1]
        return logits


def separator_scores(is_separator: Tensor, initial: int, window: int) -> Tensor:
    """Scores f64 [B, L] of which the largest are the keys that SepLLM keeps (arXiv 2412.12094, section 3).

    First come the `initial` first tokens and the last `window`, then separators (bool [B, L]), then all others; among
    equals the newer token. Raises ValueError for a prompt that is shorter than the first two together.
    """
    length = is_separator.shape[1]
    if length < initial + window:
        raise ValueError(f"a prompt of {length} tokens is shorter than initial={initial} + window={window}.")
    place = torch.arange(length, device=is_separator.device)
    always = (place < initial) | (place >= length - window)
    return torch.where(always, 2.0, is_separator.double()) + place.double() / length


@dataclass(frozen=True)
class Measured:
    """Values f64 [N, T] of sequences (losses in nats; for needles [N, 1], the share of them that was found), and the
    keys per layer and head: at the end of the prompts, and those that the tokens after it saw on average."""

    values: Tensor
    keys_at_prompt_end: float
    mean_keys: float


@torch.inference_mode()
def continuation_losses(memory: PromptMemory, windows: Tensor, prompt: int, batch: int) -> Measured:
    """Losses of tokens after prompts of `prompt` tokens, each given before the next one is predicted.

    windows: i64 [N, L + T + 1]. The token after the prompt is given first: a method that drops keys when it has read
    the prompt predicts it from all of them. batch: windows at once.
    """
    losses, ends, seen = [], [], []
    for ids in windows.split(batch):
        ends += [memory.read(ids[:, :prompt])] * len(ids)
        nats = []
        for place in range(prompt, ids.shape[1] - 1):
            logits, keys = memory.step(ids[:, place])
            nats.append(F.cross_entropy(logits.double(), ids[:, place + 1], reduction="none"))
            seen += [keys] * len(ids)
        losses.append(torch.stack(nats, 1))
    return Measured(torch.cat(losses).cpu(), _mean(ends), _mean(seen))


@dataclass(frozen=True)
class NeedlePrompt:
    """A needle task: ids of the text in which needles lie, ids of the question with the beginning of its answer, and
    what the answer must name."""

    context: list[int]
    question: list[int]
    outputs: list[str]

    @classmethod
    def of(cls, record: dict[str, Any], tokenizer: Tokenizer) -> NeedlePrompt:
        """The task of a record in RULER's fields, whose question is the last line of its input."""
        context = record["input"].rpartition("\n")[0]
        # Encoded as one text: a tokenizer may begin every text with a space.
        before, ids = tokenizer.encode_batch([context, f"{record['input']} {record['gen_prefix']}"])
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, ids, strict=False)))
        return cls(ids[:same], ids[same:], record["outputs"])


@torch.inference_mode()
def needle_scores(memory: PromptMemory, tokenizer: Tokenizer, tasks: Sequence[NeedlePrompt], tokens: int) -> Measured:
    """Share of each task's needles that greedy generation of `tokens` tokens names (RULER's string_match_all).

    The question comes after keys were dropped, as in KVPress's pipeline: what is kept does not depend on it.
    """
    found, ends, seen = [], [], []
    device = next(memory.model.parameters()).device
    for task in tasks:
        ends.append(memory.read(torch.tensor([task.context], device=device)))
        answer: list[int] = []
        for token in task.question:
            logits, keys = memory.step(torch.tensor([token], device=device))
            seen.append(keys)
        while len(answer) < tokens and (token := int(logits.argmax())) != tokenizer.eod:
            answer.append(token)
            logits, keys = memory.step(torch.tensor([token], device=device))
            seen.append(keys)
        text = tokenizer.decode(answer).lower()
        found.append([sum(output.lower() in text for output in task.outputs) / len(task.outputs)])
    return Measured(torch.tensor(found, dtype=torch.float64), _mean(ends), _mean(seen))


def book_windows(
    paths: Sequence[Path], tokenizer: Tokenizer, length: int, count: int, *, unwrap: bool
) -> tuple[Tensor, str]:
    """The `length` tokens from the middle of each of the first `count` documents that are long enough, i64 [N, length],
    and the SHA-256 of these. Raises UserError when there are fewer than two."""
    rows: list[list[int]] = []
    for document in Corpus(list(paths), unwrap=unwrap):
        half = document.text[len(document.text) // 2 :]
        # From the start of a line on.
        [ids] = tokenizer.encode_batch([half[half.find("\n") + 1 :][: _CHARACTERS * length]])
        if len(ids) >= length:
            rows.append(ids[:length])
        if len(rows) == count:
            break
    if len(rows) < 2:
        raise UserError(
            f"{', '.join(map(str, paths))}: {len(rows)} documents have {length:,} tokens in their second half, and the "
            "standard error needs 2: give more text, or a smaller --prompt."
        )
    windows = torch.tensor(rows)
    return windows, hashlib.sha256(windows.numpy().tobytes()).hexdigest()


def read_needles(path: Path, limit: int | None) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """The first `limit` records of each task and length in a file, in RULER's fields of lm-evaluation-harness.

    Raises UserError for a record that lacks one.
    """
    remedy = "make it with `sepllm evaluate needles`"
    records = []
    for number, record in read_json_lines(path, remedy):
        kinds = {"input": str, "gen_prefix": str, "outputs": list, "max_length": int}
        wrong = next((key for key, kind in kinds.items() if not isinstance(record.get(key), kind)), None)
        if wrong is not None or not record["outputs"]:
            raise UserError(f"{path} line {number} has no {wrong or 'outputs'}: {remedy}.")
        records.append(record)
    if not records:
        raise UserError(f"{path} holds no records: {remedy}.")
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault((str(record.get("task", "needles")), record["max_length"]), []).append(record)
    return {key: group[:limit] for key, group in groups.items()}


def add_options(parser: argparse.ArgumentParser, memories: Sequence[str]) -> None:
    """Add the options that the programs share; `memories` are the methods to choose from, all by default."""
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL", help="folder that `sepllm export` wrote")
    add("--text", nargs="+", type=Path, metavar="FILE", help="books, .txt or .jsonl, also compressed: loss after a"
        " prompt from the middle of each")  # fmt: skip
    add("--unwrap", action="store_true", help="join the hard-wrapped lines of books")
    add("--prompt", type=int, default=1024, metavar="L", help="tokens of a prompt from a book (1024)")
    add("--tokens", type=int, default=128, metavar="T", help="tokens predicted after it (128)")
    add("--windows", type=int, default=32, metavar="N", help="books, a window of each (32)")
    add("--batch", type=int, default=8, metavar="N", help="windows at once, which changes no result (8)")
    add("--needles", type=Path, metavar="FILE", help="needle tasks in RULER's fields, .jsonl")
    add("--limit", type=int, metavar="N", help="only the first N needle tasks of each length")
    add("--answer-tokens", type=int, default=128, metavar="N", help="tokens generated for an answer (128)")
    add("--memories", type=_names, default=list(memories), metavar="LIST", help=f"{','.join(memories)} or some of them")
    add("--keys", type=_numbers, required=True, metavar="LIST", help="keys per layer and head to keep of a prompt")
    add("--initial", type=int, default=4, metavar="N", help="first tokens that stay (4)")
    add("--separator-share", type=float, default=0.25, metavar="SHARE", help="of the keys, for separators (0.25)")
    add("--classes", default="paper", metavar="LIST", help="separator classes (paper)")
    add("--output", type=Path, required=True, metavar="DIR", help="a result for each method, number of keys and length")


def check_options(options: argparse.Namespace, memories: Sequence[str]) -> None:
    """Raise UserError for options that make no sense."""
    wrong = [name for name in options.memories if name not in memories]
    if wrong:
        raise UserError(f"--memories {wrong[0]}: choose from {', '.join(memories)}.")
    for name, values in (("memories", options.memories), ("keys", options.keys)):
        if not values or len(set(values)) < len(values):
            raise UserError(f"--{name} must name at least one, and each once.")
    if options.text is None and options.needles is None:
        raise UserError("nothing to measure: give --text FILE, --needles FILE, or both.")
    for name in ("prompt", "tokens", "windows", "batch", "limit", "answer_tokens"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value} must be at least 1.")
    if not 0 < options.separator_share < 1:
        raise UserError(f"--separator-share {options.separator_share} must be between 0 and 1.")
    for keys in options.keys:
        if local_window(options, keys) < 1 or options.initial < 0:
            raise UserError(f"--keys {keys} leaves no local window beside --initial {options.initial}: give more.")


def local_window(options: argparse.Namespace, keys: int) -> int:
    """Tokens of the local window where `keys` keys hold initial tokens, separators and the window."""
    return keys - options.initial - separators_kept(options, keys)


def separators_kept(options: argparse.Namespace, keys: int) -> int:
    """Separators among `keys` keys."""
    return max(1, round(options.separator_share * keys))


def measure(memories: Iterable[PromptMemory], tokenizer: Tokenizer, options: argparse.Namespace) -> None:
    """Measure each method on what the options name, print a line for each result and write it to --output.

    Raises UserError for texts and tasks that cannot be read, or that pass the model's context.
    """
    texts = None
    if options.text is not None:
        length = options.prompt + options.tokens + 1
        texts = book_windows(options.text, tokenizer, length, options.windows, unwrap=options.unwrap)
    needles = {} if options.needles is None else read_needles(options.needles, options.limit)
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {options.output} cannot be made ({error.strerror}): choose another.") from None
    common = {
        "format": FORMAT,
        "kind": EQUAL_MEMORY,
        "model": {"name": options.model.name, "fingerprint": fingerprint(options.model)},
        "tokenizer_sha256": tokenizer.sha256,
        "command": sys.argv,
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "machine": {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
    }
    for memory in memories:
        for name, found in _measurements(memory, tokenizer, options, texts, needles):
            budget = "all" if memory.budget is None else memory.budget
            write_json(options.output / f"{memory.name}.{budget}.{name}.json", {**common, **found})


def _measurements(
    memory: PromptMemory,
    tokenizer: Tokenizer,
    options: argparse.Namespace,
    texts: tuple[Tensor, str] | None,
    needles: dict[tuple[str, int], list[dict[str, Any]]],
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The results of one method, with a name for each."""
    if texts is not None:
        windows, sha256 = texts
        windows = windows.to(next(memory.model.parameters()).device)
        _check_context(memory.model, windows.shape[1], "--prompt and --tokens")
        begin = time.perf_counter()
        measured = continuation_losses(memory, windows, options.prompt, options.batch)
        data = {"files": [path.name for path in options.text], "unwrap": options.unwrap, "tokens": options.tokens}
        yield (
            f"prompt{options.prompt}",
            _result(memory, measured, "loss", options.prompt, {**data, "sequences_sha256": sha256}, begin),
        )
    for (task, length), records in needles.items():
        tasks = [NeedlePrompt.of(record, tokenizer) for record in records]
        longest = max(len(one.context) + len(one.question) for one in tasks)
        _check_context(memory.model, longest + options.answer_tokens, "--needles and --answer-tokens")
        begin = time.perf_counter()
        measured = needle_scores(memory, tokenizer, tasks, options.answer_tokens)
        digest = hashlib.sha256("\0".join(record["input"] for record in records).encode()).hexdigest()
        data = {"files": [options.needles.name], "tokens": options.answer_tokens, "sequences_sha256": digest}
        yield f"{task}{length}", _result(memory, measured, task, length, data, begin)


def _result(
    memory: PromptMemory, measured: Measured, measure: str, prompt: int, data: dict[str, Any], begin: float
) -> dict[str, Any]:
    """A result for a file, which is also printed."""
    value, error = token_mean(measured.values)
    seconds = time.perf_counter() - begin
    budget = "all keys" if memory.budget is None else f"{memory.budget} keys"
    say(
        f"{memory.name}, {budget}, {measure} at {prompt:,} tokens: {value:.4f} ± {error:.4f} | kept "
        f"{measured.keys_at_prompt_end:.1f} at the prompt's end, {measured.mean_keys:.1f} mean | "
        f"{len(measured.values)} sequences, {duration(seconds)}"
    )
    return {
        "memory": {"name": memory.name, "source": memory.source, "keys": memory.budget, "settings": memory.settings},
        "measure": measure,
        "prompt": prompt,
        "data": data,
        "sequences": len(measured.values),
        "value": value,
        "error": error,
        "values": [round(one, 6) for one in measured.values.mean(1).tolist()],
        "keys_at_prompt_end": measured.keys_at_prompt_end,
        "mean_keys": measured.mean_keys,
        "seconds": seconds,
    }


def fingerprint(folder: Path) -> str:
    """SHA-256 over a model's configuration and weights. Raises UserError for a folder without them."""
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    if len(files) < 2:
        raise UserError(f"{folder} has no weights in safetensors: give a folder that `sepllm export` wrote.")
    return hashlib.sha256("".join(hash_file(path).sha256 for path in files).encode()).hexdigest()


def tokenizer_file(folder: Path) -> Path:
    """The tokenizer in a model's folder. Raises UserError when there is none."""
    found = [*folder.glob("tokenizer.json"), *folder.glob("*.model")]
    if not found:
        raise UserError(f"{folder} has neither tokenizer.json nor a SentencePiece .model: export the run again.")
    return found[0]


def _check_context(model: Any, tokens: int, where: str) -> None:
    """Raise UserError when `tokens` tokens pass a model's context."""
    context = model.config.max_position_embeddings
    if tokens > context:
        raise UserError(f"{tokens:,} tokens of {where} pass the model's context of {context:,}: give fewer.")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]
