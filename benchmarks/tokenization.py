"""Throughput of `sepllm prepare tokenize` against the tokenizer library's own batch call, from .jsonl and .parquet, and
memory at two sizes, of the merge of shards too.

python -m benchmarks.tokenization                                            # the sample corpora, their tokenizer
python -m benchmarks.tokenization books.jsonl.bz2 --tokenizer tokenizer.json --megabytes 8

All get the same documents in interleaved rounds, with all cores; ratios are those of the medians. The library only
encodes documents that are in memory already; the pipeline also reads and parses a file, classifies the separators, and
writes and syncs the dataset.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
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

BAR, PARQUET_BAR = 1.0, 0.9
# The high-water mark of this process alone: ru_maxrss would include the parent's memory from before exec.
_MEASURE_MEMORY = """
import sys
{call}
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
_TOKENIZE = """
from data_prep.tokenize import tokenize_files
tokenize_files([sys.argv[1]], sys.argv[2], sys.argv[3], progress=False)
"""
_TOKENIZE_SHARDS = """
from data_prep.shards import tokenize_shard
for number in (1, 2):
    tokenize_shard([sys.argv[1]], sys.argv[2], sys.argv[3], (number, 2), progress=False)
"""
_MERGE = """
from data_prep.shards import merge
merge(sys.argv[2], progress=False)
"""


def main() -> None:
    """Print throughputs, their ratios with the bars, and peak memory at one and four times the corpus."""
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
    paths = {"jsonl": _write_jsonl(folder / "corpus.jsonl", texts, copies=1)}
    paths["parquet"] = _write_parquet(folder / "corpus.parquet", texts, copies=1)
    print(f"{size / 1e6:.1f} MB in {len(texts):,} documents, {tokenizer.name}, {usable_cores()} cores")

    library = _library_call(tokenizer)
    output = folder / "out"
    calls = {"library": partial(timed, partial(library, texts))}
    for name, path in paths.items():
        pipeline = partial(tokenize_files, [path], output, tokenizer, overwrite=True, progress=False)
        calls[name] = partial(timed, pipeline)
    seconds = {name: statistics.median(each) for name, each in interleaved(calls, arguments.rounds).items()}
    tokens = read_header(output).tokens
    for name, each in seconds.items():
        print(f"{name:<9}{size / each / 1e6:8.2f} MB/s{tokens / each:14,.0f} tokens/s{each:9.2f} s")
    for name, baseline, bar in (("jsonl", "library", BAR), ("parquet", "jsonl", PARQUET_BAR)):
        ratio = seconds[baseline] / seconds[name]
        print(f"{name} / {baseline}: {ratio:.2f} (bar {bar:.2f} {'reached' if ratio >= bar else 'missed'})")

    for name, write, steps in (
        ("jsonl", _write_jsonl, (_TOKENIZE,)),
        ("parquet", _write_parquet, (_TOKENIZE,)),
        ("merge", _write_jsonl, (_TOKENIZE_SHARDS, _MERGE)),
    ):
        peaks = {}
        for copies in (1, 4):
            corpus = write(paths["parquet" if name == "parquet" else "jsonl"], texts, copies)
            for call in steps:
                peaks[copies] = _peak_memory(call, corpus, folder / f"{name}{copies}", tokenizer)
        print(f"peak memory, {name}: {peaks[1]:.0f} MB, {peaks[4]:.0f} MB for four times as much text")


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


def _write_parquet(path: Path, texts: list[str], copies: int) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    table = pa.table({"text": texts})
    with parquet.ParquetWriter(path, table.schema) as writer:
        for _ in range(copies):
            writer.write_table(table)
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


def _peak_memory(call: str, corpus: Path, output: Path, tokenizer: Path) -> float:
    words = [str(path) for path in (corpus, output, tokenizer)]
    command = [sys.executable, "-c", _MEASURE_MEMORY.format(call=call), *words]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) / 1024


if __name__ == "__main__":
    exit_with(main)
