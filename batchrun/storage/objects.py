"""Files in an object store: found, read as a stream or by ranges, and distinguished from their replacement."""

import contextlib
import functools
import io
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

import pyarrow.fs as pafs

from batchrun.storage import failures, urls
from batchrun.storage.access import ENVIRONMENT, Access, connect
from batchrun.storage.urls import Url

HEAD_BYTES = 512  # as source.unsupported needs
READ_AHEAD_BYTES = 8 << 20
"""How much a stream fetches at a time: a request of any size takes tens of milliseconds."""


class RemoteFile:
    """A file in an object store. `str` gives its URL. Its parts have the names that a `pathlib.Path` gives them."""

    def __init__(self, url: Url, filesystem: pafs.FileSystem, path: str) -> None:
        self.url = url
        self._filesystem = filesystem
        self._path = path
        self._place = PurePosixPath(url.path)
        self.name, self.suffix, self.suffixes = self._place.name, self._place.suffix, self._place.suffixes

    def __str__(self) -> str:
        return str(self.url)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemoteFile) and self.url == other.url

    def __hash__(self) -> int:
        return hash(self.url)

    @property
    def parents(self) -> tuple[PurePosixPath, ...]:
        """The folders that it is in, innermost first."""
        return tuple(self._place.parents)

    @functools.cached_property
    def head(self) -> bytes:
        """Its first bytes, which show its kind; fetched once."""
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
            with failures.reading(self):
                info = self._filesystem.get_file_info(self._path)
                if info.type is pafs.FileType.NotFound:
                    raise FileNotFoundError(str(self))
                handler: Any = self._filesystem.handler  # ours: pyarrow's own for fsspec
                details = handler.fs.info(self._path)
            return info.size or 0, 0, next((str(details[name]) for name in _VERSIONS if details.get(name)), "")
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


InputFile = Path | RemoteFile
"""A file of the input: on this machine, or in an object store."""


_VERSIONS = ("ETag", "etag", "blob_id", "sha256", "mtime", "LastModified", "last_modified", "updated", "created")
"""Names in fsspec's file systems for a file's version, or the time of its last change."""


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
            return cast(Any, self._raw).readinto(buffer)  # type: ignore[no-any-return]  # typeshed gives BinaryIO none

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._raw.seek(offset, whence)

    def tell(self) -> int:
        return self._raw.tell()


def find_remote(text: str, access: Access = ENVIRONMENT) -> list[RemoteFile]:
    """The objects that the URL names, unsorted: one object, all those below a folder, or those that fit a pattern.

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
            # an empty object may only mark a folder of its name
            is_folder = info.size == 0 and filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True))
            if info.type is pafs.FileType.File and not is_folder:
                return [remote(info.path)]
        return [remote(each) for each in _below(filesystem, path.rstrip("/"), recursive=True)]


def _as_written(url: Url, path: str, found: str) -> str:
    """The object `found` below `path`, as the URL writes it: with Azure's account, or another server's name."""
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
