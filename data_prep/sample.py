"""The sample corpus: real text that every machine with Python has, the standard library's documentation and code.

`docs` are the docstrings and the documentation topics (about 2.5 MB of English), `code` the modules' source. The
corpus is made on first use into a cache folder, with a small SentencePiece tokenizer trained on it.
"""

from __future__ import annotations

import ast
import hashlib
import os
import random
import sys
import sysconfig
import time
from collections.abc import Iterator
from inspect import cleandoc
from pathlib import Path

from data_prep.readers import Document
from data_prep.sidecar import HEADER_SUFFIX, with_suffix
from data_prep.tokenize import tokenize_documents, usable_cores
from data_prep.tokenizers import load_tokenizer
from data_prep.train_tokenizer import train_tokenizer
from data_prep.writer import DatasetWriter
from sepllm_train.base.errors import UserError
from sepllm_train.base.files import lock_waiting, whole_folder

SOURCES = ("docs", "code", "both")
_FORMAT = 2
# Tests, other people's packages, and `encodings`, which is tables of characters.
_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings"}
)
_SHORTEST = 40
_SMALLEST_CORPUS = 200_000


def prepare_sample(cache: str | Path | None = None, *, vocab_size: int = 4096, source: str = "docs") -> Path:
    """Prefix of the tokenised sample corpus, which is made on first use (well under a minute) and reused afterwards.

    `cache` defaults to $SEPLLM_CACHE or ~/.cache/sepllm-train; `source` is docs, code or both. The documents are in a
    shuffled order that depends only on the Python installed, so the last ones are a fair sample. The folder appears
    complete or not at all, and of two processes one waits for the other. Raises UserError for an unknown source, a
    Python without its library's source, or a cache that cannot be written.
    """
    if source not in SOURCES:
        raise UserError(f"There is no sample source {source!r}: choose {', '.join(SOURCES)}.")
    modules = _library_modules()
    parent = cache_folder(cache)
    folder = parent / f"sample-{source}-{_content_key(modules)}-v{vocab_size}-f{_FORMAT}"
    prefix = folder / source
    if not _complete(prefix):
        try:
            parent.mkdir(parents=True, exist_ok=True)
            with open(f"{folder}.lock", "w") as lock:
                lock_waiting(lock)
                if not _complete(prefix):
                    _make(folder, modules, source, vocab_size, cache_remedy(cache))
        except OSError as error:
            raise UserError(f"Cannot write the sample corpus to {parent} ({error}): {cache_remedy(cache)}.") from None
    return prefix


def cache_folder(cache: str | Path | None = None) -> Path:
    """`cache`, or where none is given $SEPLLM_CACHE or ~/.cache/sepllm-train."""
    return Path(cache or os.environ.get("SEPLLM_CACHE") or "~/.cache/sepllm-train").expanduser()


def cache_remedy(cache: str | Path | None) -> str:
    """Remedy for a cache folder that cannot be used; `cache` is data.cache of the run."""
    return "choose another data.cache" if cache else "set SEPLLM_CACHE"


def sample_documents(source: str = "docs") -> list[Document]:
    """The sample corpus as text, deduplicated, in its shuffled order."""
    return _documents(_library_modules(), source)


def _complete(prefix: Path) -> bool:
    return with_suffix(prefix, HEADER_SUFFIX).is_file()


def _make(folder: Path, modules: list[tuple[str, bytes]], source: str, vocab_size: int, remedy: str) -> None:
    start = time.perf_counter()
    documents = _documents(modules, source)
    size = sum(len(document.text) for document in documents)
    if size < _SMALLEST_CORPUS:
        raise UserError(f"Python's library at {_library()} has too little source for a sample corpus: bring your own.")
    print(
        f"Preparing the sample corpus ({source} of Python {sys.version_info.major}.{sys.version_info.minor}'s library, "
        f"{len(documents):,} documents, {size / 1e6:.1f} MB) in {folder} ...",
        end=" ",
        file=sys.stderr,
        flush=True,
    )
    with whole_folder(folder, remedy) as partial:
        model = partial / "sample.model"
        train_tokenizer(
            (document.text for document in documents),
            model,
            vocab_size=vocab_size,
            sentences=200_000,
            workers=usable_cores(),
        )
        with DatasetWriter(partial / source, load_tokenizer(model)) as writer:
            tokenize_documents(documents, writer)
            writer.finish()
        model.unlink()  # the copy beside the data is the one to use
    print(f"{time.perf_counter() - start:.1f} s", file=sys.stderr)


def _library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _library_modules() -> list[tuple[str, bytes]]:
    """Name and source of each module of the standard library, tests left out, in sorted order."""
    modules = []
    library = _library()
    for folder, subfolders, names in os.walk(library):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
        for name in names:
            if name.endswith(".py") and not name.startswith("test_"):
                path = Path(folder, name)
                modules.append((path.relative_to(library).as_posix(), path.read_bytes()))
    return sorted(modules)


def _content_key(modules: list[tuple[str, bytes]]) -> str:
    digest = hashlib.sha256()
    for name, content in modules:
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    return f"py{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}-{digest.hexdigest()[:12]}"


def _documents(modules: list[tuple[str, bytes]], source: str) -> list[Document]:
    texts: list[str] = []
    seen: set[str] = set()
    for name, content in modules:
        if (text := _decoded(content)) is None:
            continue
        if source in ("docs", "both"):
            texts += _topics(text) if name == "pydoc_data/topics.py" else _docstrings(text, seen)
        if source in ("code", "both") and name != "pydoc_data/topics.py":
            texts.append(text)
    texts = sorted({text for text in texts if len(text) >= _SHORTEST})
    random.Random(0).shuffle(texts)
    return [Document(text, f"sample {number}", 0) for number, text in enumerate(texts)]


def _decoded(content: bytes) -> str | None:
    try:
        return content.decode("utf8")
    except UnicodeDecodeError:
        return None


def _topics(text: str) -> list[str]:
    """Python's own reference by topic: the module is one dictionary of text."""
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            return [topic.strip() + "\n" for topic in ast.literal_eval(node.value).values()]
    return []


def _docstrings(text: str, seen: set[str]) -> Iterator[str]:
    """One document for the module with its functions, and one for each class with its methods.

    A docstring in `seen` is left out; those used are added to it.
    """
    try:
        module = ast.parse(text)
    except (SyntaxError, ValueError):
        return
    classes = [node for node in module.body if isinstance(node, ast.ClassDef)]
    rest = [node for node in module.body if not isinstance(node, ast.ClassDef)]
    groups: list[tuple[ast.Module | ast.ClassDef, list[ast.stmt]]] = [(module, rest)]
    groups += [(node, node.body) for node in classes]
    for head, body in groups:
        parts = [part for part in _docstrings_of(head, body) if part not in seen]
        seen.update(parts)
        if parts:
            yield "\n\n".join(parts) + "\n"


def _docstrings_of(head: ast.Module | ast.ClassDef, body: list[ast.stmt]) -> Iterator[str]:
    for node in (head, *_definitions(body)):
        docstring = ast.get_docstring(node, clean=False)
        if docstring and docstring.strip():
            yield cleandoc(docstring)


def _definitions(body: list[ast.stmt]) -> Iterator[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """Definitions at any depth, in the order of the source; only statements are visited, which is fast."""
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
        for block in ("body", "orelse", "handlers", "finalbody"):
            yield from _definitions(getattr(node, block, []))
