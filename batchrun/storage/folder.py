"""A folder in an object store that is written to: objects are put whole, listed, copied and deleted."""

import contextlib
import ctypes
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pyarrow as pa
import pyarrow.fs as pafs

from batchrun.errors import StorageError
from batchrun.storage import failures, urls
from batchrun.storage.access import ENVIRONMENT, Access, connect
from batchrun.storage.urls import Url

CONTROL = "_batchrun"
"""The folder for everything that is not the result. Readers of Parquet folders leave out names that start with `_`."""

COPY_BYTES = 4 << 20  # read and written at a time
LARGEST_COPY_BYTES = 5 << 30
"""The most that S3 copies in one request (CopyObject)."""


class RemoteObject(msgspec.Struct, frozen=True):
    """An object below a folder: its name from there, its size, and when the store got it by the store's own clock."""

    name: str
    size_bytes: int
    mtime_ns: int


class RemoteFolder:
    """A folder, which exists as soon as something is in it. Every method may raise a StorageError."""

    def __init__(self, url: Url, access: Access) -> None:
        self.url = url
        self._access = access
        self._filesystem, self._path = connect(url, access)

    def __str__(self) -> str:
        return str(self.url)

    def below(self, name: str) -> "RemoteFolder":
        """The folder of that name within this one."""
        return RemoteFolder(self.url.child(name), self._access)

    def put(self, name: str, content: bytes) -> None:
        """The object has that content: all of it, or the old one if this fails."""
        with failures.writing(self.url.child(name)), self._upload(name) as stream:
            stream.write(content)

    def put_file(self, name: str, local: Path) -> None:
        """The object is a copy of the local file, whose size is checked afterwards: all of it, or the old one.

        Raises:
            FileNotFoundError: there is no such local file.
        """
        with local.open("rb") as source, failures.writing(self.url.child(name)):
            size = 0
            with self._upload(name) as stream:
                while block := source.read(COPY_BYTES):
                    size += stream.write(block)
            found = self._filesystem.get_file_info(self._at(name))
        if found.size != size or size != local.stat().st_size:
            raise StorageError(
                f"{self.url.child(name)}: has {found.size} bytes after {size:,} were sent; run the same command again"
            )

    @contextlib.contextmanager
    def _upload(self, name: str) -> Iterator[pa.NativeFile]:
        """The stream of an upload that ends with the block; after an error or a signal nothing is uploaded."""
        stream = self._filesystem.open_output_stream(self._at(name), compression=None)
        try:
            yield stream
            stream.close()
        except BaseException:
            # Arrow completes the upload when it destroys an open stream, and has no call that gives it up: an object
            # cut in the middle would replace the old one. So this stream is never destroyed.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(stream))
            raise

    def try_out(self) -> None:
        """Puts a small object here, finds, reads and deletes it: all that a publish needs.

        Raises:
            StorageError: the store refuses one of these, or can't be reached.
        """
        name = f"{CONTROL}/trial-{secrets.token_hex(4)}"
        self.put(name, b"trial")
        there = name in {f"{CONTROL}/{each.name}" for each in self.below(CONTROL).objects()}
        if not there or self.read(name) != b"trial":
            raise StorageError(f"{self}: the store does not show what was just put there; name another place")
        self.delete(name)

    def read(self, name: str) -> bytes | None:
        """The content of the object; None if there is none."""
        with failures.writing(self.url.child(name)):
            try:
                with self._filesystem.open_input_file(self._at(name)) as stream:
                    return stream.read()
            except FileNotFoundError:
                return None

    def fetch(self, name: str, local: Path) -> None:
        """The local file is a copy of the object."""
        with (
            failures.writing(self.url.child(name)),
            self._filesystem.open_input_file(self._at(name)) as source,
            open(os.open(local, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as target,
        ):
            while block := source.read(COPY_BYTES):
                target.write(block)

    def find(self, name: str) -> RemoteObject | None:
        """The object; None if there is none."""
        with failures.writing(self.url.child(name)):
            found = self._filesystem.get_file_info(self._at(name))
        return self._object(found) if found.type is pafs.FileType.File else None

    def objects(self) -> list[RemoteObject]:
        """All objects below the folder, sorted by name."""
        selector = pafs.FileSelector(self._path, recursive=True, allow_not_found=True)
        with failures.writing(self.url):
            found = self._filesystem.get_file_info(selector)
        objects = [self._object(each) for each in found if each.type is pafs.FileType.File]
        return sorted(objects, key=lambda each: each.name)

    def folders(self) -> list[str]:
        """The names of the folders in this one."""
        selector = pafs.FileSelector(self._path, allow_not_found=True)
        with failures.writing(self.url):
            found = self._filesystem.get_file_info(selector)
        return [each.base_name for each in found if each.type is pafs.FileType.Directory]

    def copy(self, name: str, to: str) -> None:
        """A copy within the store, at most `LARGEST_COPY_BYTES`."""
        with failures.writing(self.url.child(to)):
            self._filesystem.copy_file(self._at(name), self._at(to))

    def delete(self, name: str) -> None:
        """Deletes the object, if there is one."""
        with failures.writing(self.url.child(name)):
            try:
                self._filesystem.delete_file(self._at(name))
            except FileNotFoundError:
                return

    def _at(self, name: str) -> str:
        return f"{self._path.rstrip('/')}/{name}"

    def _object(self, found: pafs.FileInfo) -> RemoteObject:
        name = found.path.removeprefix(self._path.rstrip("/") + "/")
        return RemoteObject(name, found.size or 0, found.mtime_ns or 0)


def folder_at(text: str, access: Access = ENVIRONMENT, setting: str = "") -> RemoteFolder:
    """The folder that the URL names. `setting` is its place in an error.

    Raises:
        JobError: the URL is invalid, or a package is missing.
    """
    return RemoteFolder(urls.parse(text, setting), access)
