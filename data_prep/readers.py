"""Documents from text files: .txt (one document a file) and .jsonl (one a line), plain or compressed, in a stream."""

from __future__ import annotations

import bz2
import io
import json
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

from sepllm_train.base.errors import UserError

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
_CHUNK = 1 << 18
# Of hard-wrapped lines, whose breaks would otherwise be counted as separators.
_WIDEST_WRAP = 120
_SLACK = 0.9
_BOM = "\ufeff"
# The largest window that zstd's own program writes, with --ultra --long=31.
_LARGEST_WINDOW = 1 << 31
_KINDS = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}


@dataclass(frozen=True)
class Document:
    """A text, where it came from (`file` or `file:line`), and how many input bytes were read up to its end.

    `label` is what the .jsonl line has in the corpus's `label_field`, None without one.
    """

    text: str
    source: str
    position: int
    label: str | None = None


def _to_stderr(message: str) -> None:
    print(message, file=sys.stderr)


@dataclass
class Corpus:
    """The documents of `inputs`, in order.

    `text_field` names the text in .jsonl lines, `label_field` a string beside it. A document that is not UTF-8, or
    whose text is null, is named on stderr and left out, or, when `strict`, an error. `unwrap` joins the hard-wrapped
    lines of books. As the corpus is read, `skipped` counts documents that are not UTF-8, `empty` those without text. A
    byte order mark at the start of a file or line is no text.
    """

    inputs: Sequence[Path]
    text_field: str = "text"
    strict: bool = False
    unwrap: bool = False
    report: Callable[[str], None] = _to_stderr
    label_field: str | None = None
    skipped: int = 0
    empty: int = 0

    def __post_init__(self) -> None:
        for path in self.inputs:
            if not path.is_file():
                raise UserError(f"There is no file {path}: give .txt or .jsonl files.")
            if _kind(path) not in (".txt", ".jsonl"):
                raise UserError(f"{path} is neither .txt nor .jsonl (plain or with {', '.join(COMPRESSIONS)}).")

    @property
    def size(self) -> int:
        """Bytes of all input files as they lie on disk."""
        return sum(path.stat().st_size for path in self.inputs)

    def __iter__(self) -> Iterator[Document]:
        """Documents with text; raises UserError naming file and line for input that cannot be read."""
        before = 0
        for path in self.inputs:
            with open(path, "rb") as raw:
                try:
                    for source, text, label in self._texts(path, raw):
                        text = unwrap_lines(text) if self.unwrap else text
                        yield Document(text, source, before + raw.tell(), label)
                except (OSError, EOFError) as error:
                    raise UserError(f"{path} is damaged or cut short ({error}): copy it again.") from None
            before += path.stat().st_size

    def _texts(self, path: Path, raw: IO[bytes]) -> Iterator[tuple[str, str, str | None]]:
        stream = _decompressed(path, raw)
        if _kind(path) == ".jsonl":
            for number, line in enumerate(stream, start=1):
                line = line.removeprefix(_BOM.encode())
                if line.strip():
                    text, label = self._json_text(line, f"{path}:{number}")
                    yield from self._kept(text, f"{path}:{number}", label)
        else:
            text = self._decoded(stream.read(), str(path))
            yield from self._kept(text and text.removeprefix(_BOM), str(path), None)

    def _kept(self, text: str | None, source: str, label: str | None) -> Iterator[tuple[str, str, str | None]]:
        if text:
            yield source, text, label
        elif text == "":
            self.empty += 1

    def _json_text(self, line: bytes, source: str) -> tuple[str | None, str | None]:
        decoded = self._decoded(line, source)
        if decoded is None:
            return None, None
        try:
            # Numbers beside the text may be of any size: none is read.
            entry = json.loads(decoded, parse_int=_number, parse_float=_number)
        except json.JSONDecodeError as error:
            raise UserError(f"{source} is not JSON ({error}).") from None
        except RecursionError:
            raise UserError(f"{source} is not JSON (nested too deeply).") from None
        if not isinstance(entry, dict) or self.text_field not in entry:
            found = f"it has {', '.join(map(repr, entry))}" if isinstance(entry, dict) else "it is no object"
            raise UserError(f"{source} has no text field {self.text_field!r} ({found}): name it with --field.")
        text = entry[self.text_field]
        if text is None and not self.strict:
            self.empty += 1
            self.report(f"skipped {source}: its text is null")
            return None, None
        if not isinstance(text, str):
            remedy = "fill it, or leave --strict" if text is None else "name another with --field"
            kind = _KINDS.get(type(text), "a number")
            raise UserError(f"{source} has {kind} for its text field {self.text_field!r}: {remedy}.")
        label = None if self.label_field is None else entry.get(self.label_field)
        # JSON can spell half a surrogate pair, which no UTF-8 text holds.
        kept = text if text.isascii() else self._decoded(text.encode("utf8", "surrogatepass"), source)
        return kept, label if isinstance(label, str) else None

    def _decoded(self, data: bytes, source: str) -> str | None:
        try:
            return data.decode("utf8")
        except UnicodeDecodeError as error:
            if self.strict:
                raise UserError(f"{source} is not UTF-8 (byte {error.start}): convert it, or leave --strict.") from None
            self.skipped += 1
            self.report(f"skipped {source}: not UTF-8 (byte {error.start})")
            return None


