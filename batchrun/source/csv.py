"""Reads a CSV file's header as a schema, and its rows in small batches. Every column is text.

No types are guessed: "007" and "1.10" reach the prompt unchanged. An empty cell without quotes is null; with quotes it
is the empty text. The first line names the columns and decides the delimiter: a comma if the header has one outside
quotes, else a semicolon, a tab, a bar. A first line `sep=;`, as Excel writes it, sets the delimiter instead.
A quote within quotes is doubled; a quoted cell may span lines. Text after a closing quote is an error.
"""

import csv
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, Literal

import pyarrow as pa
import pyarrow.csv as pacsv

from batchrun.errors import InputError
from batchrun.source import unsupported
from batchrun.source.content import BOM, DAMAGED, blocks, local_copy, opened
from batchrun.storage.objects import InputFile

BLOCK_BYTES = (1 << 20, 8 << 20)
"""How many bytes are parsed at a time, which is also the longest row. The second size is for files with a longer row.
Arrow reads more than 30 blocks ahead (measured: 45 MB in all for blocks of 1 MB, 300 MB for 8 MB).
"""

BATCH_ROWS = 1024  # as for Parquet
HEADER_BYTES = 1 << 16  # what is read to find the delimiter: the longest possible header


def schema_of(path: InputFile) -> pa.Schema:
    """The columns that the header names, each as text.

    Raises:
        InputError: there is no header, or the file can't be read.
    """
    delimiter, above = _layout(path)
    try:
        with _rows_of(path, delimiter, "strict") as rows:
            names = next((row for row in islice(rows, above, None) if row), None)
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{path} can't be read as CSV: {_reason(path, error, [])}") from error
    if names is None:
        raise InputError(f"{path} can't be read as CSV: it is empty; its first line must name the columns")
    return pa.schema([(name, pa.string()) for name in names])


def rows_in(path: InputFile) -> int:
    """The number of rows, for which the file is read to its end.

    Raises:
        InputError: as `batches`.
    """
    return sum(batch.num_rows for batch in batches(path, 0))


def column(path: InputFile, name: str) -> Iterator[pa.RecordBatch]:
    """All rows with this column alone, for which the file is read to its end.

    Raises:
        InputError: as `batches`.
    """
    return (batch.select([name]) for batch in batches(path, 0))


def batches(path: InputFile, skip: int) -> Iterator[pa.RecordBatch]:
    """The rows after the first `skip`.

    Raises:
        InputError: a row has more or fewer cells than the header, or is not UTF-8; the message says where.
    """
    schema = schema_of(path)
    if skip == 0:
        _require_strict_quotes(path)
    for block_bytes in BLOCK_BYTES:
        try:
            with _reading(path, schema, block_bytes) as reader:
                to_skip = skip  # if a row is longer than the smaller block, read again and skip what was yielded
                for block in reader:
                    for first in range(min(to_skip, block.num_rows), block.num_rows, BATCH_ROWS):
                        batch = block.slice(first, BATCH_ROWS)
                        skip += batch.num_rows
                        yield batch
                    to_skip = max(0, to_skip - block.num_rows)
        except _LongRowError:
            if block_bytes == BLOCK_BYTES[-1]:
                raise
        else:
            return


_LONGER_THAN_A_BLOCK = re.compile("straddling|Empty CSV file or block")  # Arrow's messages for a row and for the header


class _LongRowError(InputError):
    """A row is longer than a block."""


@contextmanager
def _rows_of(path: InputFile, delimiter: str, errors: Literal["strict", "surrogateescape"]) -> Iterator[Any]:
    """A strict reader of the file's rows. Blank lines are empty rows; cells may be as large as Arrow allows."""
    limit = csv.field_size_limit(BLOCK_BYTES[-1])
    try:
        with opened(path) as stream:
            text = io.TextIOWrapper(stream, "utf-8-sig", errors, newline="")
            yield csv.reader(text, delimiter=delimiter, strict=True)
            text.detach()
    except DAMAGED as error:
        raise InputError(f"{path} can't be read to its end: {error}; write or copy it again") from error
    finally:
        csv.field_size_limit(limit)


