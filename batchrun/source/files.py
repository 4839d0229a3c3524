"""Finds the files of an input path, checks that they can be read, and detects that a file has changed."""

import glob
import gzip
import hashlib
import io
import os
import re
import stat
import tempfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Literal, cast

import msgspec
import pyarrow as pa

from batchrun.errors import DiskError, InputError
from batchrun.source import partitions, unsupported
from batchrun.source.partitions import Filters
from batchrun.source.unsupported import HEAD_BYTES
from batchrun.storage import objects, urls
from batchrun.storage.access import Access
from batchrun.storage.objects import InputFile, RemoteFile

Content = Literal["parquet", "gzip", "zstd", "plain"]
Format = Literal["jsonl", "parquet", "csv"]
_MAGIC: dict[bytes, Content] = {b"PAR1": "parquet", b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_SKIPPABLE = re.compile(
    rb"[\x50-\x5f]\x2a\x4d\x18"
)  # a zstd frame without data, RFC 8878 3.1.2; pzstd writes one first
COPY_BYTES = 1 << 20
_ALL: Filters = {}
BOM = b"\xef\xbb\xbf"
CSV_ENDINGS = (".csv", ".tsv", ".tab", ".psv")


def find_files(path: str, filters: Filters = _ALL, access: Access = Access()) -> tuple[InputFile, ...]:  # noqa: B008
    """The input files that `path` means, sorted by path string: a file, a directory, or a glob; or a URL of them. Of
    those in folders named `key=value`, the ones that match the `filters`; no other is opened.

    A directory means its own files and those in its folders named `key=value`, at every depth. In directories and
    globs, names that begin with "." or "_" are left out, files and folders both, as Spark and Hive do (`_SUCCESS`,
    `_temporary`), and so are checksums (`.crc`).

    Raises:
        InputError: nothing matches; a filter names an unknown key; a file is unreadable, not a regular file, or in
            another format than the first.
    """
    files = tuple(sorted(_remote_matches(path, access) if urls.is_url(path) else _matches(path), key=str))
    if not files:
        raise InputError(
            f"{path}: no input file there{_folders_in(path)}; name a JSONL or Parquet file, CSV, a directory, or a glob"
        )
    if filters:
        files = partitions.chosen(files, filters, path)
    formats: dict[Format, InputFile] = {}
    for file in files:
        _require_unicode(file)
        formats.setdefault(format_of(file), file)
    if len(formats) > 1:
        (one, first), (_, second) = sorted(formats.items(), reverse=True)[:2]
        raise InputError(
            f"{first} is {_NAMES[one]} but {second} is not; "
            f"an input has one format: name its files with a glob such as 'data/*.{one}'"
        )
    return files


def file_at(path: str) -> InputFile:
    """The file of that path or URL, which need not exist. A store is reached as the environment says."""
    return objects.file_at(path) if urls.is_url(path) else Path(path)


_NAMES: dict[Format, str] = {"jsonl": "JSON lines", "parquet": "Parquet", "csv": "CSV"}


def _remote_matches(text: str, access: Access) -> list[InputFile]:
    """The same of an object store."""
    found, named = objects.find(text, access), urls.parse(text).path.rstrip("/")
    if [file.url.path for file in found] == [named]:
        return list(found)
    pattern = urls.is_pattern(named)
    above = len(PurePosixPath(urls.fixed_part(named)).parts)
    below = [(file, PurePosixPath(file.url.path).parts[above:]) for file in found]
    return [
        file
        for file, parts in below
        if not parts or (not any(map(_is_left_out, parts)) and (pattern or all("=" in folder for folder in parts[:-1])))
    ]


def _matches(path: str) -> list[Path]:
    named = Path(path)
    if named.is_dir():
        return list(_files_below(named))
    if os.path.lexists(path):
        return [named]
    fixed = len(Path(glob.escape(path.partition("*")[0])).parts)  # a hidden folder that the path names is read
    found = [Path(match) for match in glob.glob(path, recursive=True) if not Path(match).is_dir()]  # noqa: PTH207
    return [file for file in found if not any(map(_is_left_out, file.parts[min(fixed, len(file.parts) - 1) :]))]


def _files_below(folder: Path) -> Iterator[Path]:
    """The files of a directory, and of its folders that are named `key=value`."""
    with reading(folder):
        children = list(folder.iterdir())
    for child in children:
        if _is_left_out(child.name):
            continue
        if not child.is_dir():
            yield child
        elif "=" in child.name:
            yield from _files_below(child)


def _is_left_out(name: str) -> bool:
    return name.startswith((".", "_")) or name.endswith(".crc")


def _folders_in(path: str) -> str:
    """A hint for a directory that holds only folders; "" for any other path."""
    if not Path(path).is_dir():
        return ""
    below = [file for file in Path(path).rglob("*") if file.is_file() and not any(map(_is_left_out, file.parts[1:]))]
    if not below:
        return ""
    pattern = Path(path) / "**" / f"*{min(below).suffix}"
    return f", only folders with {len(below):,} files (to read them all, write '{pattern}')"


def _require_unicode(path: InputFile) -> None:
    """Reject a path that is not UTF-8: the checkpoint, the log and the result's footer store paths as UTF-8."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        shown = os.fsencode(str(path)).decode("utf-8", "backslashreplace")
        raise InputError(f"{shown}: the name holds bytes that are not UTF-8; rename the file or its folder") from None


def format_of(path: InputFile) -> Format:
    """The format in which the file is read. Its content decides; for text, its name (`CSV_ENDINGS`, also compressed).

    A file with a CSV name that begins with "{" is read as JSON lines.

    Raises:
        InputError: the file can't be read, or is named like a Parquet file and is not one.
    """
    content = content_of(path)
    if content == "parquet":
        return "parquet"
    head = next(blocks(path, 0, HEAD_BYTES), b"")
    if content != "plain":
        _require_text_within(head, path, content)
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() not in (".gz", ".zst", ".zstd")]
    if not suffixes or suffixes[-1] not in CSV_ENDINGS:
        return "jsonl"
    return "jsonl" if head.removeprefix(BOM).lstrip().startswith(b"{") else "csv"


def _require_text_within(head: bytes, path: InputFile, content: Content) -> None:
    """Reject compressed content that can be neither JSON lines nor CSV."""
    with _of_a_copy(path) as local:
        unsupported.refuse(head, local, packed=content)
        if classify(head, local) != "plain":
            hint = unsupported.unpack_hint(content, local)
            raise InputError(f"{local} holds another compressed or Parquet file; {hint}")


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
    """What the file is by its first bytes.

    Raises:
        InputError: the file is unreadable, not a regular file, in a format that batchrun does not read, or is named
            like a Parquet file and is not one.
    """
    head = _head_of(path)
    content = classify(head, path)
    if content != "parquet" and path.suffix in (".parquet", ".pq"):
        what = f"begins with {head[:4]!r}, not b'PAR1'" if head else "is empty (0 bytes)"
        raise InputError(f"{path} {what}: not a Parquet file; write it again, or rename it if it is JSONL")
    return content


def _head_of(path: InputFile) -> bytes:
    if isinstance(path, RemoteFile):
        return path.head
    with reading(path):
        mode = path.stat().st_mode  # checked first: opening a pipe waits for its writer
        if not stat.S_ISREG(mode):
            raise InputError(f"{path} is not a regular file; save a pipe's data to a file first, or pass it to '-'")
        with path.open("rb") as file:
            return file.read(HEAD_BYTES)


def classify(head: bytes, path: InputFile) -> Content:
    """What content that begins with `head` is.

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
            _skip(stream, offset, block_bytes)
            while block := stream.read(block_bytes):
                yield block
    except DAMAGED as error:
        raise InputError(f"{file} can't be read to its end: {error}; write or copy it again") from error


DAMAGED = (OSError, EOFError, zlib.error)
"""What a cut or damaged compressed stream raises."""


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


def _skip(stream: BinaryIO, offset: int, block_bytes: int) -> None:
    if stream.seekable():
        stream.seek(offset)
        return
    while offset and (block := stream.read(min(offset, block_bytes))):
        offset -= len(block)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns an OSError while `path` is read into an InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror or error}") from error


