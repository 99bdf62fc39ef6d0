"""The strongest classes within a budget of density: against all choices, and on five kinds of real text."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.density import STRENGTHS, TOLERANCE, class_names, select
from data_prep.readers import Corpus
from data_prep.separators import CLASSES, class_numbers, classify
from data_prep.tokenizers import Tokenizer, load_tokenizer
from data_prep.train_tokenizer import train_tokenizer

REPOSITORY = Path(__file__).resolve().parents[2]
LEAST, MOST = 0.08, 0.16
CHARACTERS = 200_000
PIECE = 20_000


def test_every_class_has_one_strength() -> None:
    assert sorted(itertools.chain(*STRENGTHS.values())) == sorted(entry.name for entry in CLASSES)


@settings(deadline=None)
@given(
    st.dictionaries(st.integers(1, len(CLASSES)), st.floats(0, 0.2), max_size=7),
    st.floats(0, 0.3),
    st.floats(0.001, 0.3),
)
def test_the_budget_is_met_whenever_it_can_be(shares: dict[int, float], least: float, width: float) -> None:
    chosen = select(shares, least, least + width)
    assert chosen.density == pytest.approx(sum(shares[number] for number in chosen.numbers))
    assert chosen.density <= least + width + TOLERANCE
    sums = [
        sum(choice) for count in range(len(shares) + 1) for choice in itertools.combinations(shares.values(), count)
    ]
    if any(least + TOLERANCE < total < least + width - TOLERANCE for total in sums):
        assert chosen.density >= least - TOLERANCE


def named(**shares: float) -> list[str]:
    """Names chosen from shares by class name, under the usual budget."""
    numbers = {class_numbers([name])[0]: share for name, share in shares.items()}
    return class_names(select(numbers, LEAST, MOST).numbers, {})


def test_strong_boundaries_come_first() -> None:
    assert named(paragraph_merged=0.01, newline=0.06, period=0.05, comma=0.05, space_run=0.03) == [
        "period", "newline", "paragraph_merged", "space_run",
    ]  # fmt: skip
    assert named(comma=0.1, semicolon=0.09) == ["semicolon"]
    assert named(newline=0.05, period=0.12) == ["period"]
    assert named(newline=0.4, period=0.04) == ["period"]
    assert named(newline=0.0, period=0.1) == ["period"]
    assert named(newline=0.4) == named() == []


def test_twenty_classes_of_which_no_choice_fits_take_no_time() -> None:
    shares = {entry.number: 0.001 + entry.number * 1e-6 for entry in CLASSES} | {7: 0.4}
    assert select(shares, 0.39, 0.399).density == pytest.approx(sum(shares.values()) - 0.4)
    shares[7] = 0.398
    assert select(shares, 0.3991, 0.39913).density < 0.39914


def english(request: pytest.FixtureRequest) -> Iterator[str]:
    """Modern English."""
    corpus = request.getfixturevalue("shared_data") / "corpora" / "modern_english.jsonl.bz2"
    return (document.text for document in Corpus([corpus]))


def documentation(request: pytest.FixtureRequest | None = None) -> Iterator[str]:
    """English about programs: this project's pages."""
    return (file.read_text(encoding="utf8") for file in sorted((REPOSITORY / "docs").glob("*.md")))


def python(request: pytest.FixtureRequest | None = None) -> Iterator[str]:
    """Source of this project."""
    return (file.read_text(encoding="utf8") for file in sorted((REPOSITORY / "sepllm_train").rglob("*.py")))


def latex(request: pytest.FixtureRequest) -> Iterator[str]:
    """Mathematics."""
    return (
        document.text
        for document in Corpus([request.getfixturevalue("shared_data") / "misc" / "math_tex_sample.jsonl"])
    )


def chinese(request: pytest.FixtureRequest) -> Iterator[str]:
    """A short text about separators."""
    yield Path(__file__).with_name("chinese.txt").read_text(encoding="utf8")


def json_files(request: pytest.FixtureRequest) -> Iterator[str]:
    """This project's results, as they are."""
    return (file.read_text(encoding="utf8") for file in sorted((REPOSITORY / "results").rglob("*.json")))


def json_lines(request: pytest.FixtureRequest) -> Iterator[str]:
    """The same, each on one line without spaces."""
    return (json.dumps(json.loads(text), separators=(",", ":")) for text in json_files(request))


KINDS = (english, documentation, python, json_files, json_lines, latex, chinese)


@pytest.fixture(scope="module")
def pieces(request: pytest.FixtureRequest) -> Callable[[Callable], list[str]]:
    """Some text of a kind, cut into pieces; made once."""

    @cache
    def take(kind: Callable) -> list[str]:
        taken: list[str] = []
        for text in kind(request):
            taken.append(text[:PIECE])
            if sum(map(len, taken)) > CHARACTERS:
                break
        return taken

    return take


def shares_of(texts: list[str], tokenizer: Tokenizer) -> dict[int, float]:
    """Share of the tokens that each class has."""
    ids = np.concatenate([np.array(encoded, dtype=np.int64) for encoded in tokenizer.encode_batch(texts)])
    counts = np.bincount(classify(tokenizer.token_bytes())[ids], minlength=256)
    return {entry.number: float(counts[entry.number]) / len(ids) for entry in CLASSES}


@pytest.fixture(scope="module", params=["20B_tokenizer.json", "gpt2_tokenizer.json", "mistral_v1_tokenizer.model"])
def tokenizer(request: pytest.FixtureRequest, shared_data: Path) -> Tokenizer:
    """Three tokenizers in wide use."""
    return load_tokenizer(shared_data / "tokenizers" / request.param)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_text_lands_in_the_budget(pieces: Callable, tokenizer: Tokenizer, kind: Callable) -> None:
    shares = shares_of(pieces(kind), tokenizer)
    chosen = select(shares, LEAST, MOST)
    if kind is chinese and tokenizer.path.name.startswith("gpt2"):
        # It cuts most Chinese marks into bytes: no choice of its entries is dense enough.
        assert chosen.density == pytest.approx(sum(shares.values())) and chosen.density < LEAST
        return
    assert LEAST <= chosen.density <= MOST


@pytest.fixture(scope="module")
def own_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer as small as that of the sample corpus, trained on two kinds of text."""
    path = tmp_path_factory.mktemp("own") / "own.model"
    train_tokenizer(itertools.chain(documentation(), python()), path, vocab_size=4096)
    return load_tokenizer(path)


@pytest.mark.parametrize("kind", [documentation, python, json_files, json_lines], ids=lambda kind: kind.__name__)
def test_text_lands_in_the_budget_with_a_small_tokenizer(
    pieces: Callable, own_tokenizer: Tokenizer, kind: Callable
) -> None:
    assert LEAST <= select(shares_of(pieces(kind), own_tokenizer), LEAST, MOST).density <= MOST
