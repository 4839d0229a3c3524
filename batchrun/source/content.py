"""Recognises an input file by its first bytes, and unpacks its content."""

import gzip
import io
import re
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Literal, cast

import pyarrow as pa

from batchrun.errors import InputError
from batchrun.source import unsupported
from batchrun.source.unsupported import HEAD_BYTES
from batchrun.storage.objects import InputFile, RemoteFile

Content = Literal["parquet", "gzip", "zstd", "plain"]
Format = Literal["jsonl", "parquet", "csv"]
_MAGIC: dict[bytes, Content] = {b"PAR1": "parquet", b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_SKIPPABLE = re.compile(rb"[\x50-\x5f]\x2a\x4d\x18")  # a zstd frame without data, RFC 8878 3.1.2 (pzstd starts so)
BOM = b"\xef\xbb\xbf"
CSV_ENDINGS = (".csv", ".tsv", ".tab", ".psv")


def format_of(path: InputFile) -> Format:
    """The format in which the file is read. Its content decides; for text, its name (`CSV_ENDINGS`, also compressed).

    A file with a CSV name that starts with "{" is read as JSON lines.

    Raises:
        InputError: the file can't be read, or is named like a Parquet file and is not one.
    """
    content = content_of(path)
    if content == "parquet":
        return "parquet"
    head = next(blocks(path, 0, HEAD_BYTES), b"")
    if content != "plain":
        # It must be JSON lines or CSV inside, too.
        with _of_a_copy(path) as local:
            unsupported.refuse(head, local, packed=content)
            if classify(head, local) != "plain":
                hint = unsupported.unpack_hint(content, local)
                raise InputError(f"{local} holds another compressed or Parquet file; {hint}")
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() not in (".gz", ".zst", ".zstd")]
    if not suffixes or suffixes[-1] not in CSV_ENDINGS:
        return "jsonl"
    return "jsonl" if head.removeprefix(BOM).lstrip().startswith(b"{") else "csv"


def local_copy(path: InputFile) -> Path:
    """The file, or the local copy of a remote one that the user must make before a command can work on it."""
    return path if isinstance(path, Path) else Path(path.name)


@contextmanager
def _of_a_copy(path: InputFile) -> Iterator[Path]:
    """`local_copy`; an InputError about it names the remote file, too."""
    try:
        yield local_copy(path)
    except InputError as error:
        if isinstance(path, Path):
            raise
        raise InputError(f"{path}: {error} (in a local copy, for example)") from error


def content_of(path: InputFile) -> Content:
    """The kind of file, by its first bytes.

    Raises:
        InputError: the file is unreadable, not a regular file, in a format that batchrun does not read, or is named
            like a Parquet file and is not one.
    """
    if isinstance(path, RemoteFile):
        head = path.head
    else:
        with reading(path):
            mode = path.stat().st_mode  # checked first: opening a pipe waits for its writer
            if not stat.S_ISREG(mode):
                raise InputError(f"{path} is not a regular file; save a pipe's data to a file first, or pass it to '-'")
            with path.open("rb") as file:
                head = file.read(HEAD_BYTES)
    content = classify(head, path)
    if content != "parquet" and path.suffix in (".parquet", ".pq"):
        what = f"begins with {head[:4]!r}, not b'PAR1'" if head else "is empty (0 bytes)"
        raise InputError(f"{path} {what}: not a Parquet file; write it again, or rename it if it is JSONL")
    return content


def classify(head: bytes, path: InputFile) -> Content:
    """The kind of content that starts with `head`.

    Raises:
        InputError: a format or encoding that batchrun does not read; the message says how to convert the file.
    """
    for magic, content in _MAGIC.items():
        if head.startswith(magic):
            return content
    if _SKIPPABLE.match(head):
        return "zstd"
    with _of_a_copy(path) as local:
        unsupported.refuse(head, local)
    return "plain"


def blocks(file: InputFile, offset: int, block_bytes: int) -> Iterator[bytes]:
    """The unpacked content of a text file, starting at `offset`.

    Raises:
        InputError: the file is unreadable, or a compressed stream in it is cut or damaged.
    """
    try:
        with opened(file) as stream:
            if stream.seekable():
                stream.seek(offset)
            else:
                while offset and (block := stream.read(min(offset, block_bytes))):
                    offset -= len(block)
            while block := stream.read(block_bytes):
                yield block
    except DAMAGED as error:
        raise InputError(f"{file} can't be read to its end: {error}; write or copy it again") from error


DAMAGED = (OSError, EOFError, zlib.error)
"""The exceptions for a cut or damaged compressed stream."""


@contextmanager
def opened(file: InputFile) -> Iterator[BinaryIO]:
    """The unpacked content of a text file."""
    content = content_of(file)
    with file.open() if isinstance(file, RemoteFile) else file.open("rb") as packed:
        if content == "gzip":
            # not by Arrow: its reader rejects zeros after the last member, with which tapes and object stores pad
            with gzip.open(packed) as unpacked:
                yield cast(BinaryIO, unpacked)
        elif content == "zstd":
            with pa.CompressedInputStream(cast(io.IOBase, packed), "zstd") as stream:
                yield cast(BinaryIO, stream)
        else:
            yield packed


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns an OSError while `path` is read into an InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror or error}") from error
