"""Tokenizers: byte strings of the vocabulary, cutting without changing ids, lossless training."""

from __future__ import annotations

import bz2
import io
import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep import tokenizers
from data_prep.annotate import annotate
from data_prep.tokenize import tokenize_files
from data_prep.tokenizers import HuggingFaceTokenizer, load_tokenizer
from data_prep.train_tokenizer import sample_lines, train_tokenizer
from data_prep.verify import verify
from sepllm_train.base.errors import UserError
from tests.support.datasets import edit_header

# Examples share what fixtures made, and may take any time.
UNCHECKED = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
TRICKY = " \n\t\r\0\u2581\u3000\ufeff\u0301.,aé😀<>0x1FAs/'1"


@pytest.mark.parametrize(
    ("name", "eod", "vocab_size"),
    [("20B_tokenizer.json", 0, 50277), ("gpt2_tokenizer.json", 50256, 50257), ("mistral_v1_tokenizer.model", 2, 32000)],
)
def test_published_tokenizers(shared_data: Path, name: str, eod: int, vocab_size: int) -> None:
    tokenizer = load_tokenizer(shared_data / "tokenizers" / name)
    assert (tokenizer.eod, tokenizer.vocab_size) == (eod, vocab_size)
    table = tokenizer.token_bytes()
    assert len(table) == vocab_size and table[eod] is None
    text = "Naïve café — 東京。\n\tif x:\n        return 😀\n"
    [ids] = tokenizer.encode_batch([text])
    joined = b"".join(table[index] or b"<special>" for index in ids)
    # Mistral's model puts a space in front of the text.
    assert joined.decode("utf8").removeprefix(" ") == text
    assert tokenizer.decode(ids) == text


def test_special_tokens_in_text_are_text(shared_data: Path) -> None:
    tokenizer = load_tokenizer(shared_data / "tokenizers" / "20B_tokenizer.json")
    [ids] = tokenizer.encode_batch(["a<|endoftext|>b"])
    assert tokenizer.eod not in ids
    assert tokenizer.decode(ids) == "a<|endoftext|>b"


def _definition(model: dict[str, object], added: list[dict[str, object]], **parts: object) -> dict[str, object]:
    """A tokenizer.json; `added` tokens have only what differs from the usual."""
    usual = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokens = [usual | token for token in added]
    return {"version": "1.0", "model": model, "added_tokens": tokens, **parts}


_LETTERS = {letter: number for number, letter in enumerate("<>/s|end abcdoft")}
_MERGES = [["<", "/"], ["</", "s"], ["</s", ">"]]
END_IN_VOCABULARY = {**_LETTERS, "</": 20, "</s": 21, "</s>": 22}
END_TOKENIZERS = {
    "added and not special": _definition(
        {"type": "BPE", "vocab": _LETTERS, "merges": []}, [{"id": 30, "content": "</s>", "special": False}]
    ),
    "added, normalized and not special": _definition(
        {"type": "BPE", "vocab": _LETTERS, "merges": []},
        [{"id": 30, "content": "</s>", "special": False, "normalized": True}],
        normalizer={"type": "Lowercase"},
    ),
    "made by merges": _definition({"type": "BPE", "vocab": END_IN_VOCABULARY, "merges": _MERGES}, []),
    "made by merges and special": _definition(
        {"type": "BPE", "vocab": END_IN_VOCABULARY, "merges": _MERGES}, [{"id": 22, "content": "</s>"}]
    ),
    "a piece of a unigram model": _definition(
        {"type": "Unigram", "unk_id": 0, "vocab": [["?", -9.0], ["</s>", -1.0], *([c, -5.0] for c in _LETTERS)]}, []
    ),
    "a word": _definition(
        {"type": "WordLevel", "vocab": {"?": 0, "</s>": 1, "a": 2, "b": 3}, "unk_token": "?"},
        [],
        pre_tokenizer={"type": "WhitespaceSplit"},
    ),
}


@pytest.mark.parametrize("kind", END_TOKENIZERS)
@pytest.mark.parametrize("text", ["a</s>b", "</s>", "a </s> </s> b", "a</S>b", "</s></s>"])
def test_no_text_yields_the_end_token(tmp_path: Path, kind: str, text: str) -> None:
    """However the vocabulary has it: a document that spells it out does not end there."""
    (tmp_path / "end.json").write_text(json.dumps(END_TOKENIZERS[kind]))
    tokenizer = load_tokenizer(tmp_path / "end.json")
    [ids, other] = tokenizer.encode_batch([text, "ab"])
    assert tokenizer.eod not in ids
    assert ids and other == tokenizer.encode_batch(["ab"])[0]
    if kind.startswith(("added and", "made")):
        table = tokenizer.token_bytes()
        kept = "".join(character for character in text if character in _LETTERS)
        assert b"".join(table[index] or b"" for index in ids).decode() == kept


