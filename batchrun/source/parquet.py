"""Reads a Parquet file's schema, and its rows in small batches, row group by row group."""

import hashlib
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from batchrun import arrow_files
from batchrun.errors import InputError
from batchrun.source.content import reading
from batchrun.storage.objects import InputFile, RemoteFile

BATCH_ROWS = 1024  # larger is no faster (measured); 1,024 copies of a 40 KB text from a dictionary are 40 MB
BATCH_BYTES = 1 << 20  # by the average row of its group: fewer of long rows are in memory at once
TAIL_BYTES = 8  # at the end: the length of the footer in four bytes, then "PAR1"
PAGE_BUFFER_BYTES = 1 << 18  # without it, a whole column chunk is read at once: 1 GB for a 1 GB row group (measured)
REMOTE_BUFFER_BYTES = 4 << 20  # a column's bytes that one request brings; a request takes tens of milliseconds
DAMAGE = (OSError, pa.ArrowException, UnicodeDecodeError)  # the last one: a column's name is not UTF-8


def schema_of(path: InputFile) -> pa.Schema:
    """The schema in the file's footer.

    Raises:
        InputError: the file is truncated, damaged or encrypted.
    """
    try:
        with _open(path) as file:
            schema = file.schema_arrow.remove_metadata()
        schema.names  # noqa: B018  decodes them
    except DAMAGE as error:
        raise InputError(f"{path} can't be read: {_reason(error)}") from error
    return schema


def rows_in(path: InputFile) -> int:
    """The number of rows, by the file's footer.

    Raises:
        InputError: as `schema_of`.
    """
    with _open(path) as file:
        return file.metadata.num_rows


def footer_digest(path: Path) -> str:
    """BLAKE2b-128, in hex, of the footer, which has place, size and statistics of every column chunk, and of the file's
    size. Reads nothing else.

    Raises:
        InputError: the file can't be read, or has no footer.
    """
    with reading(path), path.open("rb") as file:
        size = file.seek(-TAIL_BYTES, os.SEEK_END) + TAIL_BYTES
        tail = file.read()
        footer_bytes = int.from_bytes(tail[:4], "little") + TAIL_BYTES
        if footer_bytes > size:
            raise InputError(f"{path} can't be read: its footer is damaged; write or copy it again")
        file.seek(-footer_bytes, os.SEEK_END)
        return hashlib.blake2b(b"%d " % size + file.read(), digest_size=16).hexdigest()


def batches(path: InputFile, skip: int) -> Iterator[pa.RecordBatch]:
    """The rows after the first `skip`, one row group at a time: Arrow can't read nested dictionaries across two.

    Raises:
        InputError: a page is damaged, encrypted, or of a type Arrow can't read.
    """
    first = 0
    with _open(path) as file:
        for group in range(file.num_row_groups):
            behind = first + file.metadata.row_group(group).num_rows
            if skip < behind:
                yield from _group(file, path, group, first, skip=max(0, skip - first))
            first = behind


def column(path: InputFile, name: str) -> Iterator[pa.RecordBatch]:
    """All rows with this column alone; no other column is read.

    Raises:
        InputError: as `batches`.
    """
    with _open(path) as file:
        try:
            for group in range(file.num_row_groups):
                yield from file.iter_batches(BATCH_ROWS, [group], [name])
        except DAMAGE as error:
            raise InputError(f"{path} column '{name}' can't be read: {_reason(error)}") from error


def require_writable(schema: pa.Schema, place: str = "") -> None:
    """Rejects columns that a Parquet file can't hold, because the output is one.

    Raises:
        InputError: names `place`, the column, its type, and what to do.
    """
    for field in schema:
        try:  # pyarrow has no other check
            pq.ParquetWriter(io.BytesIO(), pa.schema([field])).close()
        except pa.ArrowException as error:
            what = f"{place}column '{field.name}' of type {field.type}: " + str(error).splitlines()[0].rstrip(".")
            raise InputError(f"{what}; cast it or leave it out") from error


def _group(file: pq.ParquetFile, path: InputFile, group: int, first: int, skip: int) -> Iterator[pa.RecordBatch]:
    """The rows of a row group after its first `skip`; `first` is the group's first row in the file."""
    meta = file.metadata.row_group(group)
    batch_rows = max(1, min(BATCH_ROWS, BATCH_BYTES * meta.num_rows // max(1, meta.total_byte_size)))
    done = 0
    try:
        for batch in file.iter_batches(batch_size=batch_rows, row_groups=[group]):
            done += batch.num_rows
            if done > skip:
                yield batch.slice(max(0, batch.num_rows - (done - skip)))
    except DAMAGE as error:
        rows = f"rows {first + done} to {first + meta.num_rows - 1}"
        raise InputError(f"{path} {rows} can't be read: {_where(file, group)}{_reason(error)}") from error


def _where(file: pq.ParquetFile, group: int) -> str:
    """Names the column that can't be read there, with its type; "" if each column can be read alone."""
    for field in file.schema_arrow:
        try:
            for _ in file.iter_batches(BATCH_ROWS, [group], [field.name]):
                pass
        except DAMAGE:
            return f"column '{field.name}' of type {field.type}: "
    return ""


@contextmanager
def _open(path: InputFile) -> Iterator[pq.ParquetFile]:
    """The open file; of a remote one larger pieces are read, since each is a request."""
    buffer_bytes = REMOTE_BUFFER_BYTES if isinstance(path, RemoteFile) else PAGE_BUFFER_BYTES
    with path.open(buffer_bytes=0) if isinstance(path, RemoteFile) else _local(path) as opened:
        try:
            file = pq.ParquetFile(opened, pre_buffer=False, buffer_size=buffer_bytes, page_checksum_verification=True)
        except DAMAGE as error:
            raise InputError(f"{path} can't be read: {_reason(error)}") from error
        with file:
            yield file


def _local(path: Path) -> pa.NativeFile:
    with reading(path):
        return arrow_files.opened(path)


def _reason(error: Exception) -> str:
    """Arrow's error in one line, with what to do."""
    text = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    if "crypt" in text:
        return "it is encrypted; decrypt it first"
    if "more than 64 bits" in text:
        return "a column holds integers of more than 64 bits; write it as text, decimal or 64 bits"
    if "too deeply nested" in text:
        return "a column is nested more than 100 levels deep; write it as JSON text"
    if "not implemented" in text or isinstance(error, pa.ArrowNotImplementedError):
        return f"{text}; cast that column to a plain type"
    return f"{text}; the file is damaged or truncated: write or copy it again"
