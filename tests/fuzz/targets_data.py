"""Readers of tokenised datasets and of tokenizer files."""

from __future__ import annotations

import functools
import json
import random
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_prep.indexed import open_described, open_indexed
from data_prep.readers import Corpus
from data_prep.shards import merge, tokenize_shard
from data_prep.sidecar import read_header
from data_prep.stats import statistics
from data_prep.tokenize import tokenize_files
from data_prep.tokenizers import load_tokenizer
from data_prep.train_tokenizer import train_tokenizer
from data_prep.verify import verify
from sepllm_train.base.errors import UserError
from sepllm_train.base.files import hash_file
from tests.fuzz.mutate import mutate_bytes, mutate_json
from tests.support.datasets import SUFFIXES

TEXT = "A line, of text.\n\tIts end: </s> and <|endoftext|>; \u2581 \u3002 caf\u00e9!"


@functools.cache
def base() -> dict[str, bytes]:
    """Files of a small dataset by suffix, with a SentencePiece tokenizer of 400 entries."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "a.jsonl")
        texts = [f"{TEXT} Number {number}, and so on. " * (1 + number % 3) for number in range(30)]
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf8")
        train_tokenizer(texts, Path(folder, "a.model"), vocab_size=320)
        tokenize_files([source], Path(folder, "set"), Path(folder, "a.model"), progress=False)
        return {suffix: Path(folder, f"set{suffix}").read_bytes() for suffix in SUFFIXES}


def lay_out(folder: Path, **changed: bytes) -> Path:
    """Write the dataset to `folder`, some files (`idx`, `sep_json`) with other content; gives its prefix."""
    for suffix, content in base().items():
        Path(folder, f"set{suffix}").write_bytes(changed.get(suffix.strip(".").replace(".", "_"), content))
    return folder / "set"


def index(rng: random.Random, folder: Path) -> None:
    """`.idx`: fields of its header, its arrays, and any of its bytes; what is taken is read as training does."""
    content = base()[".idx"]
    if rng.random() < 0.5:
        values = list(struct.unpack_from("<9sQBQQ", content))
        place = rng.randrange(1, 5)
        values[place] = rng.choice((0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 29, 30, 31, 2**31, 2**60, 2**63, 2**64 - 1))
        values[2] &= 255
        content = struct.pack("<9sQBQQ", *values) + content[34:]
    if rng.random() < 0.7:
        content = mutate_bytes(rng, content)
    prefix = lay_out(folder, idx=content)
    info = hash_file(folder / "set.idx")
    header = json.loads(base()[".sep.json"])
    header["files"][".idx"] = {"size": info.size, "sha256": info.sha256}
    (folder / "set.sep.json").write_text(json.dumps(header))
    try:
        open_indexed(prefix)
        open_described(prefix, read_header(prefix))
    except UserError:
        return
    from sepllm_train.data.dataset import TokenStore

    store = TokenStore(str(prefix))
    assert sum(len(store.get(document)) for document in range(len(store))) == header["tokens"]


def header(rng: random.Random, folder: Path) -> None:
    """`.sep.json`: its values and its bytes, read by statistics and verify."""
    content = base()[".sep.json"]
    if rng.random() < 0.8:
        content = _json_bytes(mutate_json(rng, json.loads(content)))
    if rng.random() < 0.3:
        content = mutate_bytes(rng, content)
    prefix = lay_out(folder, sep_json=content)
    for read in (lambda: statistics(prefix, length=64), lambda: verify(prefix)):
        try:
            read()
        except UserError:
            continue


@functools.cache
def two_shards() -> dict[str, bytes]:
    """Files of a dataset in two shards by name."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source, model = folder / "a.jsonl", folder / "a.model"
        source.write_text("".join(json.dumps({"text": f"{TEXT} {number}"}) + "\n" for number in range(8)))
        model.write_bytes(base()[".tokenizer.model"])
        for number in (1, 2):
            tokenize_shard([source], folder / "set", model, (number, 2), progress=False)
        return {path.name: path.read_bytes() for path in folder.glob("set.*")}


def shard(rng: random.Random, folder: Path) -> None:
    """`.shard.json`, its values and its bytes, and bytes of a shard's index; merged."""
    files = dict(two_shards())
    of = f"set.shard-{rng.randrange(1, 3)}-of-2"
    if rng.random() < 0.8:
        name = f"{of}.shard.json"
        content = _json_bytes(mutate_json(rng, json.loads(files[name])))
        files[name] = mutate_bytes(rng, content) if rng.random() < 0.3 else content
    else:
        files[f"{of}.idx"] = mutate_bytes(rng, files[f"{of}.idx"])
    for name, content in files.items():
        (folder / name).write_bytes(content)
    try:
        merge(folder / "set", progress=False)
    except UserError:
        assert not (folder / "set.bin").exists() and not (folder / "set.sep.json").exists()