def test_the_space_in_front_of_a_text_is_no_text(texts: list[str], tmp_path: Path) -> None:
    """Of SentencePiece's dummy prefix and its like: the tokens of short documents have the bytes of their text."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(texts).split("\n")), model_writer=model, vocab_size=600, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "dummy.model").write_bytes(model.getvalue())
    short = [f"document {number} ends here" for number in range(50)] + [" a", "  ", "b "]
    (tmp_path / "short.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in short))
    prefix = tmp_path / "short"
    header, _ = tokenize_files([tmp_path / "short.jsonl"], prefix, tmp_path / "dummy.model", progress=False)
    text_bytes = sum(len(text.encode()) for text in short)
    tokens = np.fromfile(f"{prefix}.bin", dtype=np.uint16)
    assert np.array(header.token_bytes)[tokens].sum() == header.bytes == text_bytes
    assert verify(prefix) == header and annotate(prefix, tmp_path / "dummy.model", overwrite=True) == header
    # A side-car of before counts it, and stays valid.
    edit_header(prefix, lambda old: (old.update(version=1), old["token_bytes"].__setitem__(header.tokenizer.eod, 0)))
    assert verify(prefix).version == 1


def test_spaces_in_front_by_the_kind_of_tokenizer(shared_data: Path, tmp_path: Path, trained: Path) -> None:
    folder = shared_data / "tokenizers"
    definition = json.loads((folder / "gpt2_tokenizer.json").read_text(encoding="utf8"))
    definition["pre_tokenizer"]["add_prefix_space"] = True
    (tmp_path / "space.json").write_text(json.dumps(definition))
    found = {
        path.name: load_tokenizer(path).prefix_bytes
        for path in (folder / "gpt2_tokenizer.json", folder / "mistral_v1_tokenizer.model", tmp_path / "space.json")
    }
    assert found == {"gpt2_tokenizer.json": 0, "mistral_v1_tokenizer.model": 1, "space.json": 1}
    assert load_tokenizer(trained).prefix_bytes == 0


@pytest.fixture(scope="module")
def cutting(shared_data: Path) -> HuggingFaceTokenizer:
    tokenizer = load_tokenizer(shared_data / "tokenizers" / "20B_tokenizer.json")
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    return tokenizer


@given(text=st.text(alphabet=" \n\t\r\u2028\x1c\x85ab.'s1(é\u0301\u3000", max_size=80) | st.text(max_size=40))
@settings(max_examples=400, deadline=None, suppress_health_check=UNCHECKED)
def test_cutting_keeps_the_ids_of_any_text(cutting: HuggingFaceTokenizer, text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizers, "_PIECE_CHARACTERS", 1)
        pieces = cutting.split(text)
    assert "".join(pieces) == text
    whole = cutting.encode_batch([text])[0]
    assert [index for ids in cutting.encode_batch(pieces) for index in ids] == whole


def test_cutting_keeps_the_ids_of_books_and_mathematics(cutting: HuggingFaceTokenizer, shared_data: Path) -> None:
    with bz2.open(shared_data / "pg19_test" / "pg19_test_60.jsonl.bz2", "rt", encoding="utf8") as stream:
        book = json.loads(stream.readline())["text"]
    with open(shared_data / "misc" / "math_tex_sample.jsonl", encoding="utf8") as stream:
        mathematics = json.loads(stream.readline())["text"]
    for text in (book[:400_000], mathematics[:200_000]):
        pieces = cutting.split(text)
        assert len(pieces) > 10
        whole = cutting.encode_batch([text])[0]
        assert [index for ids in cutting.encode_batch(pieces) for index in ids] == whole


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}),
        ("pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}),
        ("normalizer", {"type": "Lowercase"}),
    ],
)
def test_other_definitions_are_not_cut(shared_data: Path, tmp_path: Path, part: str, value: dict[str, object]) -> None:
    definition = json.loads((shared_data / "tokenizers" / "20B_tokenizer.json").read_text(encoding="utf8"))
    path = tmp_path / "other.json"
    path.write_text(json.dumps(definition | {part: value}), encoding="utf8")
    text = "a line\n" * 5000
    assert load_tokenizer(path).split(text) == [text]


@pytest.fixture(scope="module", params=["own", "dummy prefix", "without bytes"])
def cut_model(request: pytest.FixtureRequest, texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SentencePiece models of BPE that may be cut, and one that has no newline."""
    path = tmp_path_factory.mktemp("cut") / f"{request.param}.model"
    if request.param == "own":
        train_tokenizer(texts, path, vocab_size=600)
    else:
        _train_dummy(path, texts, byte_fallback=request.param == "dummy prefix")
    return path


