"""Rows that came by standard input or from a program: kept in the run directory, where a resume reads them again."""

import hashlib
import tempfile
from pathlib import Path
from typing import BinaryIO

from batchrun.durable import READ_BYTES, disk_errors, fsync
from batchrun.source import digest, spool
from batchrun.store.manifest import Manifest
from batchrun.store.rundir import RunDirectory

NOTHING = hashlib.blake2b(digest_size=16).hexdigest()
"""The digest of an empty input."""


def take(stream: BinaryIO, directory: RunDirectory, *, begun: bool) -> Path:
    """The file that holds the rows of this start; the run's own where the stream has the same rows, or none.

    A start that has not begun takes what it is given, and what an earlier one left only if that is nothing. Other rows
    than a run began with lie beside its own until they are accepted.
    """
    if begun and directory.spool.exists():
        return _take_beside(stream, directory)
    spool(stream, directory.given)
    if directory.given.stat().st_size or not directory.spool.exists():
        directory.given.replace(directory.spool)
    else:
        directory.given.unlink()
    return directory.spool


def _take_beside(stream: BinaryIO, directory: RunDirectory) -> Path:
    found = hashlib.blake2b(digest_size=16)
    with tempfile.TemporaryFile(dir=directory.path) as copy:  # it has no name: a finished run is left as it is
        while block := stream.read(READ_BYTES):
            found.update(block)
            copy.write(block)
        if found.hexdigest() == NOTHING:  # read before by this start, or not given
            return directory.given if directory.given.exists() else directory.spool
        if found.hexdigest() == digest(directory.spool):
            return directory.spool
        copy.seek(0)
        spool(copy, directory.given)
    return directory.given


def put_in_place(files: tuple[Path, ...], directory: RunDirectory) -> tuple[Path, ...]:
    """Other rows than the run's own lie where those do, and those beside them until `settle`; the files now."""
    if files != (directory.given,):
        return files
    with disk_errors(directory.path):
        directory.spool.replace(directory.spool_before)
        directory.given.replace(directory.spool)
        fsync(directory.path)
    return (directory.spool,)


def settle(directory: RunDirectory, known: Manifest) -> None:
    """The rows that the run knows lie in their place: those before are put back unless the others were accepted."""
    if directory.spool_before.exists():
        with disk_errors(directory.path):
            if digest(directory.spool_before) in known.digests:
                directory.spool_before.replace(directory.spool)
            else:
                directory.spool_before.unlink()