@functools.cache
def rows() -> bytes:
    """A parquet file of two row groups."""
    import pyarrow
    from pyarrow import parquet

    with tempfile.TemporaryDirectory() as folder:
        table = pyarrow.table({"text": [f"{TEXT} {number}" for number in range(8)], "other": list(range(8))})
        parquet.write_table(table, Path(folder, "a.parquet"), row_group_size=4)
        return Path(folder, "a.parquet").read_bytes()


def parquet_rows(rng: random.Random, folder: Path) -> None:
    """`.parquet`: any of its bytes."""
    path = folder / "a.parquet"
    path.write_bytes(mutate_bytes(rng, rows()))
    try:
        for document in Corpus([path]):
            assert isinstance(document.text, str)
    except UserError:
        return


def sentencepiece(rng: random.Random, folder: Path) -> None:
    """SentencePiece models."""
    path = folder / "a.model"
    path.write_bytes(mutate_bytes(rng, base()[".tokenizer.model"]))
    _use(path)


def tokenizer_json(rng: random.Random, folder: Path) -> None:
    """Definitions of the library `tokenizers`: their values and their bytes."""
    content = _json_bytes(mutate_json(rng, rng.choice(definitions())))
    if rng.random() < 0.2:
        content = mutate_bytes(rng, content)
    path = folder / "a.json"
    path.write_bytes(content)
    _use(path)


@functools.cache
def definitions() -> tuple[dict[str, Any], ...]:
    """Small tokenizers of each kind."""
    letters = {letter: number for number, letter in enumerate("<>/s|end abcdoft,.\u2581\u0120\u010a")}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    metaspace = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}
    split = {"type": "Split", "pattern": {"Regex": "\\s+"}, "behavior": "Isolated", "invert": False}
    merges = [["e", "n"], ["en", "d"]]
    bpe = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
        "vocab": {**letters, "en": 30, "end": 31, "</s>": 32}, "merges": merges,
    }  # fmt: skip
    unigram = {"type": "Unigram", "unk_id": 0, "vocab": [["?", -9.0], ["</s>", -1.0], *([c, -5.0] for c in letters)]}
    words = {"type": "WordLevel", "vocab": {"?": 0, "</s>": 1, "end": 2, "line": 3}, "unk_token": "?"}
    piece = {
        "type": "WordPiece", "unk_token": "?", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100,
        "vocab": {"?": 0, "</s>": 1, "en": 2, "##d": 3, "a": 4},
    }  # fmt: skip
    added = {"id": 32, "content": "</s>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    whole = {"version": "1.0", "truncation": None, "padding": None, "post_processor": None}
    parts = (
        (bpe, [added | {"special": True}], {"type": "NFC"}, byte_level, {**byte_level}),
        (bpe, [added | {"special": False}], {"type": "Sequence", "normalizers": [{"type": "Lowercase"}]}, split, None),
        (unigram, [], {"type": "Prepend", "prepend": "\u2581"}, metaspace, metaspace),
        (words, [added | {"id": 1, "special": True}], None, {"type": "Whitespace"}, None),
        (piece, [], {"type": "BertNormalizer"}, {"type": "BertPreTokenizer"}, {"type": "WordPiece"}),
    )
    names = ("model", "added_tokens", "normalizer", "pre_tokenizer", "decoder")
    return tuple({**whole, **dict(zip(names, part, strict=True))} for part in parts)


def _use(path: Path) -> None:
    """Load a tokenizer and use what data preparation uses of it."""
    try:
        tokenizer = load_tokenizer(path)
        table = tokenizer.token_bytes()
        assert len(table) == tokenizer.vocab_size > tokenizer.eod >= 0
        for ids in tokenizer.encode_batch([*tokenizer.split(TEXT), "", "a"]):
            assert tokenizer.eod not in ids
            assert all(0 <= index < tokenizer.vocab_size for index in ids)
            tokenizer.decode(ids)
        assert tokenizer.prefix_bytes >= 0
    except UserError:
        return


def _json_bytes(value: Any) -> bytes:
    return json.dumps(value).encode()


TARGETS: dict[str, Callable[[random.Random, Path], None]] = {
    "index": index,
    "header": header,
    "shard": shard,
    "parquet_rows": parquet_rows,
    "sentencepiece": sentencepiece,
    "tokenizer_json": tokenizer_json,
}
