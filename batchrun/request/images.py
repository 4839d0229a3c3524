"""Reads images from files under `input.image_root`, and never from outside it.

A path is resolved first, so that links within the root may be used, and then walked from the root down with no link
followed: a folder that is swapped for a link in between is refused. What is not a regular file is never opened.
"""

import contextlib
import os
import stat
from pathlib import Path

from batchrun.errors import InputError, JobError
from batchrun.job.settings import Input
from batchrun.request.image_parts import Image, Source, decoded, image_of, path_in, shown, too_large

# O_NOFOLLOW at each step: links were resolved and checked before, so a link found here was put there since
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# O_NONBLOCK: what was a file when it was checked may be a pipe now, whose open would wait for a writer
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


class Images:
    """Reads the images that rows name. Any thread may; it holds nothing open."""

    def __init__(self, settings: Input) -> None:
        """
        Raises:
            JobError: `input.image_root` is not a folder.
        """
        self._max_bytes = settings.max_image_bytes
        self._root = None if settings.image_root is None else Path(os.path.realpath(settings.image_root))
        if self._root is not None and not self._root.is_dir():
            raise JobError(f"input.image_root: {settings.image_root} is not a folder")

    def read(self, source: Source) -> Image:
        """The image as it is now.

        Raises:
            InputError: it can't be read, is too large, or is not an image; the message names it.
        """
        try:
            if isinstance(source, bytes):
                content = source
            elif source.startswith("data:"):
                content = decoded(source, self._max_bytes)
            else:
                content = self._file(path_in(source))
            if len(content) > self._max_bytes:
                raise InputError(too_large(len(content), self._max_bytes))
            return image_of(content)
        except InputError as error:
            raise InputError(f"{shown(source)}: {error}") from error

    def _file(self, path: str) -> bytes:
        """The bytes of a file under the root, one more than allowed at most."""
        if self._root is None:
            raise InputError("is a path; set input.image_root to the folder that images may be read from")
        if ".." in Path(path).parts:
            raise InputError("holds `..`; name the file by its way down from input.image_root")
        try:
            place = os.path.realpath(self._root / path)
            if os.path.commonpath([self._root, place]) != str(self._root):
                raise InputError(f"is outside input.image_root ({self._root})")
            return read_below(self._root, os.path.relpath(place, self._root), self._max_bytes)
        except OSError as error:
            raise InputError(f"can't be read: {error.strerror or error}") from error
        except ValueError as error:  # NUL, or a lone surrogate
            raise InputError("is not a path") from error


def read_below(root: Path, path: str, max_bytes: int) -> bytes:
    """The bytes of the regular file that the path leads to from the root, with no link on the way.

    Raises:
        InputError: it is not a regular file, or too large.
        OSError: there is a link on the way, or none.
    """
    *folders, name = Path(path).parts or (".",)
    with contextlib.ExitStack() as opened:
        folder = _kept(opened, os.open(root, _FOLDER))
        for each in folders:
            folder = _kept(opened, os.open(each, _FOLDER, dir_fd=folder))
        _require_regular(os.stat(name, dir_fd=folder, follow_symlinks=False))  # opening a pipe has effects
        file = _kept(opened, os.open(name, _FILE, dir_fd=folder))
        status = os.fstat(file)
        _require_regular(status)
        if status.st_size > max_bytes:
            raise InputError(too_large(status.st_size, max_bytes))
        with open(file, "rb", closefd=False) as stream:
            return stream.read(max_bytes + 1)


def _kept(opened: contextlib.ExitStack, descriptor: int) -> int:
    opened.callback(os.close, descriptor)
    return descriptor


def _require_regular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise InputError("is not a regular file")