class FileIdentity(msgspec.Struct, frozen=True):
    """Distinguishes a file from its replacement without reading it. `etag` is that of an object store, which then
    stands for the time, too.
    """

    path: str
    size_bytes: int
    mtime_ns: int
    inode: int
    etag: str = ""


AT_ONCE = 16
"""Remote files whose identities are requested at a time: each answer takes tens of milliseconds."""


def fingerprint(files: tuple[InputFile, ...]) -> tuple[FileIdentity, ...]:
    """The identities of `files` now, in their order.

    Raises:
        InputError: a file is gone or its status can't be read.
    """
    identities = tuple(_identities(files))
    for file, identity in zip(files, identities, strict=True):
        if identity is None:
            raise InputError(f"{file} can't be read: No such file or directory")
    return cast(tuple[FileIdentity, ...], identities)


def _identities(files: tuple[InputFile, ...]) -> Iterator[FileIdentity | None]:
    """The identity of each file; None if it is gone."""
    if len(files) < 2 or isinstance(files[0], Path):
        yield from map(_identity, files)
        return
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield from pool.map(_identity, files)


def _identity(file: InputFile) -> FileIdentity | None:
    try:
        if isinstance(file, RemoteFile):
            size, mtime_ns, etag = file.identity()
            return FileIdentity(str(file), size, mtime_ns, 0, etag)
        status = file.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise InputError(f"{file} can't be read: {error.strerror or error}") from error
    return FileIdentity(str(file), status.st_size, status.st_mtime_ns, status.st_ino)