def _number(text: str) -> float:
    """Stands for every number of a .jsonl line."""
    return 0.0


def _kind(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix


def _decompressed(path: Path, raw: IO[bytes]) -> IO[bytes]:
    start = _DECOMPRESSORS.get(path.suffix)
    return io.BufferedReader(_Decompressed(raw, start), _CHUNK) if start else raw


def _zstd() -> Any:
    import zstandard

    return zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW).decompressobj()


_DECOMPRESSORS: dict[str, Callable[[], Any]] = {
    ".gz": lambda: zlib.decompressobj(wbits=31),
    ".bz2": bz2.BZ2Decompressor,
    ".xz": lzma.LZMADecompressor,
    ".zst": _zstd,
}


class _Decompressed(io.RawIOBase):
    """Concatenated compressed streams as one; raises EOFError when the last is cut short.

    Zeros between and after streams are padding: .xz has it, and tapes leave it behind a .gz.

    The standard readers decompress 8 KB at a time. Each call gives up the interpreter's lock and waits to get it back
    from the encoding threads, which made reading the slowest part; zstandard's reader does not notice a cut.
    """

    def __init__(self, raw: IO[bytes], start: Callable[[], Any]) -> None:
        self._raw = raw
        self._start = start
        self._stream = start()
        self._begun = False
        self._input = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            self._input = self._input or self._raw.read(_CHUNK)
            if not self._input:
                if self._begun and not self._stream.eof:
                    raise EOFError("its compressed stream has no end")
                return 0
            if self._begun and self._stream.eof:
                self._input = self._input.lstrip(b"\0")
                if not self._input:
                    continue
            self._output = memoryview(self._decompress())
        count = min(len(buffer), len(self._output))
        buffer[:count] = self._output[:count]
        self._output = self._output[count:]
        return count

    def _decompress(self) -> bytes:
        if self._stream.eof:
            self._stream = self._start()
        self._begun = True
        try:
            output: bytes = self._stream.decompress(self._input)
        except Exception as error:  # each library has its own class, zstandard's needs the library to name it
            raise OSError(str(error)) from None
        self._input = self._stream.unused_data
        return output


def unwrap_lines(text: str) -> str:
    """Join lines that were broken only because the next word did not fit.

    The wrap width is the 90th percentile of the text's line lengths; above 120 characters the text is taken as not
    wrapped and returned as it is. A line joins the one before it when its first word would not have fitted there
    (within 10% of the width), so verse, headings and the last lines of paragraphs stay, and so do blank and indented
    lines. A line that ends in a single hyphen is joined without a space ("well-" and "known").
    """
    lines = text.replace("\r\n", "\n").split("\n")
    lengths = sorted(len(line.rstrip()) for line in lines if line.strip())
    width = lengths[int(0.9 * (len(lengths) - 1))] if lengths else 0
    if width > _WIDEST_WRAP:
        return text
    parts = [lines[0]]
    for before, line in pairwise(lines):
        if not _was_wrapped(before, line, width):
            parts += ["\n", line]
            continue
        parts[-1] = parts[-1].rstrip()
        compound = parts[-1].endswith("-") and not parts[-1].endswith("--")
        parts += [line] if compound else [" ", line]
    return "".join(parts)


def _was_wrapped(before: str, line: str, width: int) -> bool:
    if not before.strip() or not line.strip() or line[0].isspace():
        return False
    first_word = line.split(maxsplit=1)[0]
    return len(before.rstrip()) + 1 + len(first_word) > _SLACK * width
