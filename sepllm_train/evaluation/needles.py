"""RULER's needle-in-a-haystack tasks, made without a network for any tokenizer, length and haystack.

Prompts, kinds of needles and the metric are those of lm-evaluation-harness's tasks `niah_*`, after RULER
(arXiv 2404.06654). Its generator downloads essays and word lists; here the haystack is a text that is given, and the
keys are of the words below. Imports neither torch nor transformers.
"""

from __future__ import annotations

import random
import re
import uuid
from bisect import bisect_right
from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from sepllm_train.base.errors import UserError

Record = dict[str, Any]
# Tokens that an answer may have, as in RULER.
ANSWER = 128
# Percent of the haystack before a needle: 40 evenly spread places.
DEPTHS = tuple(round(100 * step / 39) for step in range(40))
_NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_NEEDLE = "One of the special magic {values} for {key} is: {value}."
_ONE = (
    "A special magic {values} is hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "{values} afterwards.\n{context}\nWhat is the special magic {values} for {query} mentioned in the provided text?"
)
_ALL = (
    "Some special magic {values} are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the {values} afterwards.\n{context}\nWhat are all the special magic {values} for {query} mentioned in the "
    "provided text?"
)
_ADJECTIVES = (
    "able amber ancient bitter blank bold brave brief bright broad calm careful cheap clean clever cold common cool "
    "curious damp dark deep distant dry eager early empty even faint fair famous fast final fine firm flat foreign "
    "fresh gentle giant glad golden grand green happy hard heavy hidden hollow honest huge humble icy idle jolly keen "
    "kind large late lazy light little lively local lonely loose loud lucky mellow mild modern narrow neat noble odd "
    "old open pale patient plain polite proud quick quiet rapid rare raw ready rich ripe rough round royal rusty sad "
    "safe salty sharp shiny short shy silent simple slow small smooth soft solid sour steady steep stiff still strange "
    "strict strong sudden sunny sweet tall tame tender thick thin tidy tiny tired true vast warm weak wet wide wild "
    "wise wooden young"
)
_NOUNS = (
    "acorn anchor apple arrow badge barn barrel basket beach bell bench berry bird blanket boat bottle branch bread "
    "brick bridge broom bucket button cabin cake camera candle canoe canyon carpet castle cellar chair cherry circle "
    "clock cloud coast coat copper corner cotton cradle creek crown cup curtain desert desk door drum eagle engine "
    "fabric farm feather fence field finger flag flame flower forest fork fountain garden gate glove goose grape "
    "hammer harbor hat helmet hill honey horse island jacket jar kettle key kite ladder lake lamp lantern leaf lemon "
    "letter lion lock mantle maple market meadow mirror moon mountain needle nest notebook oak oar ocean onion orchard "
    "oven paddle palace paper parcel pebble pencil pepper piano pillow planet plate pocket pond puzzle quilt rabbit "
    "ribbon river road rocket roof rope rug saddle sail salad shelf shell ship shoe shovel spoon stable stairs stone "
    "stove table temple ticket tiger tower train tree trumpet tulip valley violin wagon wallet whistle willow window "
    "wolf"
)
_KEYS = [f"{adjective}-{noun}" for adjective in _ADJECTIVES.split() for noun in _NOUNS.split()]


@dataclass(frozen=True)
class Kind:
    """Needles of a task. haystack: "noise" repeats five sentences, "text" is the text that is given, "needles" are
    needles with other keys. needles: keys hidden; values: for each; queries: keys asked for."""

    haystack: str
    key: str = "words"
    value: str = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1


KINDS = {
    "niah_single_1": Kind("noise"),
    "niah_single_2": Kind("text"),
    "niah_single_3": Kind("text", value="uuids"),
    "niah_multikey_1": Kind("text", keys=4),
    "niah_multikey_2": Kind("needles"),
    "niah_multikey_3": Kind("needles", key="uuids", value="uuids"),
    "niah_multivalue": Kind("text", values=4),
    "niah_multiquery": Kind("text", keys=4, queries=4),
}


