"""Rows that a program hands over instead of naming a file, as the bytes of a file that says the same."""

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

BLOCK_BYTES = 1 << 20
BATCH_ROWS = 1 << 14  # a polars table may come as one batch


@runtime_checkable
class ArrowStream(Protocol):
    """A table of any library that speaks Arrow's C stream interface: pyarrow, polars, pandas from 2.2, duckdb."""

    def __arrow_c_stream__(self, requested_schema: object = None) -> object: ...


Rows = Iterable[Mapping[str, Any]] | ArrowStream
"""Rows as a program has them: dicts of JSON values, or a table whose types are kept as Parquet keeps them."""


@contextlib.contextmanager
def as_file(rows: Rows, scratch: Path) -> Iterator[BinaryIO]:
    """The rows as an open file, JSON lines or Parquet; `scratch` is the directory for what can't be streamed.

    Raises:
        InputError: a column is of a type that no file holds; on reading, a row holds what JSON can't say.
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
    """Reads as one JSON line for each row; a row is taken when its bytes are wanted."""

    def __init__(self, rows: Iterable[Mapping[str, Any]]) -> None:
        self._lines = (_line(number, row) for number, row in enumerate(rows))
        self._left = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._left:
            self._left = next(self._lines, b"")
        taken = self._left[: len(buffer)]
        buffer[: len(taken)] = taken
        self._left = self._left[len(taken) :]
        return len(taken)


def _line(number: int, row: Mapping[str, Any]) -> bytes:
    """The row as JSON. NaN and infinities are written as they are, so that the check names the row that holds them."""
    if not isinstance(row, Mapping):
        raise InputError(f"rows[{number}]: expected a dict with a value for each column (is a {type(row).__name__})")
    try:
        return json.dumps(dict(row)).encode() + b"\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"rows[{number}]: JSON can't say it: {error}; hand such values over as text") from error