def changed(files: tuple[InputFile, ...], identities: tuple[FileIdentity, ...]) -> str | None:
    """How the files differ from what `fingerprint` saw, as words after "the input changed: ", or None."""
    before = {identity.path: identity for identity in identities}
    for file in files:
        if str(file) not in before:
            return f"{file} is new"
    for file, now in zip(files, _identities(files), strict=True):
        if now is None:
            return f"{file} is gone"
        was = before.pop(str(file))
        if was.size_bytes != now.size_bytes:
            return f"{file} had {was.size_bytes:,} bytes and has {now.size_bytes:,}"
        if was != now:
            return f"{file} was written again"
    return f"{next(iter(before))} is no longer part of the input" if before else None


def digest(path: InputFile) -> str:
    """BLAKE2b-128 of the file's bytes in hex, in one pass with constant memory; of a remote file its etag, if it has
    one: reading it again would take as long and cost as much as the run's own reading.

    Raises:
        InputError: the file can't be read.
    """
    if isinstance(path, RemoteFile):
        return _remote_digest(path)
    with reading(path), path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _remote_digest(file: RemoteFile) -> str:
    if (identity := _identity(file)) is None:
        raise InputError(f"{file} can't be read: it does not exist")
    if identity.etag:
        return f"etag {identity.etag}"
    hasher = hashlib.blake2b(digest_size=16)
    with file.open() as stream:
        while block := stream.read(COPY_BYTES):
            hasher.update(block)
    return hasher.hexdigest()


def spool(stream: BinaryIO, to: Path) -> None:
    """Copies all of `stream` to `to`, durably, with mode 0600. After a failure `to` is unchanged.

    Raises:
        DiskError: the copy could not be written; nothing of it is left behind.
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
        raise DiskError(f"{to}: can't save standard input: {error.strerror}; free some space there") from error
    finally:
        partial.unlink(missing_ok=True)


def _read(stream: BinaryIO) -> bytes:
    """The next bytes of standard input.

    Raises:
        InputError: standard input can't be read, such as a directory or a terminal that is gone.
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
