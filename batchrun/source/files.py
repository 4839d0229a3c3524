"""Which files an input path means, whether they can be read, and whether they are still the same."""

import glob
import hashlib
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Literal

import msgspec

from batchrun.errors import DiskError, InputError

Content = Literal["parquet", "gzip", "zstd", "plain"]

_MAGIC: dict[bytes, Content] = {b"PAR1": "parquet", b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_REFUSED = {
    b"PARE": "is an encrypted Parquet file; decrypt it first",
    b"PK\x03\x04": "is a zip archive (or a spreadsheet); unpack it or export it as JSONL or Parquet",
    b"BZh": "is compressed with bzip2; use gzip, zstd or nothing",
    b"\xfd7zXZ": "is compressed with xz; use gzip, zstd or nothing",
    b"ARROW1": "is an Arrow or Feather file; write it as Parquet",
    b"ORC": "is an ORC file; write it as Parquet",
    b"Obj\x01": "is an Avro file; write it as Parquet or JSONL",
    b"SQLite format 3": "is an SQLite database; export the table as JSONL",
}
_ENCODINGS = {  # longest first: UTF-32's mark begins with UTF-16's
    b"\xff\xfe\x00\x00": "UTF-32LE",
    b"\x00\x00\xfe\xff": "UTF-32BE",
    b"\xff\xfe": "UTF-16LE",
    b"\xfe\xff": "UTF-16BE",
    b"{\x00\x00\x00": "UTF-32LE",
    b"\x00\x00\x00{": "UTF-32BE",
    b"{\x00": "UTF-16LE",
    b"\x00{": "UTF-16BE",
}
HEAD_BYTES = 16
COPY_BYTES = 1 << 20


def find_files(path: str) -> tuple[Path, ...]:
    """The input files that `path` means, sorted by path string: a file, a directory's own files, or a glob.

    In directories and globs, names beginning with "." or "_" are left out, as Spark and Hive do (`_SUCCESS`).

    Raises:
        InputError: nothing matches, a file is unreadable, no regular file, or of another format than the first.
    """
    files = tuple(sorted(_matches(path), key=str))
    if not files:
        raise InputError(f"{path}: no input file there; name a JSONL or Parquet file, a directory, or a glob")
    formats: dict[bool, Path] = {}
    for file in files:
        formats.setdefault(is_parquet(file), file)
    if len(formats) > 1:
        raise InputError(
            f"{formats[True]} is Parquet but {formats[False]} is not; "
            "an input has one format: name its files with a glob such as 'data/*.parquet'"
        )
    return files


def _matches(path: str) -> list[Path]:
    named = Path(path)
    if named.is_dir():
        found = [child for child in named.iterdir() if not child.is_dir()]
    elif os.path.lexists(path):
        return [named]
    else:
        found = [Path(match) for match in glob.glob(path, recursive=True) if not Path(match).is_dir()]  # noqa: PTH207
    return [file for file in found if not file.name.startswith((".", "_"))]


def is_parquet(path: Path) -> bool:
    """Whether the file is Parquet; otherwise it is read as JSON lines.

    Raises:
        InputError: the file can't be read, or its name promises a Parquet file that is not there.
    """
    return content_of(path) == "parquet"


def content_of(path: Path) -> Content:
    """What the first bytes of a file say it is; the name only matters where they contradict ".parquet".

    Raises:
        InputError: unreadable, no regular file, a known format that can't be read, or no Parquet despite its name.
    """
    head = _head_of(path)
    content = classify(head, path)
    if content != "parquet" and path.suffix in (".parquet", ".pq"):
        what = f"begins with {head[:4]!r}, not b'PAR1'" if head else "is empty (0 bytes)"
        raise InputError(f"{path} {what}: no Parquet file; write it again, or rename it if it is JSONL")
    return content


def _head_of(path: Path) -> bytes:
    with reading(path):
        mode = path.stat().st_mode  # before opening: opening a pipe waits for its writer
        if not stat.S_ISREG(mode):
            raise InputError(f"{path} is no regular file; save a pipe's data to a file first, or feed it to '-'")
        with path.open("rb") as file:
            return file.read(HEAD_BYTES)


def classify(head: bytes, path: Path) -> Content:
    """What content that begins with `head` is.

    Raises:
        InputError: a known format or encoding that batchrun does not read; the line says how to convert it.
    """
    for magic, content in _MAGIC.items():
        if head.startswith(magic):
            return content
    for magic, refusal in _REFUSED.items():
        if head.startswith(magic):
            raise InputError(f"{path} {refusal}")
    for mark, encoding in _ENCODINGS.items():
        if head.startswith(mark):
            raise InputError(f"{path}:1 is {encoding}, not UTF-8; convert it with: iconv -f {encoding} -t UTF-8 {path}")
    return "plain"


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns the system's refusal to read `path` into an InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror or error}") from error


class FileIdentity(msgspec.Struct, frozen=True):
    """What tells a file from its replacement without reading it."""

    path: str
    size_bytes: int
    mtime_ns: int
    inode: int


def fingerprint(files: tuple[Path, ...]) -> tuple[FileIdentity, ...]:
    """The identities of `files` now, in their order.

    Raises:
        InputError: a file is gone or can't be looked at.
    """
    return tuple(_identity(file) for file in files)


def _identity(file: Path) -> FileIdentity:
    with reading(file):
        status = file.stat()
    return FileIdentity(str(file), status.st_size, status.st_mtime_ns, status.st_ino)


def changed(files: tuple[Path, ...], identities: tuple[FileIdentity, ...]) -> str | None:
    """What is no longer as `fingerprint` saw it, in words that go after "the input changed: ", or None."""
    before = {identity.path: identity for identity in identities}
    for file in files:
        if str(file) not in before:
            return f"{file} is new"
        if not file.exists():
            return f"{file} is gone"
        was, now = before.pop(str(file)), _identity(file)
        if was.size_bytes != now.size_bytes:
            return f"{file} had {was.size_bytes:,} bytes and has {now.size_bytes:,}"
        if was != now:
            return f"{file} was written again"
    return f"{next(iter(before))} is no longer part of it" if before else None


def digest(path: Path) -> str:
    """BLAKE2b-128 of the file's bytes, in hex, read in one pass of constant memory.

    Raises:
        InputError: the file can't be read.
    """
    with reading(path), path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def spool(stream: BinaryIO, to: Path) -> None:
    """`to` holds all that `stream` had, durably, mode 0600; on any failure `to` is as it was.

    Raises:
        DiskError: the copy could not be written; nothing of it is left.
    """
    descriptor, name = tempfile.mkstemp(dir=to.parent, prefix=f".{to.name}.")
    partial = Path(name)
    try:
        with open(descriptor, "wb") as file:
            while block := _read(stream):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(to)
        _sync_directory(to.parent)
    except OSError as error:
        raise DiskError(f"{to}: standard input can't be kept: {error.strerror}; make room there") from error
    finally:
        partial.unlink(missing_ok=True)


def _read(stream: BinaryIO) -> bytes:
    """The next bytes of standard input.

    Raises:
        InputError: it can't be read: it is open for writing only, a directory, a terminal that is gone.
    """
    try:
        return stream.read(COPY_BYTES)
    except OSError as error:
        raise InputError(f"standard input can't be read: {error.strerror}; name a file with -i") from error


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
