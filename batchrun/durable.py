"""Writes files completely or not at all, also across power loss: temp name, fsync, rename, fsync of the directory."""

import contextlib
import ctypes
import errno
import hashlib
import os
import resource
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from batchrun.errors import DiskError

TEMP_SUFFIX = ".tmp"
READ_BYTES = 1 << 20  # any block size does that is far above a page and far below memory


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Raises an OSError inside as a DiskError that names `path`, the cause and the next step."""
    try:
        yield
    except OSError as error:
        raise DiskError(f"{path}: {error.strerror or error}; {next_step(error)}") from error


def next_step(error: OSError) -> str:
    """Advice on an error of the disk, or on too many open files."""
    if is_full(error):
        return "make room and run the same command again"
    if error.errno == errno.EMFILE:
        return "raise the limit with ulimit -n and run the same command again"
    if error.errno == errno.EFBIG:
        return FILE_SIZE_STEP
    if error.errno == errno.ENFILE:
        return "the whole machine has too many files open; run the same command again when it has fewer"
    return "repair the disk or choose another directory with -o, then run again"


FILE_SIZE_STEP = "raise the limit on file sizes with ulimit -f and run the same command again"


def is_at_size_limit(*files: Path) -> bool:
    """Whether one of the files is so near the process's limit on file sizes that a write may have failed by it.

    For libraries that hide EFBIG, such as SQLite, whose writes are of 64 KiB at most.
    """
    most = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if most == resource.RLIM_INFINITY:
        return False
    return any(file.stat().st_size + 65_536 >= most for file in files if file.exists())


def is_full(error: OSError) -> bool:
    """Whether the disk has no room, or the user none left on it."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def lacking(error: BaseException) -> str | None:
    """The resource that the machine lacks, with advice; None for errors of other kinds."""
    if isinstance(error, MemoryError):
        return "out of memory; give the process more, and run the same command again"
    if isinstance(error, OSError) and error.errno in _LACKS:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}; {next_step(error)}"
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        return "the system can't start another thread; raise the limit with ulimit -u, and run the same command again"
    return None


_LACKS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.ENFILE, errno.EIO, errno.EROFS})


def unnamed_file(folder: Path, buffer_bytes: int = -1) -> BinaryIO:
    """A file without a name on the disk of `folder`; it is gone when it is closed, or the process has ended.

    Raises:
        DiskError: the disk refuses it.
    """
    with disk_errors(folder):
        return cast(BinaryIO, tempfile.TemporaryFile(dir=folder, buffering=buffer_bytes))


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """The block writes a file of the yielded temp name, which then replaces `path`; on any error the old file stays."""
    temporary = path.with_name(path.name + TEMP_SUFFIX)
    try:
        with disk_errors(path):
            yield temporary
            fsync(temporary)
            temporary.rename(path)
            fsync(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)  # on a full disk the run needs the space
        raise


def replace_folder(new: Path, folder: Path) -> None:
    """`folder` is now what `new` was, in one step: readers see its old content whole, or the new one. `new` then holds
    the old content, or is gone.
    """
    with disk_errors(folder):
        fsync(new)
        if not folder.exists():
            new.rename(folder)
        elif not _exchange(new, folder):
            # Linux can exchange two directories since 3.15, on ext4, xfs, btrfs and tmpfs. Elsewhere the folder is
            # missing for a moment, and never half there.
            exchange_in_steps(new, folder)
        fsync(folder.parent)


def remove_folder(folder: Path) -> None:
    """The folder and all in it are gone."""
    if folder.is_dir():
        with disk_errors(folder):
            shutil.rmtree(folder)


def exchange_in_steps(new: Path, folder: Path) -> None:
    """The two folders are swapped; after a kill one of them may be left beside the other as `.old.tmp`."""
    aside = folder.with_name(folder.name + ".old" + TEMP_SUFFIX)
    remove_folder(aside)
    folder.rename(aside)
    new.rename(folder)
    aside.rename(new)


def _exchange(one: Path, other: Path) -> bool:
    """True if the two paths have changed places; False if the system can't do that."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    error = ctypes.get_errno()
    if error in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(error, os.strerror(error), str(other))


_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # fcntl.h and linux/fs.h; see renameat2(2)


def link(file: Path, to: Path) -> None:
    """`to` is the same file under a second name, or a copy where the file system has no links. Replaces `to`."""
    to.unlink(missing_ok=True)
    try:
        os.link(file, to)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EXDEV, errno.EMLINK):
            raise
        with replacing(to) as temporary:
            temporary.touch(mode=0o600)
            shutil.copyfile(file, temporary)


TRIAL_BYTES = 1 << 20  # an empty file can be made on a disk that is full


def try_out(folder: Path) -> None:
    """Writes a small file in the folder, or where it will be made, and removes it.

    Raises:
        OSError: it could not.
    """
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    with tempfile.NamedTemporaryFile(dir=there, prefix=".batchrun-", suffix=TEMP_SUFFIX) as file:
        file.write(bytes(TRIAL_BYTES))
        file.flush()
        os.fsync(file.fileno())


def replace_bytes(path: Path, content: bytes) -> None:
    """Replaces `path` by `content`, readable by its owner alone."""
    with (
        replacing(path) as temporary,
        open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file,
    ):
        file.write(content)


def fsync(path: Path) -> None:
    """Flushes the file or directory to the disk."""
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
    path.stat()
    with disk_errors(path), open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
