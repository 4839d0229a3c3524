"""Detects that an input file has changed: by its size and times without reading it, or by the digest of its bytes."""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast

import msgspec

from batchrun.errors import InputError, writable
from batchrun.source.content import reading
from batchrun.storage.objects import InputFile, RemoteFile

COPY_BYTES = 1 << 20  # any size does that makes few reads and needs little memory


class FileIdentity(msgspec.Struct, frozen=True):
    """Distinguishes a file from its replacement without reading it. `etag` is that of an object store, and then
    replaces the time, too.
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
    return FileIdentity(writable(str(file)), status.st_size, status.st_mtime_ns, status.st_ino)


def changed(files: tuple[InputFile, ...], identities: tuple[FileIdentity, ...]) -> str | None:
    """How the files differ from what `fingerprint` saw, as words after "the input changed: ", or None."""
    before = {identity.path: identity for identity in identities}
    for file in files:
        if writable(str(file)) not in before:
            return f"{file} is new"
    for file, now in zip(files, _identities(files), strict=True):
        if now is None:
            return f"{file} is gone"
        was = before.pop(writable(str(file)))
        if was.size_bytes != now.size_bytes:
            return f"{file} had {was.size_bytes:,} bytes and has {now.size_bytes:,}"
        if was != now:
            return f"{file} was written again"
    return f"{next(iter(before))} is no longer part of the input" if before else None


def digest(path: InputFile) -> str:
    """BLAKE2b-128 of the file's bytes in hex, in one pass with constant memory. A remote file is identified by its
    etag, if it has one: another read would take as long and cost as much as the run's own.

    Raises:
        InputError: the file can't be read.
    """
    hasher = hashlib.blake2b(digest_size=16)
    if not isinstance(path, RemoteFile):
        with reading(path), path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hasher).hexdigest()
    if (identity := _identity(path)) is None:
        raise InputError(f"{path} can't be read: it does not exist")
    if identity.etag:
        return f"etag {identity.etag}"
    with path.open() as stream:
        while block := stream.read(COPY_BYTES):
            hasher.update(block)
    return hasher.hexdigest()