@contextmanager
def _reading(path: InputFile, schema: pa.Schema, block_bytes: int) -> Iterator[pacsv.CSVStreamingReader]:
    """Arrow's reader of the file; its errors inside the block are raised as ours, and name the row."""
    bad: list[pacsv.InvalidRow] = []

    def note(row: pacsv.InvalidRow) -> Literal["error"]:
        bad.append(row)
        return "error"

    delimiter, above = _layout(path)
    types = dict(zip(schema.names, schema.types, strict=True))
    try:
        with opened(path) as stream:
            yield pacsv.open_csv(
                stream,
                pacsv.ReadOptions(use_threads=False, block_size=block_bytes, skip_rows=above),
                pacsv.ParseOptions(delimiter=delimiter, newlines_in_values=True, invalid_row_handler=note),
                pacsv.ConvertOptions(
                    column_types=types, null_values=[""], strings_can_be_null=True, quoted_strings_can_be_null=False
                ),
            )
    except (*DAMAGED, pa.ArrowException, UnicodeDecodeError) as error:
        kind = _LongRowError if _LONGER_THAN_A_BLOCK.search(str(error)) else InputError
        raise kind(f"{path} can't be read as CSV: {_reason(path, error, bad)}") from error


_QUOTED = re.compile(rb'"[^"]*"')
_EXCEL_SEPARATOR = re.compile(rb'"?sep=(.)"?\r?\n', re.IGNORECASE)


def _layout(path: InputFile) -> tuple[str, int]:
    """The delimiter between cells, and the number of lines above the header."""
    head = next(blocks(path, 0, HEADER_BYTES), b"").removeprefix(BOM)
    if separator := _EXCEL_SEPARATOR.match(head):
        return separator[1].decode("latin-1"), 1
    if ".tsv" in (suffix.lower() for suffix in path.suffixes):
        return "\t", 0
    header = re.split(rb"[\r\n]", _QUOTED.sub(b"", head).lstrip(b"\r\n"), maxsplit=1)[0]
    return next((mark for mark in ",;\t|" if mark.encode() in header), ","), 0


def _require_strict_quotes(path: InputFile) -> None:
    """Reject text after a closing quote, and unclosed quotes. Reads the whole file, 6 s for a GB (measured).

    Arrow accepts text after a closing quote, and reads everything after an unclosed one as one cell.
    """
    with _rows_of(path, _layout(path)[0], "surrogateescape") as rows:
        try:
            for _ in rows:
                pass
        except csv.Error as error:
            if "field larger" not in str(error):  # Arrow reports a row that is too long
                what = "a quote is not closed" if "end of data" in str(error) else _DOUBLE_THEM
                raise InputError(f"{path} can't be read as CSV: line {rows.line_num}: {what}") from error


_DOUBLE_THEM = 'there is text after a closing quote; quotes within a quoted cell must be doubled: "" and not \\"'


def _reason(path: InputFile, error: Exception, bad: list[pacsv.InvalidRow]) -> str:
    """What is wrong with the file, and what to do; `bad` are the rows that Arrow has refused."""
    if bad:
        row = bad[0]
        where = "a row" if row.number is None else f"row {row.number} (the header is 1)"
        start = row.text[:60] + ("…" if len(row.text) > 60 else "")
        if '\\"' in row.text:
            hint = _DOUBLE_THEM
        elif row.text.count('"') % 2:
            hint = "a quote is not closed"
        elif row.actual_columns > row.expected_columns:
            hint = "put cells that hold the delimiter in double quotes"
        else:
            hint = "every row needs a cell for each column, even an empty one"
        return f"{where} has {row.actual_columns} cells, the header {row.expected_columns}: {start!r}; {hint}"
    text = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    if "UTF8" in text or "UTF-8" in text or isinstance(error, UnicodeDecodeError):
        hint = unsupported.encoding_hint("WINDOWS-1252", local_copy(path))
        return f"it is not UTF-8 ({text}); if it is Latin-1, {hint}"
    if _LONGER_THAN_A_BLOCK.search(text):
        return f"a row is longer than {BLOCK_BYTES[-1]:,} bytes, or a quote is not closed; {text}"
    return text
