"""Copies rows from standard input or a program into the run directory, where a resume reads them again."""

import hashlib
from pathlib import Path
from typing import BinaryIO

from batchrun.durable import READ_BYTES, disk_errors, fsync, replacing, unnamed_file
from batchrun.errors import InputError
from batchrun.source import InputFile, digest
from batchrun.store.manifest import Manifest
from batchrun.store.rundir import RunDirectory

NOTHING = hashlib.blake2b(digest_size=16).hexdigest()
"""The digest of an empty input."""


def save(stream: BinaryIO, directory: RunDirectory, *, started: bool) -> Path:
    """The file with the rows of this start. It is the run's own copy if the stream has the same rows, or no row.

    A new run takes the rows that it is given, and the copy of an earlier start only if it is given none. Rows that
    differ from those of a started run stay beside its own copy until they are accepted.
    """
    if started and directory.spool.exists():
        return _save_beside(stream, directory)
    spool(stream, directory.given)
    if directory.given.stat().st_size or not directory.spool.exists():
        directory.given.replace(directory.spool)
    else:
        directory.given.unlink()
    return directory.spool


def _save_beside(stream: BinaryIO, directory: RunDirectory) -> Path:
    found = hashlib.blake2b(digest_size=16)
    with unnamed_file(directory.path) as copy:  # without a name, so that a finished run stays as it is
        while block := _read(stream):
            found.update(block)
            copy.write(block)
        if found.hexdigest() == NOTHING:  # already read by this start, or not given
            return directory.given if directory.given.exists() else directory.spool
        if found.hexdigest() == digest(directory.spool):
            return directory.spool
        copy.seek(0)
        spool(copy, directory.given)
    return directory.given


def put_in_place(files: tuple[InputFile, ...], directory: RunDirectory) -> tuple[InputFile, ...]:
    """Puts other rows in the place of the run's own, which stay beside them until `restore_unless_accepted`; returns
    the files.
    """
    if files != (directory.given,):
        return files
    with disk_errors(directory.path):
        directory.spool.replace(directory.spool_before)
        directory.given.replace(directory.spool)
        fsync(directory.path)
    return (directory.spool,)


def restore_unless_accepted(directory: RunDirectory, known: Manifest) -> None:
    """Restores the rows that the run knows, unless the others were accepted."""
    if directory.spool_before.exists():
        with disk_errors(directory.path):
            if digest(directory.spool_before) in known.digests:
                directory.spool_before.replace(directory.spool)
            else:
                directory.spool_before.unlink()


def spool(stream: BinaryIO, to: Path) -> None:
    """Copies all of `stream` to `to`, durably, with mode 0600. After a failure `to` is unchanged.

    Raises:
        DiskError: the copy could not be written; nothing of it is left behind.
    """
    with replacing(to) as temporary:
        temporary.touch(mode=0o600)
        with temporary.open("wb") as file:
            while block := _read(stream):
                file.write(block)


def _read(stream: BinaryIO) -> bytes:
    """The next bytes of standard input.

    Raises:
        InputError: standard input can't be read, such as a directory or a terminal that is gone.
    """
    try:
        return stream.read(READ_BYTES)
    except OSError as error:
        raise InputError(f"standard input can't be read: {error.strerror}; name a file with -i") from error
