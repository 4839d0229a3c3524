"""Files that are there whole or not at all, also after power loss: temp name, fsync, rename, fsync of the directory."""

import contextlib
import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from batchrun.errors import DiskError

TEMP_SUFFIX = ".tmp"
READ_BYTES = 1 << 20


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """A refusal of the disk inside becomes a DiskError that names `path`, the cause and the next step."""
    try:
        yield
    except OSError as error:
        raise DiskError(f"{path}: {error.strerror or error}; {next_step(error)}") from error


def next_step(error: OSError) -> str:
    """What to do about a refusal of the disk, or of the kernel to open one more file."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "make room and run the same command again"
    if error.errno == errno.EMFILE:
        return "raise the limit with ulimit -n and run the same command again"
    if error.errno == errno.ENFILE:
        return "the whole machine has too many files open; run the same command again when it has fewer"
    return "repair the disk or choose another directory with -o, then run again"


def lacking(error: BaseException) -> str | None:
    """What the machine lacks, and what to do, where that is what the error means; None for any other error."""
    if isinstance(error, MemoryError):
        return "out of memory; give the process more, and run the same command again"
    if isinstance(error, OSError) and error.errno in _LACKS:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}; {next_step(error)}"
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        return "the system starts no more threads; raise the limit with ulimit -u, and run the same command again"
    return None


_LACKS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.EIO, errno.EROFS})


def replace(path: Path, write: Callable[[Path], None]) -> None:
    """`path` holds what `write` wrote to the temp name it is given; on any error the old file stays, and no rest."""
    temporary = path.with_name(path.name + TEMP_SUFFIX)
    try:
        with disk_errors(path):
            write(temporary)
            fsync(temporary)
            temporary.rename(path)
            fsync(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)  # on a full disk it would keep the room that the run needs
        raise


def replace_bytes(path: Path, content: bytes) -> None:
    """`path` holds `content`. The file is private: what it says is data."""

    def write(temporary: Path) -> None:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(content)

    replace(path, write)


def fsync(path: Path) -> None:
    """What was written to the file or directory is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(path: Path) -> str:
    """BLAKE2b-128 of the file's bytes, in hexadecimal.

    Raises:
        FileNotFoundError: it is missing; callers know what that means.
        DiskError: it is there, but can't be read.
    """
    hasher = hashlib.blake2b(digest_size=16)
    path.stat()
    with disk_errors(path), open(path, "rb") as file:
        while block := file.read(READ_BYTES):
            hasher.update(block)
    return hasher.hexdigest()
