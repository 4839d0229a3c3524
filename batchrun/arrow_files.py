"""Files as Arrow opens them, whatever bytes their names have: as text Arrow takes UTF-8 only."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq


def opened(path: Path, mode: Literal["rb", "wb"] = "rb") -> pa.NativeFile:
    """
    Raises:
        OSError: it can't be opened.
    """
    return pa.OSFile(_name(path), mode)


def mapped(path: Path) -> pa.MemoryMappedFile:
    """The file as memory, to be read only.

    Raises:
        OSError: it can't be opened.
    """
    return pa.memory_map(_name(path))


@contextmanager
def parquet(path: Path, *, checked: bool = True) -> Iterator[pq.ParquetFile]:
    """The Parquet file at `path`. `checked`: its pages are compared with their checksums.

    Raises:
        OSError: it can't be read.
        pa.ArrowException: it is no Parquet file.
    """
    with (
        opened(path) as source,
        pq.ParquetFile(source, page_checksum_verification=checked, pre_buffer=False) as file,
    ):
        yield file


def metadata_of(path: Path) -> pq.FileMetaData:
    """The footer of a Parquet file. Raises as `parquet` does."""
    with opened(path) as source:
        return pq.read_metadata(source)


def schema_of(path: Path) -> pa.Schema:
    """The columns of a Parquet file. Raises as `parquet` does."""
    with opened(path) as source:
        return pq.read_schema(source)


def _name(path: Path) -> Any:
    """The bytes of the name: Arrow takes them, although its type hints say that it does not."""
    return os.fsencode(path)
