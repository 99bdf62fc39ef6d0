"""Packs training and validation text for evidence.py into as few bytes as possible: bzip3 in blocks, unwrapped.

    python benchmarks/evidence/pack.py --data DATA --output PACK --mib 45

Training text: modern_english (less what is held out), then the Gutenberg books as far as they fit. Validation: the
first PG19 test books, which no training text holds, and the last documents of modern_english. A little more text is for
the steps that only compile and measure. Needs the package bzip3, on the GPU machine too (a wheel of 0.57 MB). Blocks
decode in parallel. The tokenizer goes along; tokens are made on the GPU machine, which takes fewer bytes than carrying
them.
"""

from __future__ import annotations

import argparse
import bz2
import hashlib
import json
import lzma
import multiprocessing
import os
import sys
from collections.abc import Iterator
from pathlib import Path

BLOCK = 32 << 20
WARM = 500_000
HELD_OUT = 1_300_000  # bytes of each validation set: a little more than 131,072 tokens wants


def documents(path: Path, unwrap: bool) -> Iterator[str]:
    """Texts of a .jsonl.bz2 file; the hard-wrapped lines of books are joined."""
    from data_prep.readers import unwrap_lines

    with bz2.open(path, "rt", encoding="utf8") as stream:
        for line in stream:
            text = json.loads(line)["text"].replace("\0", "")
            if text.strip():
                yield unwrap_lines(text) if unwrap else text


def blocks(texts: Iterator[str]) -> Iterator[bytes]:
    """Documents, each ended by a zero byte, in blocks of about BLOCK bytes."""
    block, size = [], 0
    for text in texts:
        block.append(text.encode("utf8", "replace") + b"\0")
        size += len(block[-1])
        if size >= BLOCK:
            yield b"".join(block)
            block, size = [], 0
    if block:
        yield b"".join(block)


def compress_from(block: bytes) -> tuple[bytes, bytes, int, str]:
    """The block, and what `compress` gives."""
    return block, *compress(block)


def compress(block: bytes) -> tuple[bytes, int, str]:
    """The block packed, its length and digest."""
    import bz3

    return bz3.compress(block, max(65 << 10, min(len(block), 511 << 20))), len(block), hashlib.sha256(block).hexdigest()


def take(texts: Iterator[str], size: int) -> Iterator[str]:
    """The first texts of `size` bytes in all; the last one is cut."""
    for text in texts:
        if size <= 0:
            return
        part = text.encode("utf8", "replace")[:size]
        size -= len(part)
        yield part.decode("utf8", "ignore")


def main() -> int:
    """Write PACK/*.bz3, PACK/tokenizer.json.xz and PACK/manifest.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repository", type=Path, default=Path("."))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--mib", type=float, default=45, help="of everything in PACK (%(default)s)")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    sys.path.insert(0, str(options.repository.resolve()))
    options.output.mkdir(parents=True, exist_ok=True)
    for path in options.output.iterdir():
        path.unlink()
    corpora = options.data / "corpora"
    modern = list(documents(corpora / "modern_english.jsonl.bz2", False))
    ends, last, held = [], len(modern), 0
    for wanted in (HELD_OUT, HELD_OUT + WARM):
        while held < wanted:
            last -= 1
            held += len(modern[last].encode("utf8", "replace"))
        ends.append(last)
    books = (text for number in (0, 1) for text in documents(corpora / f"gutenberg_train-{number:02d}.jsonl.bz2", True))
    pg19 = take(documents(options.data / "pg19_test/pg19_test_60.jsonl.bz2", True), HELD_OUT)
    manifest: dict[str, object] = {"format": "bzip3"}
    tokenizer = (options.data / "tokenizers/20B_tokenizer.json").read_bytes()
    (options.output / "tokenizer.json.xz").write_bytes(lzma.compress(tokenizer, preset=9))
    left = options.mib * 2**20 - (options.output / "tokenizer.json.xz").stat().st_size - 20_000
    sets: dict[str, list[dict[str, object]]] = {}
    sources = {
        "valid_pg19": blocks(pg19),
        "valid_modern": blocks(iter(modern[ends[0] :])),
        "warm": blocks(iter(modern[ends[1] : ends[0]])),
        "train_modern": blocks(iter(modern[: ends[1]])),
        "train_books": blocks(books),
    }
    with multiprocessing.Pool(options.jobs) as pool:
        for name, source in sources.items():
            sets[name] = []
            for block, packed, length, digest in pool.imap(compress_from, source):
                full = len(packed) > left
                if full:  # its first documents still fit
                    for share in (0.97, 0.9, 0.8, 0.7):  # less of it packs less well
                        part = block[: block.rfind(b"\0", 0, int(share * left / len(packed) * len(block))) + 1]
                        smaller, length, digest = compress(part)
                        if len(smaller) <= left:
                            break
                    packed = smaller
                    if len(packed) > left or not part:
                        break
                left -= len(packed)
                file = f"{name}-{len(sets[name]):02d}.bz3"
                (options.output / file).write_bytes(packed)
                sets[name].append({"file": file, "bytes": length, "sha256": digest})
                print(
                    f"{file}: {length / 1e6:.2f} MB -> {len(packed) / 1e6:.2f} MB, {left / 2**20:.2f} MiB left",
                    flush=True,
                )
                if full:
                    break
            else:
                continue
            pool.terminate()
            break
    manifest["sets"] = sets
    (options.output / "manifest.json").write_text(json.dumps(manifest, indent=1))
    total = sum(path.stat().st_size for path in options.output.iterdir())
    text = {name: sum(int(str(entry["bytes"])) for entry in entries) for name, entries in sets.items()}
    print(f"{options.output}: {total / 2**20:.2f} MiB; bytes of text {text}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
