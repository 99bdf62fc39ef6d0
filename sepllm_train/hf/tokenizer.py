"""A run's tokenizer as one of transformers that gives the same ids."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from data_prep.tokenizers import SPACE_MARK, Tokenizer
from sepllm_train.base.errors import UserError, first_line
from sepllm_train.runs.vocabulary import TOKENIZER_NAMES

# Types of pieces and models in SentencePiece's file format.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5
_BPE = 2
_HARD_TEXTS = (
    "",
    " ",
    "\n",
    "A word.",
    " a leading space, and a trailing one ",
    "two  spaces,   three,\tand a tab\t\tor two.\n\n\tA new paragraph?\r\nWith another line break;\n",
    "1234567890 3.14159 -1e-10 0xFF 1,000,000",
    "naïve café, Ærøskøbing, e\u0301 (combining), ﬁ ½ Ⅷ №, “quotes” — dashes… ‘single’",
    "中文,没有空格。日本語のテキスト!한국어 텍스트? العربية، עברית हिन्दी।",
    "👍🏽 👩‍👩‍👧‍👦 🇳🇴 \U00010348 \ue000\u200b\ufeff",
    "def f(x):\n    return {'a': [1, 2], \"b\": x ** 2}  # comment\n\n\nclass A:\n\tpass\n",
    "https://example.org/a?b=c&d=%20 user@example.org <b>bold</b> [1] {2} \\n $x^2$",
)


def to_transformers(tokenizer: Tokenizer) -> Any:
    """A transformers tokenizer that gives the ids of `tokenizer`, which end a document with its eos token.

    Like ours it adds no token by itself, and reads the names of special tokens in a text as text. Raises UserError when
    no such tokenizer can be made of a SentencePiece model.
    """
    definition = _sentencepiece(tokenizer) if tokenizer.kind == "sentencepiece" else _huggingface(tokenizer)
    made = _wrap(definition, tokenizer)
    check_same_ids(made, tokenizer)
    return made


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> str | None:
    """Write the files of transformers' tokenizer to `folder`, and SentencePiece's own file beside them.

    Gives None, or the reason why transformers cannot have it; then only the file itself is written. Raises OSError
    where the disk cannot hold the files.
    """
    shutil.copyfile(tokenizer.path, folder / TOKENIZER_NAMES[tokenizer.kind])
    try:
        _write(to_transformers(tokenizer), folder)
        check_same_ids(_read_again(folder), tokenizer)
    except UserError as error:
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            if name != TOKENIZER_NAMES[tokenizer.kind]:
                (folder / name).unlink(missing_ok=True)
        return str(error)
    return None


def _write(made: Any, folder: Path) -> None:
    try:
        made.save_pretrained(folder)
    except Exception as error:  # the library raises bare Exception, also for a full disk
        if "(os error" not in str(error):
            raise
        raise OSError(first_line(error)) from error


def check_same_ids(made: Any, tokenizer: Tokenizer) -> None:
    """Raise UserError unless a transformers tokenizer encodes and decodes real text as `tokenizer` does."""
    names = [text for name in sorted(made.get_added_vocab()) for text in (name, f"A {name} in a{name}text. {name}")]
    for text in (*_HARD_TEXTS, *names, *(topics[name] for name in sorted(topics)[:20])):
        (ids,) = tokenizer.encode_batch([text])
        if made(text).input_ids != ids:
            raise UserError(f"transformers' tokenizer gives other ids than {tokenizer.path} for {text[:40]!r}.")
        if made.decode(ids) != tokenizer.decode(ids):
            raise UserError(f"transformers' tokenizer writes ids of {text[:40]!r} otherwise than {tokenizer.path}.")


def _read_again(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def _wrap(definition: dict[str, Any], tokenizer: Tokenizer) -> Any:
    """A tokenizer.json as transformers' class."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    try:
        backend = tokenizers.Tokenizer.from_str(json.dumps(definition))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{tokenizer.path} cannot be written as tokenizer.json ({first_line(error)}).") from None
    eos = backend.id_to_token(tokenizer.eod)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=eos,
        pad_token=eos,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
    )