def _train_dummy(path: Path, texts: list[str], **options: object) -> None:
    """A model of BPE that puts a space in front of each text."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(texts).split("\n")), model_writer=model, vocab_size=600, model_type="bpe",
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2, **options,
    )  # fmt: skip
    path.write_bytes(model.getvalue())


@given(text=st.text(alphabet=" \n\t\rab._(\u00e9\u0301\u2581\U0001f600", max_size=60) | st.text(max_size=40))
@settings(max_examples=300, deadline=None, suppress_health_check=UNCHECKED)
def test_arrays_are_the_ids_of_any_text(cut_model: Path, text: str) -> None:
    """Also where SentencePiece is given pieces of it."""
    tokenizer = _loaded(cut_model)
    assert (tokenizer._cut_prefix is None) == (cut_model.stem == "without bytes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizers, "_SHORT_PIECE", 1)
        found = tokenizer.encode_arrays([text, "a\nb", text])
    assert [ids.tolist() for ids in found] == tokenizer.encode_batch([text, "a\nb", text])


def test_models_whose_text_is_not_cut(texts: list[str], tmp_path: Path) -> None:
    """Unigram models, an entry with a newline inside, and one that rewrites newlines."""
    train_tokenizer(texts, tmp_path / "unigram.model", vocab_size=600, model_type="unigram")
    _train_dummy(tmp_path / "entry.model", texts, byte_fallback=True, user_defined_symbols=["a\n("])
    model = io.BytesIO()
    lines = "\n".join(texts).split("\n")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=600, model_type="bpe", byte_fallback=True,
        normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "rewrites.model").write_bytes(model.getvalue())
    for name in ("unigram", "entry", "rewrites"):
        tokenizer = load_tokenizer(tmp_path / f"{name}.model")
        assert tokenizer._cut_prefix is None, name
        found = tokenizer.encode_arrays(["a\n(b" * 500])
        assert [ids.tolist() for ids in found] == tokenizer.encode_batch(["a\n(b" * 500])


def test_arrays_of_books(shared_data: Path) -> None:
    """A model that puts a space in front of each text, on text that is cut many times."""
    tokenizer = _loaded(shared_data / "tokenizers" / "mistral_v1_tokenizer.model")
    with bz2.open(shared_data / "pg19_test" / "pg19_test_60.jsonl.bz2", "rt", encoding="utf8") as stream:
        book = json.loads(stream.readline())["text"][:200_000]
    assert tokenizer._cut_prefix == 1 and len(tokenizers._pieces(book, tokenizers._SHORT_PIECE)) > 50
    assert tokenizer.encode_arrays([book])[0].tolist() == tokenizer.encode_batch([book])[0]


@given(text=st.text(max_size=60) | st.text(alphabet=TRICKY, max_size=60))
@settings(max_examples=300, deadline=None, suppress_health_check=UNCHECKED)
def test_trained_tokenizer_is_lossless(trained: Path, text: str) -> None:
    tokenizer = _loaded(trained)
    [ids] = tokenizer.encode_batch([text])
    assert tokenizer.decode(ids) == text
    table = tokenizer.token_bytes()
    assert b"".join(table[index] or b"" for index in ids) == text.encode("utf8")


def test_trained_tokenizer_has_its_fixed_pieces(trained: Path) -> None:
    tokenizer = _loaded(trained)
    assert (tokenizer.eod, tokenizer.vocab_size) == (1, 600)
    assert tokenizer.token_bytes()[:5] == [None, None, b"\n", b"\t", b"\0"]
    assert tokenizer.encode_batch(["\n\n\t\n"]) == [[2, 2, 3, 2]]


def test_training_is_reproducible(texts: list[str], small_tokenizer: Path, tmp_path: Path) -> None:
    train_tokenizer(texts, tmp_path / "again.model", vocab_size=600, workers=2)
    again, first = load_tokenizer(tmp_path / "again.model"), load_tokenizer(small_tokenizer)
    assert again.token_bytes() == first.token_bytes()
    assert again.encode_batch(texts) == first.encode_batch(texts)


def test_sampling_is_bounded_even_and_reproducible() -> None:
    lines = [f"line {number}" for number in range(10_000)]
    sample = sample_lines(("\n".join(lines[start : start + 100]) for start in range(0, 10_000, 100)), 500)
    assert len(sample) == len(set(sample)) == 500
    numbers = [int(line.split()[1]) for line in sample]
    assert 4500 < sum(numbers) / 500 < 5500
    assert sample == sample_lines(["\n".join(lines)], 500)


def test_unusable_tokenizer_files(tmp_path: Path) -> None:
    for name in ("bad.json", "bad.model"):
        (tmp_path / name).write_text("not a tokenizer")
        with pytest.raises(UserError, match=f"{name} is not (JSON|a SentencePiece)"):
            load_tokenizer(tmp_path / name)
    with pytest.raises(UserError, match=r"Cannot read the tokenizer .*missing\.model: No such file"):
        load_tokenizer(tmp_path / "missing.model")


def test_tokenizer_without_end_of_document(tmp_path: Path) -> None:
    definition = {"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}
    (tmp_path / "bare.json").write_text(json.dumps(definition))
    with pytest.raises(UserError, match="no end-of-document token"):
        load_tokenizer(tmp_path / "bare.json")


_LOADED: dict[Path, tokenizers.Tokenizer] = {}


def _loaded(path: Path) -> tokenizers.Tokenizer:
    if path not in _LOADED:
        _LOADED[path] = load_tokenizer(path)
    return _LOADED[path]
