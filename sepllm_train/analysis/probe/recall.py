"""Recall by likelihood: does the model rank the right value first among all values that facts have?

Two questions, both at distances that stacked windows do not reach. Needle: one fact in real text, asked for at the end.
Associative recall: every later mention of a fact in held-out text of `facts.py`, with the other facts of its document
in between. The rank is by the next token's logit, over all values; by chance the right one is first once in so many.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sepllm_train.analysis.probe.facts import VALUES, FactVocabulary
from sepllm_train.analysis.probe.interventions import Text, far_separators, recording, replacing
from sepllm_train.runs.open import TrainedRun


@dataclass(frozen=True)
class Mention:
    """A value that an earlier mention gives: the query that predicts it is token `query` of sample `sample`.

    `value`: its number among the values. `distance`: tokens from the last mention's value to this one.
    """

    sample: int
    query: int
    value: int
    distance: int


def mentions(tokens: Tensor, labels: Tensor, vocabulary: FactVocabulary) -> Iterator[Mention]:
    """Repeated facts in samples i64 [N, S]; the labels are the tokens after. A key whose value changed, as between two
    documents, is left out."""
    keys = {token: number for number, token in enumerate(vocabulary.keys)}
    values = {token: number for number, token in enumerate(vocabulary.values)}
    for sample, (row, following) in enumerate(zip(tokens.tolist(), labels.tolist(), strict=True)):
        last: dict[int, tuple[int, int]] = {}
        for query in range(1, len(row)):
            if row[query] != vocabulary.equals or row[query - 1] not in keys or following[query] not in values:
                continue
            key, value = keys[row[query - 1]], values[following[query]]
            known = last.get(key)
            if known is not None and known[0] == value:
                yield Mention(sample, query, value, query + 1 - known[1])
            last[key] = (value, query + 1)


def fact_tokens(tokens: Tensor, labels: Tensor, vocabulary: FactVocabulary) -> tuple[Tensor, Tensor]:
    """Labels of samples i64 [N, S] that are keys of facts, and that are any of a fact's four tokens: bool [N, S]."""
    text = torch.cat((tokens[:, :1], labels), 1)
    first = torch.isin(text[:, :-1], torch.tensor(vocabulary.keys)) & (text[:, 1:] == vocabulary.equals)
    keys = torch.zeros_like(text, dtype=torch.bool)
    keys[:, :-1] = first
    every = keys.clone()
    for after in (1, 2, 3):
        every[:, after:] |= keys[:, :-after]
    return keys[:, 1:], every[:, 1:]


@dataclass(frozen=True, eq=False)
class Needle:
    """A fact in real text, asked for at its end, and its twin: the same text with another value in the fact.

    `tokens` and `twin` [S]; the last one is the equals sign. `value` and `other` number the two values. `distance`:
    tokens from the fact's value to the one that is asked for; `asked`, the distance that was wanted.
    """

    tokens: list[int]
    twin: list[int]
    value: int
    other: int
    distance: int
    asked: int


def needles(
    sentences: Sequence[list[int]],
    vocabulary: FactVocabulary,
    distances: Sequence[int],
    each: int,
    length: int,
    seed: int,
) -> Iterator[Needle]:
    """`each` needles for each of `distances`, in sequences of `length` tokens made of `sentences` (their tokens).

    The fact stands between two sentences, so its distance is the nearest one above that asked for.
    """
    chance = random.Random(seed)
    for distance in distances:
        for _ in range(each):
            key = chance.randrange(len(vocabulary.keys))
            value, other = chance.sample(range(VALUES), 2)
            tail: list[int] = []
            # From the fact's value: its stop, sentences, the key and the equals sign, then the value that is asked for.
            while len(tail) + 4 < distance:
                tail += chance.choice(sentences)
            room = max(0, length - len(tail) - 6)
            head: list[int] = []
            while len(head) < room:
                head += chance.choice(sentences)
            head = head[len(head) - room :]
            query = [vocabulary.keys[key], vocabulary.equals]
            texts = [head + vocabulary.fact(key, number) + tail + query for number in (value, other)]
            yield Needle(texts[0], texts[1], value, other, len(tail) + 4, distance)


def rank(logits: Tensor, vocabulary: FactVocabulary, value: int) -> int:
    """Values with a larger logit than `value`, from the logits [V] of the next token: 0 where it is the likeliest."""
    scores = logits[list(vocabulary.values)]
    return int((scores > scores[value]).sum())


@dataclass(frozen=True)
class NeedleAnswer:
    """A model's answer to a needle: `rank` of its value as the model is, `masked` with far separators masked; and
    whether the twin's value is likelier than the text's own, as the model is (`prefers`) and with the values of far
    separators that they have in the twin (`follows`)."""

    needle: Needle
    rank: int
    masked: int
    prefers: bool
    follows: bool


@torch.no_grad()
def ask_needle(
    run: TrainedRun, needle: Needle, classes: np.ndarray, vocabulary: FactVocabulary, without: Callable[[Text], Tensor]
) -> NeedleAnswer:
    """Ask a run's model. classes: u8 [V], separator class of each entry of the vocabulary; without: gives the logits
    [S, V] of a text with far separators masked."""
    device = next(run.model.parameters()).device
    text, twin = (_text(tokens, classes, device) for tokens in (needle.tokens, needle.twin))
    logits = text.forward(run.model, run.pattern, loss=False)[-1]
    with recording(run.model) as values:
        twin.forward(run.model, run.pattern, loss=False)
    with replacing(run.model, values, far_separators(run.pattern, text)):
        swapped = text.forward(run.model, run.pattern, loss=False)[-1]
    own, other = (vocabulary.values[number] for number in (needle.value, needle.other))
    return NeedleAnswer(
        needle,
        rank(logits, vocabulary, needle.value),
        rank(without(text)[-1], vocabulary, needle.value),
        bool(logits[other] > logits[own]),
        bool(swapped[other] > swapped[own]),
    )


def _text(tokens: list[int], classes: np.ndarray, device: torch.device) -> Text:
    """A text as a sample: one document, without labels."""
    ids = torch.tensor(tokens)
    return Text.of(
        {
            "tokens": ids,
            "separator_class": torch.from_numpy(classes[tokens]),
            "document_start": torch.zeros(len(ids), dtype=torch.int32),
        },
        device,
    )
