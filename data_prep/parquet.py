"""A column of text of a .parquet file, read by pyarrow a batch of rows at a time."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sepllm_train.base.errors import UserError, first_line

# Of text in a batch, so that encoding begins early; rows of one batch, where the file says less of them than they hold.
_BATCH_BYTES = 1 << 18
_BATCH_ROWS = 1024
_BUFFER = 1 << 20


class TextColumn:
    """Text of a .parquet file: strings or bytes, plain or by a dictionary, in a column or in a field of a structure.

    field: name of the column; `doc.text` is the field `text` of the structures in `doc`. label_field: a column of
    strings beside it, of which there may be none. `rows` is their number. Raises UserError when pyarrow is not there,
    or the file has no such column or one without text, and OSError when it is damaged.
    """

    def __init__(self, path: Path, field: str, label_field: str | None = None) -> None:
        self._pyarrow, parquet = _library(path)
        with self._damage():
            # Pages are read as they are needed: a group of rows may be larger than the memory.
            self._file = parquet.ParquetFile(
                path, buffer_size=_BUFFER, pre_buffer=False, page_checksum_verification=True
            )
            self.rows: int = self._file.metadata.num_rows
            schema = self._file.schema_arrow
        self._keys = self._find(path, field, schema)
        self._field = field
        self._label = label_field if label_field in schema.names else None

    def __enter__(self) -> TextColumn:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def texts(self, first: int, end: int) -> Iterator[tuple[bytes | None, str | None]]:
        """UTF-8 (None: null) and label of the rows [first, end). Raises OSError when the file is damaged."""
        metadata, start = self._file.metadata, 0
        for group in range(metadata.num_row_groups):
            rows = metadata.row_group(group).num_rows
            if first < start + rows and start < end:
                yield from self._of_group(group, first - start, end - start)
            start += rows

    def _of_group(self, group: int, first: int, end: int) -> Iterator[tuple[bytes | None, str | None]]:
        """Rows of a row group, counted from its first one."""
        columns = [self._field, *([self._label] if self._label else [])]
        with self._damage():
            batches = self._file.iter_batches(
                self._batch_rows(group), row_groups=[group], columns=columns, use_threads=False
            )
            row = 0
            for batch in batches:
                begin, stop = max(first - row, 0), min(end - row, len(batch))
                row += len(batch)
                if begin < stop:
                    batch = batch.slice(begin, stop - begin)
                    labels = batch.column(self._label).to_pylist() if self._label else [None] * len(batch)
                    yield from zip(self._bytes(batch), labels, strict=True)
                if row >= end:
                    return

    def _bytes(self, batch: Any) -> list[bytes | None]:
        """Text as bytes: pyarrow does not look whether a string is UTF-8."""
        column = batch.column(self._keys[0])
        for key in self._keys[1:]:
            column = self._pyarrow.compute.struct_field(column, key)
        if self._pyarrow.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        texts: list[bytes | None] = column.cast(self._pyarrow.large_binary()).to_pylist()
        return texts

    def _batch_rows(self, group: int) -> int:
        """Rows whose text fits a batch, by the mean length that the file gives."""
        about = self._file.metadata.row_group(group)
        columns = (about.column(number) for number in range(about.num_columns))
        size = next((column.total_uncompressed_size for column in columns if column.path_in_schema == self._field), 0)
        return max(1, min(_BATCH_ROWS, _BATCH_BYTES * about.num_rows // max(size, 1)))

    def _find(self, path: Path, field: str, schema: Any) -> list[str]:
        """Names of the column and of the fields inside of it that lead to the text."""
        found = {name: keys_and_type for one in schema for name, keys_and_type in self._leaves(one, [])}
        there = f"it has {', '.join(map(repr, found))}"
        if field not in found:
            near = difflib.get_close_matches(field, found, n=3)
            nearest = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
            raise UserError(f"{path} has no column {field!r} ({nearest}{there}): name it with --field.")
        keys, type_ = found[field]
        if not self._is_text(type_) or schema.names.count(keys[0]) > 1:
            what = type_ if not self._is_text(type_) else "more than one column"
            raise UserError(f"{path} has {what} for its text column {field!r} ({there}): name another with --field.")
        return keys

    def _leaves(self, field: Any, before: list[str]) -> Iterator[tuple[str, tuple[list[str], Any]]]:
        """Dotted name, keys and type of a column, or of each field of a structure."""
        keys = [*before, field.name]
        if self._pyarrow.types.is_struct(field.type):
            for inner in field.type:
                yield from self._leaves(inner, keys)
        else:
            yield ".".join(keys), (keys, field.type)

    def _is_text(self, type_: Any) -> bool:
        if self._pyarrow.types.is_dictionary(type_):
            type_ = type_.value_type
        names = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view", "null")
        return str(type_) in names

    @contextmanager
    def _damage(self) -> Iterator[None]:
        """Turn what pyarrow raises for a damaged file into OSError."""
        try:
            yield
        # Names of columns and labels are decoded as they are read.
        except (self._pyarrow.ArrowException, UnicodeDecodeError) as error:
            raise OSError(first_line(error)) from None


def _library(path: Path) -> tuple[Any, Any]:
    """pyarrow and its reader. Raises UserError where they cannot be imported."""
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.parquet
    except ImportError as error:
        remedy = "pip install -e '.[parquet]' in the checkout"
        raise UserError(f"{path} needs pyarrow ({first_line(error)}): {remedy}.") from None
    return pyarrow, pyarrow.parquet
