"""Throughput of `sepllm prepare tokenize` against the tokenizer library's own batch call, and memory at two sizes.

python -m benchmarks.tokenization                                            # the sample corpora, their tokenizer
python -m benchmarks.tokenization books.jsonl.bz2 --tokenizer tokenizer.json --megabytes 8

Both sides get the same documents in interleaved rounds, with all cores; the best round of each counts. The
library only encodes documents that are in memory already; the pipeline also reads and parses a .jsonl, classifies the
separators, and writes and syncs the dataset.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from benchmarks.common import exit_with, interleaved, timed
from data_prep.readers import Corpus, Document
from data_prep.sample import prepare_sample, sample_documents
from data_prep.sidecar import read_header
from data_prep.tokenize import tokenize_files, usable_cores

BAR, GOAL = 0.80, 0.95
# The high-water mark of this process alone: ru_maxrss would include the parent's memory from before exec.
_MEASURE_MEMORY = """
import sys
from data_prep.tokenize import tokenize_files
tokenize_files([sys.argv[1]], sys.argv[2], sys.argv[3], progress=False)
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def main() -> None:
    """Print both throughputs, their ratio with the bar, and peak memory at one and four times the corpus."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("inputs", nargs="*", metavar="INPUT", help=".txt or .jsonl files; none: sample docs and code")
    parser.add_argument("--tokenizer", metavar="FILE", help="needed with INPUT")
    parser.add_argument("--megabytes", type=float, default=8.0, help="text to use")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, after one to warm up")
    arguments = parser.parse_args()
    if arguments.inputs and not arguments.tokenizer:
        parser.error("--tokenizer is needed with INPUT")
    with tempfile.TemporaryDirectory() as folder:
        _run(arguments, Path(folder))


def _run(arguments: argparse.Namespace, folder: Path) -> None:
    inputs = [Path(path) for path in arguments.inputs]
    documents: Iterable[Document] = Corpus(inputs) if inputs else sample_documents("both")
    sample = prepare_sample() if arguments.tokenizer is None else None
    tokenizer = Path(arguments.tokenizer) if sample is None else sample.parent / read_header(sample).tokenizer.file
    texts = _take(documents, int(arguments.megabytes * 1e6))
    size = sum(len(text.encode("utf8")) for text in texts)
    corpus = _write_jsonl(folder / "corpus.jsonl", texts, copies=1)
    print(f"{size / 1e6:.1f} MB in {len(texts):,} documents, {tokenizer.name}, {usable_cores()} cores")

    library = _library_call(tokenizer)
    output = folder / "out"
    pipeline = partial(tokenize_files, [corpus], output, tokenizer, overwrite=True, progress=False)
    calls = {"library": partial(timed, partial(library, texts)), "pipeline": partial(timed, pipeline)}
    best = {name: min(seconds) for name, seconds in interleaved(calls, arguments.rounds).items()}
    tokens = read_header(output).tokens
    for name, seconds in best.items():
        print(f"{name:<9}{size / seconds / 1e6:8.2f} MB/s{tokens / seconds:14,.0f} tokens/s{seconds:9.2f} s")
    ratio = best["library"] / best["pipeline"]
    verdicts = f"bar {BAR:.2f} {_verdict(ratio, BAR)}, goal {GOAL:.2f} {_verdict(ratio, GOAL)}"
    print(f"pipeline / library: {ratio:.2f} ({verdicts})")

    peaks = {}
    for copies in (1, 4):
        corpus = _write_jsonl(folder / "corpus.jsonl", texts, copies)
        peaks[copies] = _peak_memory(corpus, folder / f"memory{copies}", tokenizer)
    print(f"peak memory: {peaks[1]:.0f} MB for {size / 1e6:.1f} MB of text, {peaks[4]:.0f} MB for four times as much")


def _take(documents: Iterable[Document], limit: int) -> list[str]:
    texts, size = [], 0
    for document in documents:
        texts.append(document.text)
        size += len(document.text)
        if size >= limit:
            break
    return texts


def _write_jsonl(path: Path, texts: list[str], copies: int) -> Path:
    with open(path, "w", encoding="utf8") as stream:
        for _ in range(copies):
            stream.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    return path


def _library_call(path: Path) -> Callable[[list[str]], object]:
    """The library's own batch call with all of its threads."""
    if path.suffix == ".json":
        from tokenizers import Tokenizer

        os.environ["TOKENIZERS_PARALLELISM"] = "true"
        tokenizer = Tokenizer.from_file(str(path))
        return lambda texts: tokenizer.encode_batch(texts, add_special_tokens=False)
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    return lambda texts: model.encode(texts, num_threads=usable_cores())


def _verdict(ratio: float, bar: float) -> str:
    return "reached" if ratio >= bar else "missed"


def _peak_memory(corpus: Path, output: Path, tokenizer: Path) -> float:
    command = [sys.executable, "-c", _MEASURE_MEMORY, str(corpus), str(output), str(tokenizer)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) / 1024


if __name__ == "__main__":
    exit_with(main)
