"""Files in an object store: found, read as a stream or by ranges, and distinguished from their replacement."""

import contextlib
import functools
import io
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Protocol, cast

import pyarrow.fs as pafs

from batchrun.storage import failures, urls
from batchrun.storage.access import Access, connect
from batchrun.storage.urls import Url

HEAD_BYTES = 512
READ_AHEAD_BYTES = 8 << 20
"""How much a stream fetches at a time: a request takes tens of milliseconds, whatever it brings."""


class RemoteFile:
    """A file in an object store. `str` gives its URL. Its parts have the names that a `pathlib.Path` gives them."""

    def __init__(self, url: Url, filesystem: pafs.FileSystem, path: str) -> None:
        self.url = url
        self._filesystem = filesystem
        self._path = path
        self._place = PurePosixPath(url.path)

    def __str__(self) -> str:
        return str(self.url)

    def __repr__(self) -> str:
        return f"RemoteFile({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemoteFile) and self.url == other.url

    def __hash__(self) -> int:
        return hash(self.url)

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self._place.name

    @property
    def suffix(self) -> str:
        """The ending of the name, as pathlib has it."""
        return self._place.suffix

    @property
    def suffixes(self) -> list[str]:
        """All endings of the name."""
        return self._place.suffixes

    @property
    def parents(self) -> tuple[PurePosixPath, ...]:
        """The folders that it is in, innermost first."""
        return tuple(self._place.parents)

    @functools.cached_property
    def head(self) -> bytes:
        """Its first bytes, which say what it is; fetched once."""
        with self.open(buffer_bytes=0) as stream:
            return stream.read(HEAD_BYTES)

    @contextlib.contextmanager
    def open(self, buffer_bytes: int = READ_AHEAD_BYTES) -> Iterator[BinaryIO]:
        """Its bytes, from the start; seekable. Errors of the store are raised as batchrun's own."""
        with failures.reading(self):
            raw = self._filesystem.open_input_file(self._path)
        with raw:
            stream = _Reader(cast(BinaryIO, raw), self)
            yield cast(BinaryIO, io.BufferedReader(stream, buffer_bytes) if buffer_bytes else stream)

    def identity(self) -> tuple[int, int, str]:
        """Size in bytes, time of its last change in ns and etag; with an etag the time is 0, without one it is "".

        Raises:
            FileNotFoundError: it is gone.
            InputError, StorageError: it can't be read.
        """
        if isinstance(self._filesystem, pafs.PyFileSystem):
            return self._identity_by_fsspec()
        try:
            with self._filesystem.open_input_file(self._path) as raw:
                size, metadata = raw.size(), raw.metadata()
        except FileNotFoundError:
            raise
        except OSError:
            with failures.reading(self):
                raise
        found = {_text(name).lower(): _text(value) for name, value in (metadata or {}).items()}
        if etag := found.get("etag"):
            return size, 0, etag
        with failures.reading(self):
            return size, self._filesystem.get_file_info(self._path).mtime_ns or 0, ""

    def _identity_by_fsspec(self) -> tuple[int, int, str]:
        with failures.reading(self):
            found = self._filesystem.get_file_info(self._path)
            if found.type is pafs.FileType.NotFound:
                raise FileNotFoundError(str(self))
            handler: Any = cast(pafs.PyFileSystem, self._filesystem).handler  # ours: pyarrow's own for fsspec
            details = handler.fs.info(self._path)
        return found.size or 0, 0, next((str(details[name]) for name in _VERSIONS if details.get(name)), "")


InputFile = Path | RemoteFile
"""A file of the input: on this machine, or in an object store."""


_VERSIONS = ("ETag", "etag", "blob_id", "sha256", "mtime", "LastModified", "last_modified", "updated", "created")
"""What the file systems of fsspec call a file's version, or the time of its last change."""


def _text(value: bytes | str) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


class _Reader(io.RawIOBase):
    """A stream whose errors are batchrun's own: to gzip and to Arrow an OSError is a damaged file."""

    def __init__(self, raw: BinaryIO, file: RemoteFile) -> None:
        super().__init__()
        self._raw = raw
        self._file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def read(self, size: int | None = -1) -> bytes:
        with failures.reading(self._file):
            return self._raw.read(-1 if size is None else size)

    def readinto(self, buffer: "memoryview | bytearray") -> int:  # type: ignore[override]
        with failures.reading(self._file):
            return cast("_Readable", self._raw).readinto(buffer)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._raw.seek(offset, whence)

    def tell(self) -> int:
        return self._raw.tell()


class _Readable(Protocol):
    def readinto(self, buffer: "memoryview | bytearray") -> int: ...


def file_at(text: str, access: Access = Access()) -> RemoteFile:  # noqa: B008  (frozen)
    """The file that the URL names, which need not exist."""
    url = urls.parse(text)
    return RemoteFile(url, *connect(url, access))


def find(text: str, access: Access = Access()) -> list[RemoteFile]:  # noqa: B008  (frozen)
    """What the URL names, unsorted: one object, all those below a folder, or those that fit a pattern.

    Raises:
        InputError, StorageError: the store refuses, or can't be reached.
        JobError: the URL is invalid, or a package is missing.
    """
    url = urls.parse(text)
    filesystem, path = connect(url, access)

    def remote(found: str) -> RemoteFile:
        return RemoteFile(url.at(_as_written(url, path, found)), filesystem, found)

    with failures.reading(text):
        if urls.is_pattern(path):
            folder = urls.fixed_part(path)
            deep = "/" in path[len(folder) + 1 :] or "**" in path
            found = list(_below(filesystem, folder, recursive=deep))
            if path in found:  # a name may hold the characters of a pattern, as on a disk
                return [remote(path)]
            expression = urls.glob_expression(path)
            return [remote(each) for each in found if expression.fullmatch(each)]
        if not path.endswith("/"):  # else it is the folder, where an object has the same name
            info = filesystem.get_file_info(path)
            if info.type is pafs.FileType.File and not (info.size == 0 and _is_folder(filesystem, path)):
                return [remote(info.path)]
        return [remote(each) for each in _below(filesystem, path.rstrip("/"), recursive=True)]


def _as_written(url: Url, path: str, found: str) -> str:
    """What was `found` below `path`, as the URL writes it: with Azure's account, or another server's name."""
    first = url.path.partition("/")[0]
    if url.kind == "abfs" and "@" in first:
        return f"{first}/{found.partition('/')[2]}"
    return url.path.removesuffix(path.lstrip("/")) + found.lstrip("/")


def _below(filesystem: pafs.FileSystem, folder: str, *, recursive: bool) -> Iterator[str]:
    """The files in the folder. An empty object whose name is a folder's, too, only marks that folder."""
    found = filesystem.get_file_info(pafs.FileSelector(folder, recursive=recursive, allow_not_found=True))
    folders = {info.path for info in found if info.type is pafs.FileType.Directory}
    return (
        info.path for info in found if info.type is pafs.FileType.File and not (info.size == 0 and info.path in folders)
    )


def _is_folder(filesystem: pafs.FileSystem, path: str) -> bool:
    return bool(filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True)))
