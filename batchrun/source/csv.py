"""CSV: a file's header as a schema, and its rows in small batches. Every column is text.

Nothing is guessed: "007" and "1.10" reach the prompt as they stand. An empty cell that is not quoted is null; a quoted
one is the empty text. The first line names the columns. What the header has between its cells, outside quotes, parts
all cells: a comma, else a semicolon, a tab, a bar; a first line `sep=;`, as Excel understands it, says it instead.
Quotes are doubled within quotes; a quoted cell may span lines. Text behind a closing quote is refused.
"""

import csv
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.csv as pacsv

from batchrun.errors import InputError
from batchrun.source import foreign
from batchrun.source.files import BOM, DAMAGED, blocks, opened

BLOCK_BYTES = 8 << 20  # the longest row; a few of them are in memory at a time
BATCH_ROWS = 1024
HEADER_BYTES = 1 << 16


def schema_of(path: Path) -> pa.Schema:
    """The columns that the header names, each as text.

    Raises:
        InputError: there is no header, or the file can't be read.
    """
    with _reading(path, None) as reader:
        return pa.schema([(name, pa.string()) for name in reader.schema.names])


def batches(path: Path, skip: int) -> Iterator[pa.RecordBatch]:
    """The rows behind the first `skip`.

    Raises:
        InputError: a row has another number of cells than the header, or is not UTF-8; the line says where.
    """
    schema = schema_of(path)
    if skip == 0:
        _require_strict_quotes(path)
    with _reading(path, schema) as reader:
        for block in reader:
            for first in range(min(skip, block.num_rows), block.num_rows, BATCH_ROWS):
                yield block.slice(first, BATCH_ROWS)
            skip = max(0, skip - block.num_rows)


@contextmanager
def _reading(path: Path, schema: pa.Schema | None) -> Iterator[pacsv.CSVStreamingReader]:
    """The file being read as `schema`; without one, to see its header."""
    bad: list[pacsv.InvalidRow] = []

    def note(row: pacsv.InvalidRow) -> Literal["error"]:
        bad.append(row)
        return "error"

    delimiter, above = _layout(path)
    types = {} if schema is None else dict(zip(schema.names, schema.types, strict=True))
    try:
        with opened(path) as stream:
            yield pacsv.open_csv(
                stream,
                pacsv.ReadOptions(use_threads=False, block_size=BLOCK_BYTES, skip_rows=above),
                pacsv.ParseOptions(delimiter=delimiter, newlines_in_values=True, invalid_row_handler=note),
                pacsv.ConvertOptions(
                    column_types=types, null_values=[""], strings_can_be_null=True, quoted_strings_can_be_null=False
                ),
            )
    except (*DAMAGED, pa.ArrowException, UnicodeDecodeError) as error:
        raise InputError(f"{path} can't be read as CSV: {_reason(path, error, bad)}") from error


_QUOTED = re.compile(rb'"[^"]*"')
_SAID_BY_EXCEL = re.compile(rb'"?sep=(.)"?\r?\n', re.IGNORECASE)


def _layout(path: Path) -> tuple[str, int]:
    """What stands between cells, and how many lines stand above the header."""
    head = next(blocks(path, 0, HEADER_BYTES), b"").removeprefix(BOM)
    if said := _SAID_BY_EXCEL.match(head):
        return said[1].decode("latin-1"), 1
    if ".tsv" in (suffix.lower() for suffix in path.suffixes):
        return "\t", 0
    header = re.split(rb"[\r\n]", _QUOTED.sub(b"", head).lstrip(b"\r\n"), maxsplit=1)[0]
    return next((mark for mark in ",;\t|" if mark.encode() in header), ","), 0


def _require_strict_quotes(path: Path) -> None:
    """Nothing, if each quoted cell ends where its quote does. Reads the whole file, 6 s for a GB (measured).

    Arrow reads on behind a closing quote, and takes all that follows an open one for a cell's text.
    """
    limit = csv.field_size_limit(BLOCK_BYTES)
    with opened(path) as stream:
        text = io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline="")
        lines = csv.reader(text, delimiter=_layout(path)[0], strict=True)
        try:
            for _ in lines:
                pass
        except csv.Error as error:
            if "field larger" not in str(error):  # then a row is too long, which Arrow names
                what = "a quote is not closed" if "end of data" in str(error) else _DOUBLE_THEM
                raise InputError(f"{path} can't be read as CSV: line {lines.line_num}: {what}") from error
        finally:
            text.detach()
            csv.field_size_limit(limit)


_DOUBLE_THEM = 'text stands behind a closing quote; quotes within a quoted cell must be doubled: "" and not \\"'


def _reason(path: Path, error: Exception, bad: list[pacsv.InvalidRow]) -> str:
    if bad:
        row = bad[0]
        where = "a row" if row.number is None else f"row {row.number} (the header is 1)"
        start = row.text[:60] + ("…" if len(row.text) > 60 else "")
        return f"{where} has {row.actual_columns} cells, the header {row.expected_columns}: {start!r}; {_way_on(row)}"
    text = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    if "Empty CSV file" in text:
        return "it is empty; its first line must name the columns"
    if "UTF8" in text or "UTF-8" in text or isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8 ({text}); if it is Latin-1, {foreign.convert_from('WINDOWS-1252', path)}"
    if "straddling" in text:
        return f"a row is longer than {BLOCK_BYTES:,} bytes, or a quote is not closed; {text}"
    return text


def _way_on(row: pacsv.InvalidRow) -> str:
    if '\\"' in row.text:
        return _DOUBLE_THEM
    if row.text.count('"') % 2:
        return "a quote is not closed"
    if row.actual_columns > row.expected_columns:
        return "put cells that hold the delimiter in double quotes"
    return "every row needs a cell for each column, an empty one too"
