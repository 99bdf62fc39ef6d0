"""Tokenizers behind one interface: Hugging Face `tokenizer.json` and SentencePiece `.model` files.

Only the libraries `tokenizers` and `sentencepiece` are used, each imported when a file of its kind is loaded.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sepllm_train.base.errors import UserError, first_line
from sepllm_train.base.parsing import LARGEST_JSON, parse_json_object

EOD_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
SPACE_MARK = "\u2581"

# A newline followed by a visible ASCII character. Everything in front of the newline is tokenised the same with and
# without it (see `_cuts_before_newlines`), so a document may be cut there.
_CUT = re.compile(r"\n(?=[!-~])")
_PIECE_CHARACTERS = 8192
_SHORT_PIECE = 512
# Ids beyond are a mistake: every table of a vocabulary has an entry for each.
_LARGEST_VOCABULARY = 1 << 22
_LIBRARY_ERRORS = (RuntimeError, OSError, ValueError, TypeError, IndexError, OverflowError)
_JSON_REMEDY = "give a tokenizer.json or a SentencePiece .model"


class Tokenizer(ABC):
    """A vocabulary and its encoder, loaded by `load_tokenizer`.

    Attributes: `path` of the file; `kind` ("huggingface" or "sentencepiece"); `sha256` of the file's bytes;
    `vocab_size`, the highest id plus one; `eod`, the id written after each document.
    """

    kind: str

    def __init__(self, path: Path, content: bytes, vocab_size: int, eod: int) -> None:
        self.path = path
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.vocab_size = vocab_size
        self.eod = eod

    @property
    def suffix(self) -> str:
        """Suffix of the copy kept beside the data: `.tokenizer.json` or `.tokenizer.model`."""
        return ".tokenizer.json" if self.kind == "huggingface" else ".tokenizer.model"

    @abstractmethod
    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text; no special tokens are added and none is recognised inside the text."""

    def encode_arrays(self, texts: list[str]) -> list[NDArray[np.int32]]:
        """`encode_batch` in arrays, i32."""
        return [np.array(ids, dtype=np.int32) for ids in self.encode_batch(texts)]

    @abstractmethod
    def decode(self, ids: list[int]) -> str:
        """Text of the ids; special tokens are written by name where the library has a name for them."""

    @abstractmethod
    def token_bytes(self) -> list[bytes | None]:
        """Byte string of each vocabulary entry, [vocab_size]; None for special and unused entries."""

    @cached_property
    def prefix_bytes(self) -> int:
        """Bytes of the space that encoding puts in front of each text, 0 for most tokenizers: they are no text."""
        table = self.token_bytes()
        [ids] = self.encode_batch(["a"])
        return int(b"".join(table[index] or b"" for index in ids).startswith(b" "))

    def split(self, text: str) -> list[str]:
        """Pieces of `text` whose ids, concatenated, are the ids of `text`; [text] where that is not certain."""
        return [text]


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json` of the library `tokenizers`.

    ends_documents: whether it must have a token that ends a document; `eod` is -1 where it need not and has none.
    """

    kind = "huggingface"

    def __init__(self, path: Path, content: bytes, *, ends_documents: bool = True) -> None:
        import tokenizers

        self._definition = parse_json_object(content, path, _JSON_REMEDY, nan=True)
        what = f"{path} is not a Hugging Face tokenizer.json"
        with _refusals_of_the_library(what):
            self._tokenizer = tokenizers.Tokenizer.from_str(content.decode("utf-8-sig"))
            vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        end = next((name for name in EOD_NAMES if name in vocabulary), None)
        if end is None and ends_documents:
            raise UserError(f"{path} has no end-of-document token: one of {', '.join(EOD_NAMES)} is needed.")
        size = max(vocabulary.values(), default=-1) + 1
        _check_size(path, size)
        with _refusals_of_the_library(what):
            if (marked := _with_special(self._definition, end)) != self._definition:
                self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(marked))
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            # A document that spells out "<|endoftext|>" must not end there.
            self._tokenizer.encode_special_tokens = True
        super().__init__(path, content, size, -1 if end is None else vocabulary[end])
        self._can_cut = _cuts_before_newlines(self._definition)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """See `Tokenizer.encode_batch`."""
        with _refusals_of_the_library(f"{self.path} cannot encode a text"):
            encoded = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        found = [encoding.ids for encoding in encoded]
        return [self._without_end(text) if self.eod in ids else ids for text, ids in zip(texts, found, strict=True)]

    def _without_end(self, text: str) -> list[int]:
        """Ids of a text from which the model itself makes the end-of-document token: the text is cut inside of it."""
        with _refusals_of_the_library(f"{self.path} cannot encode a text"):
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
        ids, start = [], 0
        spans = [span for index, span in zip(encoding.ids, encoding.offsets, strict=True) if index == self.eod]
        if not spans:
            return encoding.ids
        for begin, end in spans:
            # Before its last character: the rest is shorter than the token, and what is in front has no end to it.
            cut = max(begin + 1, end - 1)
            if not start < cut < len(text) or end - begin < 2:
                raise UserError(
                    f"{self.path} makes its end-of-document token of {text[begin:end]!r} in a text, which would end "
                    "the document there: give another tokenizer, or text without it."
                )
            ids += self._without_end(text[start:cut])
            start = cut
        return ids + self._without_end(text[start:])

    def decode(self, ids: list[int]) -> str:
        """See `Tokenizer.decode`."""
        with _refusals_of_the_library(f"{self.path} cannot decode its tokens"):
            return self._tokenizer.decode(ids, skip_special_tokens=False)

    def token_bytes(self) -> list[bytes | None]:
        """See `Tokenizer.token_bytes`."""
        entry_bytes = _byte_level_bytes if _uses_byte_level(self._definition) else _piece_bytes
        table: list[bytes | None] = [None] * self.vocab_size
        for entry, index in self._tokenizer.get_vocab(with_added_tokens=False).items():
            table[index] = entry_bytes(entry)
        for index, added in self._tokenizer.get_added_tokens_decoder().items():
            table[index] = None if added.special else added.content.encode("utf8")
        return table

    def split(self, text: str) -> list[str]:
        """See `Tokenizer.split`."""
        return _pieces(text, _PIECE_CHARACTERS) if self._can_cut else [text]


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece `.model` file."""

    kind = "sentencepiece"

    def __init__(self, path: Path, content: bytes) -> None:
        import sentencepiece

        what = f"{path} is not a SentencePiece model"
        with _refusals_of_the_library(what):
            self._model = sentencepiece.SentencePieceProcessor(model_proto=content)
        _check_size(path, self._model.get_piece_size())
        if self._model.eos_id() < 0:
            raise UserError(f"{path} has no end-of-sentence piece to end documents with: train it with an eos_id.")
        super().__init__(path, content, self._model.get_piece_size(), self._model.eos_id())
        with _refusals_of_the_library(what):
            self._mark_ids = self._space_mark_ids()
        # Older versions of the library give lists alone.
        self._gives_arrays = "return_type" in inspect.signature(self._model.encode).parameters

    def _space_mark_ids(self) -> list[int] | None:
        """Byte pieces of U+2581, which SentencePiece reads as a space; None where the model rewrites text anyway."""
        names = [f"<0x{byte:02X}>" for byte in SPACE_MARK.encode("utf8")]
        ids = [self._model.piece_to_id(name) for name in names]
        sample = " a  b "
        keeps_text = self._model.normalize(sample) == sample.replace(" ", SPACE_MARK)
        return ids if keeps_text and all(self._model.is_byte(index) for index in ids) else None

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """See `Tokenizer.encode_batch`."""
        with _refusals_of_the_library(f"{self.path} cannot encode a text"):
            if self._mark_ids is None or not _have_marks(texts):
                return self._model.encode(texts, num_threads=1)
            return [self._encode_with_marks(text, self._mark_ids) for text in texts]

    def encode_arrays(self, texts: list[str]) -> list[NDArray[np.int32]]:
        """See `Tokenizer.encode_arrays`. No lists of Python's numbers are made, and short pieces are encoded, which is
        faster than a long text: the library's queue of merges grows with it."""
        if not self._gives_arrays or (self._mark_ids is not None and _have_marks(texts)):
            return super().encode_arrays(texts)
        pieces = [_pieces(text, _SHORT_PIECE) if self._cut_prefix is not None else [text] for text in texts]
        with _refusals_of_the_library(f"{self.path} cannot encode a text"):
            flat = [piece for of_text in pieces for piece in of_text]
            arrays = iter(self._model.encode(flat, num_threads=1, return_type="numpy"))
        return [self._joined([next(arrays) for _ in of_text]) for of_text in pieces]

    def _joined(self, arrays: list[NDArray[np.int32]]) -> NDArray[np.int32]:
        """Ids of a text from those of its pieces."""
        first, *rest = arrays
        return np.concatenate([first, *(ids[self._cut_prefix :] for ids in rest)]) if rest else first

    @cached_property
    def _cut_prefix(self) -> int | None:
        """Ids that a piece of a text which is cut before a newline gets in front of its own: of the space that is put
        there, if any. None where a cut could change ids.

        It cannot where no entry has a newline behind its first character: no merge of BPE then crosses the cut. Nor may
        the model rewrite text, or take a newline for unknown, which it joins to unknown characters around it. A unigram
        model sums logarithms, which are rounded by what came before; the scores of BPE are ranks, so whole numbers.
        """
        model = self._model
        ids = range(self.vocab_size)
        sample = "\na  b\r\n\n c\t"
        kept = sample.replace(" ", SPACE_MARK)
        encoded = model.encode("\na")
        prefix = {kept: 0, SPACE_MARK + kept: 1}.get(model.normalize(sample))
        if (
            prefix is None
            or (prefix and encoded[0] != model.piece_to_id(SPACE_MARK))
            or model.unk_id() in encoded
            or any("\n" in model.id_to_piece(index)[1:] for index in ids)
            or any(model.get_score(index) % 1 for index in ids)
        ):
            return None
        return prefix

    def _encode_with_marks(self, text: str, mark_ids: list[int]) -> list[int]:
        first, *rest = self._model.encode(text.split(SPACE_MARK), num_threads=1)
        return first + [index for ids in rest for index in (*mark_ids, *ids)]

    def decode(self, ids: list[int]) -> str:
        """See `Tokenizer.decode`."""
        with _refusals_of_the_library(f"{self.path} cannot decode its tokens"):
            return self._model.decode(ids)

    def token_bytes(self) -> list[bytes | None]:
        """See `Tokenizer.token_bytes`."""
        model = self._model
        with _refusals_of_the_library(f"{self.path} is not a SentencePiece model"):
            return [
                None
                if model.is_control(index) or model.is_unknown(index) or model.is_unused(index)
                else _piece_bytes(model.id_to_piece(index))
                for index in range(self.vocab_size)
            ]


def _pieces(text: str, least: int) -> list[str]:
    """Pieces of a text, of at least `least` characters, cut before newlines that a visible ASCII character follows."""
    if len(text) < 2 * least:
        return [text]
    pieces, start = [], 0
    while cut := _CUT.search(text, start + least):
        pieces.append(text[start : cut.start()])
        start = cut.start()
    pieces.append(text[start:])
    return pieces


def _have_marks(texts: list[str]) -> bool:
    return any(SPACE_MARK in text for text in texts)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer file; a `.json` is Hugging Face's format, anything else SentencePiece's.

    Raises UserError when the file is missing, cannot be read as its format, or has no end-of-document token.
    """
    path = Path(path)
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise UserError(f"{path} has {path.stat().st_size:,} bytes, too many for a tokenizer: {_JSON_REMEDY}.")
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"Cannot read the tokenizer {path}: {error.strerror}.") from None
    return HuggingFaceTokenizer(path, content) if path.suffix == ".json" else SentencePieceTokenizer(path, content)


@contextmanager
def _refusals_of_the_library(what: str) -> Iterator[None]:
    """Turn what a tokenizer library raises into a UserError that begins with `what`."""
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        # `tokenizers` raises bare Exception, or its panics; `sentencepiece` others by version and by what is damaged.
        if type(error) is not Exception and not isinstance(error, _LIBRARY_ERRORS) and not _is_panic(error):
            raise
        raise UserError(f"{what} ({first_line(error)}): {_JSON_REMEDY}.") from None


def _is_panic(error: BaseException) -> bool:
    """True for a panic of a library in Rust, whose class cannot be imported."""
    return type(error).__name__ == "PanicException"


def _check_size(path: Path, size: int) -> None:
    """Raise UserError for a vocabulary that has no entries, or ids that no vocabulary has."""
    if not 0 < size <= _LARGEST_VOCABULARY:
        raise UserError(f"{path} has ids up to {size - 1:,}, which is no vocabulary: {_JSON_REMEDY}.")


def _with_special(definition: dict[str, Any], end: str | None) -> dict[str, Any]:
    """A tokenizer.json in which the token `end` is special: one that is not would be found in text."""
    added = definition.get("added_tokens") or []
    if all(token["special"] for token in added if token["content"] == end):
        return definition
    return {
        **definition,
        "added_tokens": [{**token, "special": token["special"] or token["content"] == end} for token in added],
    }


def _byte_alphabet() -> dict[str, int]:
    """Character to byte of byte-level BPE: printable Latin-1 stands for itself, the rest is moved to U+0100 and up."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in set(visible)]
    return {chr(byte): byte for byte in visible} | {chr(256 + place): byte for place, byte in enumerate(hidden)}


_BYTE_ALPHABET = _byte_alphabet()


def _byte_level_bytes(entry: str) -> bytes:
    try:
        return bytes(_BYTE_ALPHABET[character] for character in entry)
    except KeyError:  # an entry outside the alphabet stands for its own text
        return entry.encode("utf8")


def _piece_bytes(piece: str) -> bytes:
    if re.fullmatch("<0x[0-9A-Fa-f]{2}>", piece):
        return bytes([int(piece[3:5], 16)])
    return piece.replace(SPACE_MARK, " ").encode("utf8")


def _components(part: Any) -> list[dict[str, Any]]:
    """A normalizer, pre-tokenizer or decoder as a flat list of its steps, without what the library does not read."""
    if not isinstance(part, dict):
        return []
    nested = part.get("pretokenizers") or part.get("normalizers") or part.get("decoders")
    return [step for inner in nested for step in _components(inner)] if isinstance(nested, list) and nested else [part]


def _uses_byte_level(definition: dict[str, Any]) -> bool:
    steps = [*_components(definition.get("pre_tokenizer")), *_components(definition.get("decoder"))]
    return any(step.get("type") == "ByteLevel" for step in steps)


def _cuts_before_newlines(definition: dict[str, Any]) -> bool:
    """True when cutting text before a newline that a visible ASCII character follows cannot change its ids.

    True for GPT-2's byte-level splitting pattern, which tries ` ?letters`, ` ?digits`, ` ?others`,
    `\\s+(?!\\S)`, `\\s+`: a whitespace run in front of a visible character is split before its last character
    (the look-ahead makes the longer match give it back), and a last character that is a newline joins nothing. So
    the cut lies between two pre-tokens already, both halves are split as before, and BPE never crosses pre-tokens.
    NFC composes nothing with a newline; added tokens must neither contain one nor swallow whitespace around them.
    """
    check: list[Callable[[], bool]] = [
        lambda: all(step.get("type") == "NFC" for step in _components(definition.get("normalizer"))),
        lambda: (
            [
                (step.get("type"), step.get("add_prefix_space"), step.get("use_regex", True))
                for step in _components(definition.get("pre_tokenizer"))
            ]
            == [("ByteLevel", False, True)]
        ),
        lambda: definition["model"].get("type", "BPE") == "BPE" and not definition["model"].get("dropout"),
        lambda: (
            not any(
                "\n" in token["content"] or token["lstrip"] or token["rstrip"] or token["single_word"]
                for token in definition.get("added_tokens", [])
            )
        ),
    ]
    return all(condition() for condition in check)
