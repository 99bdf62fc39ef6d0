"""Documents of .txt (one a file) and .jsonl files (one a line), plain or compressed, and .parquet, in a stream."""

from __future__ import annotations

import bz2
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, TypeAlias

from data_prep.inputs import COMPRESSIONS, Part, kind, parts_of, to_stderr
from data_prep.parquet import TextColumn
from sepllm_train.base.errors import UserError, first_line

# A document as it is read: where it came from, its text (None: there is none), its label, bytes read up to its end.
_Found: TypeAlias = "tuple[str, str | None, str | None, int]"
# A place between documents: the input file from 0 on, and what of it comes before (bytes, lines of a compressed file,
# or rows); the end of a file is the start of the next.
Place: TypeAlias = tuple[int, int]
_CHUNK = 1 << 18
# Of hard-wrapped lines, whose breaks would otherwise be counted as separators.
_WIDEST_WRAP = 120
_SLACK = 0.9
_BOM = "\ufeff"
# The largest window that zstd's own program writes, with --ultra --long=31.
_LARGEST_WINDOW = 1 << 31
_KINDS = {dict: "an object", list: "a list", str: "text", bool: "true or false"}


@dataclass(frozen=True)
class Document:
    """A text, where it came from (`file` or `file:line`), and how many input bytes were read up to its end.

    `label` is what the .jsonl line has in the corpus's `label_field`, None without one.
    """

    text: str
    source: str
    position: int
    label: str | None = None


@dataclass
class Corpus:
    """The documents of `inputs`, in order.

    `text_field` names the text in .jsonl lines and .parquet files, `label_field` a string beside it. A document that is
    not UTF-8, or whose text is null, is named on stderr and left out, or, when `strict`, an error. `unwrap` joins the
    hard-wrapped lines of books. As the corpus is read, `skipped` counts documents that are not UTF-8, `empty` those
    without text. A byte order mark at the start of a file or line is no text.

    share: (number from 1 on, count) reads one of `count` contiguous shares of the documents. It begins at the place
    `begin` and ends at `end`, which are known once it is read; the next share begins where this one ends. `sizes` are
    those of the inputs in bytes.
    """

    inputs: Sequence[Path]
    text_field: str = "text"
    strict: bool = False
    unwrap: bool = False
    report: Callable[[str], None] = to_stderr
    label_field: str | None = None
    share: tuple[int, int] = (1, 1)
    skipped: int = 0
    empty: int = 0
    begin: Place | None = None
    end: Place | None = None
    sizes: list[int] = field(init=False)
    _parts: list[Part] = field(init=False)

    def __post_init__(self) -> None:
        for path in self.inputs:
            if not path.is_file():
                raise UserError(f"There is no file {path}: give .txt, .jsonl or .parquet files.")
            if kind(path) is None:
                raise UserError(
                    f"{path} is neither .txt nor .jsonl (plain or with {', '.join(COMPRESSIONS)}) nor .parquet."
                )
        self.sizes = [path.stat().st_size for path in self.inputs]
        self._parts = parts_of(self.sizes, *self.share)
        for path in (self.inputs[part.file] for part in self._parts):
            if kind(path) == ".parquet":  # a column that is not there is no reason to stop after hours
                with _damage_named(path), TextColumn(path, self.text_field):
                    pass

    @property
    def size(self) -> int:
        """Bytes of the input files, or of the parts of them that are read, as they lie on disk."""
        return sum((self.sizes[file] if high is None else high) - low for file, low, high in self._parts)

    def __iter__(self) -> Iterator[Document]:
        """Documents with text; raises UserError naming file and line for input that cannot be read."""
        self.begin = None
        before = 0
        for part in self._parts:
            path = self.inputs[part.file]
            read = {".txt": self._whole_file, ".jsonl": self._lines, ".parquet": self._rows}[kind(path) or ""]
            with open(path, "rb") as raw, _damage_named(path):
                for source, text, label, position in read(part, path, raw):
                    if text:
                        text = unwrap_lines(text) if self.unwrap else text
                        yield Document(text, source, before + position - part.low, label)
                    elif text == "":
                        self.empty += 1
            before += (self.sizes[part.file] if part.high is None else part.high) - part.low

    def _reached(self, part: Part, passed: int, at_end: bool) -> None:
        """Note the place before which `passed` bytes, lines or rows of a file lie."""
        if self.begin is None and not part.low:
            at_end = False  # however empty: the share before ends here
        self.end = (part.file + 1, 0) if at_end else (part.file, passed)
        self.begin = self.begin or self.end

    def _whole_file(self, part: Part, path: Path, raw: IO[bytes]) -> Iterator[_Found]:
        self._reached(part, 0, part.low > 0)
        if not part.low:
            text = self._decoded(_decompressed(path, raw).read(), str(path))
            yield str(path), text and text.removeprefix(_BOM), None, raw.tell()
        self._reached(part, 0, True)

    def _lines(self, part: Part, path: Path, raw: IO[bytes]) -> Iterator[_Found]:
        """Lines that begin in the part: those of a compressed file before which its bytes have been read."""
        stream = _decompressed(path, raw)
        lines = 0
        if stream is raw and part.low:
            raw.seek(part.low - 1)
            raw.readline()
        # Looking ahead may read on, so the place is taken before.
        at = raw.tell()
        while at < part.low and stream.readline():
            lines += 1
            at = raw.tell()
        named_by_line = stream is not raw or not part.low
        self._reached(part, at if stream is raw else lines, not stream.peek(1))
        while (part.high is None or at < part.high) and (line := stream.readline()):
            lines += 1
            source = f"{path}:{lines}" if named_by_line else f"{path} at byte {at}"
            at = raw.tell()
            line = line.removeprefix(_BOM.encode())
            if line.strip():
                text, label = self._json_text(line, source)
                yield source, text, label, at
        self._reached(part, at if stream is raw else lines, not stream.peek(1))

    def _rows(self, part: Part, path: Path, raw: IO[bytes]) -> Iterator[_Found]:
        """Rows of the part, counted as if all were of one length."""
        size = self.sizes[part.file]
        with TextColumn(path, self.text_field, self.label_field) as column:
            high = size if part.high is None else part.high
            first, end = (-(-column.rows * byte // size) for byte in (part.low, high))
            self._reached(part, first, first == column.rows)
            for row, (data, label) in enumerate(column.texts(first, end), start=first + 1):
                source = f"{path}:{row}"
                text = self._null(source) if data is None else self._decoded(data, source)
                yield source, text, label if isinstance(label, str) else None, size * row // column.rows
            self._reached(part, end, end == column.rows)

    def _null(self, source: str) -> str | None:
        """None for a document whose text is null, which is counted."""
        if self.strict:
            raise UserError(f"{source} has null for its text field {self.text_field!r}: fill it, or leave --strict.")
        self.empty += 1
        self.report(f"skipped {source}: its text is null")
        return None

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
        if text is None:
            return self._null(source), None
        if not isinstance(text, str):
            found = _KINDS.get(type(text), "a number")
            raise UserError(f"{source} has {found} for its text field {self.text_field!r}: name another with --field.")
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


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Turn what readers raise for a damaged file into a UserError that names it."""
    try:
        yield
    except (OSError, EOFError) as error:
        raise UserError(f"{path} is damaged or cut short ({first_line(error)}): copy it again.") from None


def _decompressed(path: Path, raw: Any) -> Any:
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
