"""Rows → Parquet files: parts of sealed chunks, the final file, the usage table.

Parts are contiguous and ordered, so the final file is their concatenation: no sort, ever. Every file gets a temp name,
page checksums, fsync, its footer and row count read back, a digest, and only then its name.
"""

import contextlib
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from batchrun import arrow_files
from batchrun.durable import digest, disk_errors, link, replacing
from batchrun.errors import CheckpointError
from batchrun.job.settings import Output
from batchrun.run_summary import TotalsLine
from batchrun.source.window import size_of
from batchrun.tables.booked import usage_rows
from batchrun.tables.rows import USAGE_COLUMNS

READ_ROWS = 2048  # at once, of a row group at most: half as many cost more a row (docs/benchmarks.md)
ROW_GROUP_BYTES = 4_000_000  # what one reader must hold, and what we do, about twice, while writing
ROW_GROUP_ROWS = 65_536  # of rows that are so short that the bytes above would hold more

Compression = Literal["zstd", "snappy", "gzip", "none"]

FOOTER_KEY = "batchrun"
"""The footer's key-value entry that holds the run's totals as JSON: a file that was moved still knows its bill."""


class ParquetFile:
    """A Parquet file that is being written batch by batch. Leave the block to have it complete."""

    def __init__(self, path: Path, schema: pa.Schema, compression: Compression) -> None:
        self._schema = schema
        self._pending: list[pa.RecordBatch] = []
        self._pending_bytes = self._pending_rows = 0
        self.rows = 0
        path.touch(mode=0o600)
        self._sink = arrow_files.opened(path, "wb")
        self._writer = pq.ParquetWriter(self._sink, schema, compression=compression, write_page_checksum=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._sink:
            if kind is None:
                self._flush()
            self._writer.close()

    def write(self, batch: pa.RecordBatch) -> None:
        """The batch is in the file, or in the row group that is being gathered."""
        for piece, size in _pieces(batch):
            full = self._pending_bytes + size > ROW_GROUP_BYTES or self._pending_rows + piece.num_rows > ROW_GROUP_ROWS
            if full and self._pending:
                self._flush()
            self._pending.append(piece)
            self._pending_bytes += size
            self._pending_rows += piece.num_rows

    def write_metadata(self, metadata: Mapping[str, str]) -> None:
        """The footer will hold these."""
        self._writer.add_key_value_metadata(dict(metadata))

    def _flush(self) -> None:
        if self._pending:
            self._writer.write_table(pa.Table.from_batches(self._pending, self._schema), row_group_size=ROW_GROUP_ROWS)
        self.rows += self._pending_rows
        self._pending, self._pending_bytes, self._pending_rows = [], 0, 0


def _pieces(batch: pa.RecordBatch) -> Iterator[tuple[pa.RecordBatch, int]]:
    """The batch in halves of halves, until each fits into a row group or is a single row; each with its bytes."""
    size = size_of(batch)
    if batch.num_rows < 2 or size <= ROW_GROUP_BYTES:
        yield batch, size
        return
    half = batch.num_rows // 2
    yield from _pieces(batch.slice(0, half))
    yield from _pieces(batch.slice(half))


def write_part(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch], output: Output, rows: int) -> str:
    """The part is on disk, whole and read back; returns its digest."""
    with replacing(path) as temporary:
        with ParquetFile(temporary, schema, output.compression) as file:
            for batch in batches:
                file.write(batch)
        require_rows(temporary, rows)
    return digest(path)


def assemble(
    parts: Sequence[tuple[Path, str, int]],
    to: Path,
    schema: pa.Schema,
    compression: Compression,
    metadata: Mapping[str, str],
) -> str:
    """The final file is on disk: the parts (path, digest, rows) one after another; returns its digest.

    Raises:
        CheckpointError: a part is not what was sealed.
    """
    with replacing(to) as temporary:
        with ParquetFile(temporary, schema, compression) as file:
            for path, expected, rows in parts:
                for batch in sealed_batches(path, expected, rows):
                    file.write(batch)
            file.write_metadata(metadata)
        require_rows(temporary, sum(rows for _, _, rows in parts))
    return digest(to)


def part_in(folder: Path, number: int) -> Path:
    """The path of a part when the parts themselves are the result."""
    return folder / f"part-{number:06d}.parquet"


