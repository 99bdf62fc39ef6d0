"""Facts in text: four tokens each, told again and again, with nothing else that tells them."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest
import torch

from data_prep.readers import Corpus
from data_prep.tokenizers import Tokenizer, load_tokenizer
from data_prep.train_tokenizer import train_tokenizer
from sepllm_train.analysis.probe.facts import KEYS, VALUES, FactVocabulary, documents, sentences, vocabulary_of
from sepllm_train.analysis.probe.recall import fact_tokens, mentions, needles
from sepllm_train.base.errors import UserError
from tests.analysis.probe.conftest import Probed
from tests.support.command import command

main = command("probe")


@pytest.fixture(scope="module")
def tokenizer(probed: Probed) -> Tokenizer:
    return load_tokenizer(probed.tokenizer)


@pytest.fixture(scope="module")
def vocabulary(tokenizer: Tokenizer) -> FactVocabulary:
    return vocabulary_of(tokenizer)


def test_a_fact_is_four_tokens(tokenizer: Tokenizer, vocabulary: FactVocabulary) -> None:
    assert len({*vocabulary.keys, *vocabulary.values}) == KEYS + VALUES
    for key, value in ((0, 0), (KEYS - 1, VALUES - 1), (17, 23)):
        ids = vocabulary.fact(key, value)
        assert tokenizer.encode_batch([f"It ends.{tokenizer.decode(ids)}"])[0][-4:] == ids


def test_documents_repeat_their_facts(tokenizer: Tokenizer, vocabulary: FactVocabulary, probed: Probed) -> None:
    def some(seed: int) -> list[str]:
        source = sentences(document.text for document in Corpus([probed.text]))
        made = documents(source, tokenizer, vocabulary, facts=[4], items=40, shares=[0.5], seed=seed)
        return list(islice(made, 3))

    texts = some(1)
    assert texts == some(1) != some(2)
    for text in texts:
        ids = torch.tensor(tokenizer.encode_batch([text])[0])
        found = list(mentions(ids[None, :-1], ids[None, 1:], vocabulary))
        # Of some 20 facts all but the first mention of each of four are repeated.
        assert 8 <= len(found) <= 32
        for mention in found:
            before = ids[: mention.query - 1].tolist()
            key, value = int(ids[mention.query - 1]), vocabulary.values[mention.value]
            told = [at for at in range(len(before) - 2) if before[at] == key and before[at + 1] == vocabulary.equals]
            assert before[told[-1] + 2] == value == int(ids[mention.query + 1])
            assert mention.distance == mention.query + 1 - (told[-1] + 2)


def test_a_key_with_a_new_value_is_no_repetition(vocabulary: FactVocabulary) -> None:
    facts = [vocabulary.fact(0, 1), vocabulary.fact(0, 2), vocabulary.fact(0, 2), vocabulary.fact(1, 2)]
    ids = torch.tensor([token for fact in facts for token in fact])
    found = list(mentions(ids[None, :-1], ids[None, 1:], vocabulary))
    assert [(mention.query, mention.value, mention.distance) for mention in found] == [(9, 2, 4)]


def test_tokens_of_facts_are_found(vocabulary: FactVocabulary) -> None:
    plain = next(token for token in range(500) if token not in vocabulary.keys)
    ids = torch.tensor([plain, *vocabulary.fact(3, 4), plain, *vocabulary.fact(5, 6)[:2]])
    keys, facts = fact_tokens(ids[None, :-1], ids[None, 1:], vocabulary)
    assert keys[0].tolist() == [True, False, False, False, False, True, False]
    assert facts[0].tolist() == [True, True, True, True, False, True, True]


def test_needles_are_where_they_should_be(tokenizer: Tokenizer, vocabulary: FactVocabulary, probed: Probed) -> None:
    source = sentences(document.text for document in Corpus([probed.text]))
    filling = tokenizer.encode_batch(list(islice(source, 50)))
    for needle in needles(filling, vocabulary, [30, 60], 5, 160, seed=3):
        assert len(needle.tokens) == len(needle.twin) == 160 and needle.tokens[-1] == vocabulary.equals
        different = [at for at in range(160) if needle.tokens[at] != needle.twin[at]]
        assert len(different) == 1 and 160 - different[0] == needle.distance >= needle.asked
        assert needle.tokens[different[0]] == vocabulary.values[needle.value]
        assert needle.tokens[different[0] - 2] == needle.tokens[-2] in vocabulary.keys


def test_small_vocabulary(tmp_path: Path, probed: Probed) -> None:
    small = tmp_path / "small.model"
    train_tokenizer([probed.text.read_text(encoding="utf8")], small, vocab_size=400)
    with pytest.raises(UserError, match="make a fact of four tokens, and 160 are needed"):
        vocabulary_of(load_tokenizer(small))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--facts", "0"], "--facts 0 must be 1 to 128"),
        (["--shares", "0.5,1"], "--shares 1 must be above 0 and below 1"),
        (["--documents", "0"], "--documents 0 must be at least 1"),
        (["--sentences", "100000"], "is too short for one document"),
    ],
)
def test_mistakes(
    probed: Probed, tmp_path: Path, capsys: pytest.CaptureFixture, options: list[str], words: str
) -> None:
    output = tmp_path / "facts.jsonl"
    made = ["text", str(probed.text), "--tokenizer", str(probed.tokenizer), "--output", str(output)]
    assert main([*made, *options]) == 2
    assert words in capsys.readouterr().err and not output.exists()


def test_nothing_is_overwritten(probed: Probed, capsys: pytest.CaptureFixture) -> None:
    before = probed.facts.read_bytes()
    made = ["text", str(probed.text), "--tokenizer", str(probed.tokenizer), "--output", str(probed.facts)]
    assert main(made) == 2 and "is there already" in capsys.readouterr().err
    assert probed.facts.read_bytes() == before
    assert len(json.loads(before.splitlines()[0])["text"]) > 100
