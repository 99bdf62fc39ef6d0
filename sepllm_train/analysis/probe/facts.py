"""Facts in real text: " key = value." between sentences, each value one token that only an earlier mention gives.

A key, the equals sign, a value and the full stop are one token each, so that the prediction of a value is one token
whose candidates can be ranked. Everything that is random depends on a seed alone.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from data_prep.tokenizers import Tokenizer
from sepllm_train.base.errors import UserError

KEYS = 128
VALUES = 32
_WORD = re.compile(rb" [a-z]{3,12}")
_SENTENCE_END = re.compile(r"(?<=[.?!])\s+")
# Sentences of the text between facts: shorter ones are headings and list marks, longer ones tables.
_SHORTEST, _LONGEST = 24, 160


@dataclass(frozen=True)
class FactVocabulary:
    """Token numbers that facts are made of: `keys` [KEYS], `values` [VALUES], disjoint; `equals` and `stop`."""

    keys: tuple[int, ...]
    values: tuple[int, ...]
    equals: int
    stop: int

    def fact(self, key: int, value: int) -> list[int]:
        """Tokens of a fact, from the numbers of its key and value in `keys` and `values`."""
        return [self.keys[key], self.equals, self.values[value], self.stop]


def vocabulary_of(tokenizer: Tokenizer, seed: int = 0) -> FactVocabulary:
    """Words for keys and values: entries of the tokenizer that are a space and a word of small letters.

    Raises UserError for a tokenizer in which " word = word." is not four tokens for enough words.
    """
    words = [index for index, entry in enumerate(tokenizer.token_bytes()) if entry and _WORD.fullmatch(entry)]
    texts = [tokenizer.decode([index]).strip() for index in words]
    encoded = tokenizer.encode_batch([f" {text} = {text}." for text in texts])
    whole = [ids for index, ids in zip(words, encoded, strict=True) if len(ids) == 4 and ids[0] == ids[2] == index]
    marks = {(ids[1], ids[3]) for ids in whole}
    if len(whole) < KEYS + VALUES or len(marks) != 1:
        raise UserError(
            f"{tokenizer.path} has {len(whole)} words that make a fact of four tokens, and {KEYS + VALUES} are needed: "
            "use a larger vocabulary."
        )
    chosen = random.Random(seed).sample([ids[0] for ids in whole], KEYS + VALUES)
    equals, stop = marks.pop()
    return FactVocabulary(tuple(chosen[:KEYS]), tuple(chosen[KEYS:]), equals, stop)


def sentences(texts: Iterable[str]) -> Iterator[str]:
    """Sentences of real text, each with the space before it, in the order of the text."""
    for text in texts:
        for line in text.split("\n"):
            for sentence in _SENTENCE_END.split(line.strip()):
                if _SHORTEST <= len(sentence) <= _LONGEST:
                    yield f" {sentence}"


def documents(
    source: Iterator[str],
    tokenizer: Tokenizer,
    vocabulary: FactVocabulary,
    *,
    facts: Sequence[int],
    items: int,
    shares: Sequence[float],
    seed: int,
) -> Iterator[str]:
    """Documents of `items` sentences: with a probability out of `shares` one of the document's facts, whose number is
    out of `facts`, else the next sentence of `source`. Both are drawn for each document. Ends, with a whole document,
    where the source does."""
    chance = random.Random(seed)
    names = {index: tokenizer.decode([index]).strip() for index in (*vocabulary.keys, *vocabulary.values)}
    while True:
        known = chance.choice(facts)
        keys = chance.sample(vocabulary.keys, known)
        values = chance.choices(vocabulary.values, k=known)
        share = chance.choice(shares)
        parts: list[str] = []
        for _ in range(items):
            if chance.random() < share:
                number = chance.randrange(known)
                parts.append(f" {names[keys[number]]} = {names[values[number]]}.")
            elif (sentence := next(source, None)) is None:
                return
            else:
                parts.append(sentence)
        yield "".join(parts)