def link_part(source: Path, to: Path, expected_digest: str) -> None:
    """`to` is the part, too, without a byte copied where the file system has links: parts are never changed."""
    require_digest(source, expected_digest)
    with disk_errors(to):
        link(source, to)


def copy_part(source: Path, to: Path, expected_digest: str) -> None:
    """`to` holds the part, byte for byte."""
    require_digest(source, expected_digest)
    with replacing(to) as temporary:
        temporary.touch(mode=0o600)
        shutil.copyfile(source, temporary)


def rows_in(path: Path) -> int:
    """The rows of a file, by its footer."""
    with _readable(path):
        return arrow_files.metadata_of(path).num_rows


def schema_of(path: Path) -> pa.Schema:
    """The columns of a completions file."""
    with _readable(path):
        return arrow_files.schema_of(path)


def cut(path: Path, expected_digest: str, rows: Sequence[int]) -> Iterator[Iterator[pa.RecordBatch]]:
    """The file's rows in consecutive pieces of so many rows; take each piece whole before the next.

    Raises:
        CheckpointError: the file is not the one that was written.
    """
    batches = sealed_batches(path, expected_digest, sum(rows))
    left: list[pa.RecordBatch] = []

    def piece(wanted: int) -> Iterator[pa.RecordBatch]:
        while wanted:
            batch = left.pop() if left else next(batches)
            if batch.num_rows > wanted:
                left.append(batch.slice(wanted))
                batch = batch.slice(0, wanted)
            wanted -= batch.num_rows
            yield batch

    return (piece(wanted) for wanted in rows)


def write_usage(path: Path, lines: Sequence[TotalsLine]) -> None:
    """usage.parquet: one line for each invocation, day, model and status."""
    batch = pa.RecordBatch.from_pylist(usage_rows(lines), USAGE_COLUMNS)
    with replacing(path) as temporary, ParquetFile(temporary, USAGE_COLUMNS, "zstd") as file:
        file.write(batch)


def batches_of(path: Path) -> Iterator[pa.RecordBatch]:
    """The rows of a part or result in order; pages are compared with their checksums."""
    with arrow_files.parquet(path) as file:
        yield from _batches(file)


def read_footer(path: Path) -> dict[str, object] | None:
    """The totals in the footer of a completions file; None where it holds none of ours."""
    with _readable(path):
        entry = (arrow_files.metadata_of(path).metadata or {}).get(FOOTER_KEY.encode())
    try:
        return None if entry is None else msgspec.json.decode(entry, type=dict[str, object])
    except msgspec.DecodeError as error:
        raise CheckpointError(f"{path}: its totals can't be read: {error}") from error


def sealed_batches(path: Path, expected: str, rows: int) -> Iterator[pa.RecordBatch]:
    """The rows of a part or result in order.

    Raises:
        CheckpointError: it is not what was written.
    """
    require_digest(path, expected)
    with arrow_files.parquet(path) as file:
        if file.metadata.num_rows != rows:
            raise CheckpointError(f"{path}: holds {file.metadata.num_rows:,} rows, {rows:,} were sealed")
        yield from _batches(file)


def _batches(file: pq.ParquetFile) -> Iterator[pa.RecordBatch]:
    """The file's rows in order. One thread decodes: with two, 10 MB more are held, and it takes no less time."""
    for group in range(file.num_row_groups):  # one by one: nested dictionaries can't be read across two
        yield from file.iter_batches(batch_size=READ_ROWS, row_groups=[group], use_threads=False)


def require_digest(path: Path, expected: str) -> None:
    """Returns if the part is what was sealed.

    Raises:
        CheckpointError: it is not, or can't be read.
    """
    try:
        found = digest(path)
    except OSError as error:
        raise CheckpointError(f"{path}: a sealed part can't be read: {error.strerror}") from error
    if found != expected:
        raise CheckpointError(f"{path}: damaged: its digest is not the one it was sealed with")


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise CheckpointError(f"{path}: can't be read as Parquet: {error}") from error


def require_rows(path: Path, rows: int) -> None:
    """Returns if the footer of the file that was just written can be read and counts `rows` rows."""
    found = arrow_files.metadata_of(path).num_rows  # a failure here is the disk's: it was written just now
    if found != rows:
        raise CheckpointError(f"{path}: {found:,} rows written where {rows:,} were due")
