"""Turns rows that a program passes in memory into a file with the same rows."""

import contextlib
import io
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Protocol, runtime_checkable

import pyarrow as pa
import pyarrow.parquet as pq

from batchrun.errors import InputError
from batchrun.source import parquet, unify

BLOCK_BYTES = 1 << 20  # as JSON lines are read
BATCH_ROWS = 1 << 14  # a polars table may come as one batch


@runtime_checkable
class ArrowStream(Protocol):
    """A table of any library with Arrow's C stream interface: pyarrow, polars, pandas from 2.2, duckdb."""

    def __arrow_c_stream__(self, requested_schema: object = None) -> object: ...


Rows = Iterable[Mapping[str, Any]] | ArrowStream
"""Dicts of JSON values, or a table, whose types are kept as in Parquet."""


@contextlib.contextmanager
def as_file(rows: Rows, scratch: Path) -> Iterator[BinaryIO]:
    """The rows as an open file of JSON lines or Parquet. A table is written to a temporary file in `scratch`.

    Raises:
        InputError: Parquet has no type for a column; while reading: a row holds a value that JSON can't represent.
    """
    if not isinstance(rows, ArrowStream):
        yield io.BufferedReader(_Lines(rows), BLOCK_BYTES)
        return
    with tempfile.TemporaryFile(dir=scratch) as file:
        with pa.RecordBatchReader.from_stream(rows) as batches:
            schema = pa.schema([field.with_type(unify.plain(field.type)) for field in batches.schema])
            parquet.require_writable(schema)
            with pq.ParquetWriter(file, schema) as writer:
                for batch in batches:
                    for first in range(0, batch.num_rows, BATCH_ROWS):
                        writer.write_batch(unify.fitted(batch.slice(first, BATCH_ROWS), schema, {}))
        file.seek(0)
        yield file


class _Lines(io.RawIOBase):
    """Reads as one JSON line per row. Takes each row from the iterable only when its bytes are read."""

    def __init__(self, rows: Iterable[Mapping[str, Any]]) -> None:
        self._lines = (_line(number, row) for number, row in enumerate(rows))
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._rest:
            self._rest = next(self._lines, b"")
        part = self._rest[: len(buffer)]
        buffer[: len(part)] = part
        self._rest = self._rest[len(part) :]
        return len(part)


def _line(number: int, row: Mapping[str, Any]) -> bytes:
    """The row as JSON. NaN and infinities are written as such, so that the input check names their row."""
    if not isinstance(row, Mapping):
        raise InputError(f"rows[{number}]: expected a dict with a value for each column (is a {type(row).__name__})")
    try:
        return json.dumps(dict(row)).encode() + b"\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"rows[{number}]: JSON can't represent it: {error}; pass such values as text") from error
