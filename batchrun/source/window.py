"""The values that every source yields: positions, records and windows."""

from collections.abc import Callable, Container, Iterator
from typing import Literal, Protocol

import msgspec
import pyarrow as pa

from batchrun.storage.objects import InputFile


class Position(msgspec.Struct, frozen=True, gc=False):
    """A place between two records from which reading can resume.

    `file` indexes the files of the source. `offset` is in bytes of the decompressed stream (JSONL) or in rows
    of the file (Parquet). `line` counts the lines before it in the file (0 for Parquet), `ordinal` the records
    before it in the whole input, rejected ones included.
    """

    file: int
    offset: int
    line: int
    ordinal: int


START = Position(file=0, offset=0, line=0, ordinal=0)


class Span(msgspec.Struct, frozen=True):
    """A stretch of the input: the records from `start` on, up to but without ordinal `end`. `records` are all."""

    start: Position
    end: int
    records: int

    def enter(self, position: Position) -> Position:
        """The first place to read for `position`: not before the span."""
        return position if position.ordinal > self.start.ordinal else self.start


class Record(msgspec.Struct, frozen=True, gc=False):
    """One record of the input: its columns, or the problem that makes it invalid.

    `place` is `origin` and `number` joined: "reviews.jsonl:17" (lines from 1), "reviews.parquet row 16" (from 0).
    `columns` is empty if there is a `problem`. `line` is the text of an invalid line within the length limit.
    """

    ordinal: int
    origin: str
    number: int
    columns: dict[str, object]
    problem: str | None = None
    line: bytes | None = None

    @property
    def place(self) -> str:
        """The record's place in the input, for people."""
        return f"{self.origin}{self.number}"


class Window(msgspec.Struct, frozen=True):
    """Consecutive accepted records in the form in which they are stored, and where the next window starts.

    `table` has one chunk per column, so it can be written in batches of any size to an Arrow IPC file
    (which can't hold a dictionary that changes between batches). JSONL: one column `line`, see `LINES`.
    """

    table: pa.Table
    end: Position

    @property
    def rows(self) -> int:
        """How many records the window holds; at least 1."""
        return self.table.num_rows


class Source(Protocol):
    """An opened input. Both methods can be called repeatedly, from any `Window.end` of the same files."""

    files: tuple[InputFile, ...]

    @property
    def format(self) -> Literal["jsonl", "parquet", "csv"]:
        """The format of every file."""

    def records(self, start: Position = START) -> Iterator[Record]:
        """Every record from `start` on, invalid ones included."""

    def windows(self, start: Position, max_rows: int, max_bytes: int, skip: Container[int] = ()) -> Iterator[Window]:
        """The records from `start` on without the ordinals in `skip`, in windows of at least one record."""

    def find_span(self, choose: Callable[[int], tuple[int, int]]) -> Span:
        """The span of the ordinals (first, end) that `choose` returns for the number of records."""


LINES = pa.schema([pa.field("line", pa.large_binary(), nullable=False)], metadata={"batchrun.window": "jsonl lines"})
"""The schema of a JSONL window. The metadata distinguishes it from a Parquet file with a column `line`."""


def size_of(rows: pa.RecordBatch) -> int:
    """Bytes of the rows without dictionaries: a dictionary belongs to the whole file and is as large for fewer rows."""
    return sum((c.indices if isinstance(c, pa.DictionaryArray) else c).nbytes for c in rows.columns)