def make_needles(
    encode: Callable[[str], Sized], kind: str, length: int, count: int, seed: int, text: str | None = None
) -> list[Record]:
    """Records of the task `kind` whose prompts, with the ANSWER tokens after them, have at most `length` tokens.

    encode: a text's tokens, whatever is put before every text included. text: the haystack of kinds that need one; its
    beginning is used, as in RULER. The needle that is asked for is at every depth about equally often, the first 40
    records at 40 depths. A record has the fields of the harness's tasks: index, input (the prompt up to the question),
    gen_prefix (what the prompt ends with, after a space), outputs (the answers), length (tokens, ANSWER included),
    max_length; and depth, that of its first answer in percent. Equal arguments give equal records.

    Raises UserError for an unknown kind, a text that is missing or too short, and a length without room for a needle.
    """
    if kind not in KINDS:
        raise UserError(f"the needle task {kind!r} is unknown: choose from {', '.join(KINDS)}.")
    chosen = KINDS[kind]
    words = _words(chosen, kind, text)
    # A word, a sentence of noise and a needle have at least a token each.
    most = min(length, len(words)) if chosen.haystack == "text" else length
    depths = random.Random(f"{seed} {kind} {length}").sample(DEPTHS, len(DEPTHS))
    records: list[Record] = []
    units = 0
    for index in range(count):
        drawn = _Drawn(chosen, f"{seed} {kind} {length} {index}", depths[index % len(depths)])

        def tokens(units: int, drawn: _Drawn = drawn) -> int:
            return len(encode(" ".join(drawn.prompt(words, units)))) + ANSWER

        if index == 0:
            units = max(1, bisect_right(range(most + 1), length, key=tokens) - 1)
            if chosen.haystack == "text" and units == len(words) and tokens(units) <= length:
                raise UserError(
                    f"the haystack of {units:,} words is too short for {kind} of {length:,} tokens: with all of it a "
                    f"prompt has {tokens(units):,}; give a longer text."
                )
        used = units
        while (found := tokens(used)) > length and used > 1:
            used -= max(1, used // 200)
        if found > length:
            raise UserError(f"{kind} of {length:,} tokens has no room for a needle: {found:,} are the fewest.")
        prompt, prefix = drawn.prompt(words, used)
        made = {"index": index, "input": prompt, "gen_prefix": prefix, "outputs": drawn.answers}
        records.append({**made, "length": found, "max_length": length, "depth": drawn.depth})
    return records


def _words(kind: Kind, name: str, text: str | None) -> list[str]:
    """The words of the haystack; none for a kind that has its own. Raises UserError where there is none to be used."""
    if kind.haystack != "text":
        return []
    words = (text or "").split()
    if not words:
        raise UserError(f"{name} hides its needles in a text: give one with --haystack FILE.")
    return words


class _Drawn:
    """The keys, values and depths of a record, drawn before its size is known."""

    def __init__(self, kind: Kind, seed: str, depth: int) -> None:
        rng = random.Random(seed)
        self.kind = kind
        self.seed = seed
        self.depth = depth
        drawn = [_draw(rng, kind.key) for _ in range(kind.keys)]
        pairs = [(key, _draw(rng, kind.value)) for key in drawn for _ in range(kind.values)]
        # Of several keys the first is asked for: the others are as likely before it as after it.
        others = rng.sample([one for one in DEPTHS if one != depth], len(pairs) - 1)
        needles = [_NEEDLE.format(values=kind.value, key=key, value=value) for key, value in pairs]
        self.places = list(zip([depth, *others], needles, strict=True))
        self.queries = drawn[: kind.queries]
        self.answers = [value for key, value in pairs if key in self.queries]

    def prompt(self, words: Sequence[str], units: int) -> tuple[str, str]:
        """The prompt with a haystack of `units` words, sentences or other needles, and what it ends with."""
        places = sorted(self.places)
        if self.kind.haystack == "text":
            parts, between = re.split(r"(?<=[.!?]) ", " ".join(words[:units])), " "
        else:
            parts, between = self._lines(units), "\n"
        bounds = [0, *(len(parts) * depth // 100 for depth, _ in places), len(parts)]
        stretches = [between.join(parts[start:end]) for start, end in pairwise(bounds)]
        needles = [needle for _, needle in places]
        pieces = [piece for both in zip(stretches, [*needles, ""], strict=True) for piece in both if piece]
        one = len(self.answers) == 1
        values = self.kind.value.removesuffix("s") if one else self.kind.value
        query = ", and ".join((", ".join(self.queries[:-1]), self.queries[-1]) if self.queries[1:] else self.queries)
        prompt = (_ONE if one else _ALL).format(values=values, context=between.join(pieces), query=query)
        verb = "is" if one else "are"
        return prompt, f"The special magic {values} for {query} mentioned in the provided text {verb}"

    def _lines(self, units: int) -> list[str]:
        """Lines of noise, or needles with other keys: more units begin with the same ones."""
        if self.kind.haystack == "noise":
            return [_NOISE] * units
        rng = random.Random(f"{self.seed} others")
        drawn = [(_draw(rng, self.kind.key), _draw(rng, self.kind.value)) for _ in range(units)]
        # Keys are few enough to be drawn again, and what is asked for has one answer: such a line is left out.
        return [
            _NEEDLE.format(values=self.kind.value, key=key, value=value)
            for key, value in drawn
            if key not in self.queries
        ]


def _draw(rng: random.Random, what: str) -> str:
    if what == "numbers":
        return str(rng.randrange(10**6, 10**7))
    if what == "uuids":
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))
    return rng.choice(_KEYS)
