"""CSV: a file's header as a schema, and its rows in small batches. Every column is text.

Nothing is guessed: "007" and "1.10" reach the prompt as they stand. An empty cell that is not quoted is null; a quoted
one is the empty text. The first line names the columns. Cells stand between commas, tabs (`.tsv`), or semicolons where
the header has those and no comma. Quotes are doubled within quotes; a quoted cell may span lines.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.csv as pacsv

from batchrun.errors import InputError
from batchrun.source.files import DAMAGED, blocks, opened

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

    types = {} if schema is None else dict(zip(schema.names, schema.types, strict=True))
    try:
        with opened(path) as stream:
            yield pacsv.open_csv(
                stream,
                pacsv.ReadOptions(use_threads=False, block_size=BLOCK_BYTES),
                pacsv.ParseOptions(delimiter=_delimiter(path), newlines_in_values=True, invalid_row_handler=note),
                pacsv.ConvertOptions(
                    column_types=types, null_values=[""], strings_can_be_null=True, quoted_strings_can_be_null=False
                ),
            )
    except (*DAMAGED, pa.ArrowException, UnicodeDecodeError) as error:
        raise InputError(f"{path} can't be read as CSV: {_reason(error, bad)}") from error


def _delimiter(path: Path) -> str:
    if ".tsv" in (suffix.lower() for suffix in path.suffixes):
        return "\t"
    header = next(blocks(path, 0, HEADER_BYTES), b"").split(b"\n", 1)[0]
    if b"," in header:
        return ","
    return ";" if b";" in header else "\t" if b"\t" in header else ","


def _reason(error: Exception, bad: list[pacsv.InvalidRow]) -> str:
    if bad:
        row = bad[0]
        where = "a row" if row.number is None else f"row {row.number} (the header is 1)"
        start = row.text[:60] + ("…" if len(row.text) > 60 else "")
        return (
            f"{where} has {row.actual_columns} cells, the header {row.expected_columns}: {start!r}; "
            "put cells that hold the delimiter in double quotes"
        )
    text = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    if "Empty CSV file" in text:
        return "it is empty; its first line must name the columns"
    if "UTF8" in text or "UTF-8" in text or isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8 ({text}); if it is Latin-1, convert it with: iconv -f WINDOWS-1252 -t UTF-8"
    if "straddling" in text:
        return f"a row is longer than {BLOCK_BYTES:,} bytes, or a quote is not closed; {text}"
    return text