def _huggingface(tokenizer: Tokenizer) -> dict[str, Any]:
    """The tokenizer.json without what cuts, pads or adds tokens: training does none of it."""
    definition = json.loads(tokenizer.path.read_bytes())
    processor = definition.get("post_processor")
    adds = processor is not None and processor["type"] != "ByteLevel"
    # transformers finds those that are not special in every text.
    added = [
        {**token, "special": token["special"] or token["id"] not in tokenizer.encode_batch([token["content"]])[0]}
        for token in definition.get("added_tokens") or []
    ]
    without = {"truncation": None, "padding": None, "post_processor": None if adds else processor}
    return {**definition, **without, "added_tokens": added}


def _sentencepiece(tokenizer: Tokenizer) -> dict[str, Any]:
    """A SentencePiece model as a tokenizer.json. Raises UserError for rules that are not tried out here."""
    model = _proto(tokenizer.path)
    pieces, rules, trainer = model.pieces, model.normalizer_spec, model.trainer_spec
    if rules.precompiled_charsmap or rules.remove_extra_whitespaces or not rules.escape_whitespaces:
        raise UserError(f"{tokenizer.path} rewrites text ({rules.name}), which is not carried over to tokenizer.json.")
    if trainer.model_type != _BPE:
        raise UserError(f"{tokenizer.path} is not a BPE model: of equal splits of a word transformers takes another.")
    # Spaces stay spaces, so that U+2581 in a text is no space where it is none to SentencePiece.
    written = [entry.piece.replace(SPACE_MARK, " ") for entry in pieces]
    found = [number for number, entry in enumerate(pieces) if entry.type in (_UNKNOWN, _CONTROL, _USER_DEFINED)]
    as_space, as_text = tokenizer.encode_batch([f"a{SPACE_MARK}b", "a b"])
    replace = {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "}
    normalizers = [replace] if as_space == as_text else []
    strip = []
    if rules.add_dummy_prefix:
        normalizers.append({"type": "Prepend", "prepend": " "})
        strip.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "version": "1.0",
        "added_tokens": [
            _added(number, written[number], special=pieces[number].type != _USER_DEFINED) for number in found
        ],
        "normalizer": {"type": "Sequence", "normalizers": normalizers} if normalizers else None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": {
            "type": "BPE",
            "vocab": {piece: number for number, piece in enumerate(written)},
            "merges": _merges(pieces, written),
            "unk_token": written[trainer.unk_id],
            "fuse_unk": True,
            "byte_fallback": trainer.byte_fallback,
        },
    }


def _proto(path: Path) -> Any:
    """The content of a SentencePiece file."""
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise UserError(
            f"the rules of {path} cannot be read ({first_line(error)}): pip install -e '.[hf]' in the checkout."
        ) from None
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(path.read_bytes())
    return model


def _merges(pieces: Any, written: list[str]) -> list[list[str]]:
    """Pairs of pieces in the order in which BPE joins them: SentencePiece joins the pair whose whole scores highest.

    Bytes, names of special tokens and user-defined pieces are never joined to.
    """
    joined = [number for number, entry in enumerate(pieces) if entry.type in (_NORMAL, _UNUSED)]
    number_of = {written[number]: number for number in joined}
    merges = []
    for whole in sorted(joined, key=lambda number: -pieces[number].score):
        text = written[whole]
        pairs = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
        known = [pair for pair in pairs if pair[0] in number_of and pair[1] in number_of]
        merges += [list(pair) for pair in sorted(known, key=lambda pair: (number_of[pair[0]], number_of[pair[1]]))]
    return merges


def _added(number: int, content: str, *, special: bool) -> dict[str, Any]:
    """An entry that is found in the text before anything else."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": number, "content": content, **flags, "special": special}
