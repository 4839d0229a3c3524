"""Reads the checkpoint of a run that no process works on, without touching the run directory.

A private copy is opened: SQLite would write the log of a killed process back into the database even for a reader. The
database holds open chunks only, so it is small.
"""

import contextlib
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from batchrun import __version__
from batchrun.durable import disk_errors
from batchrun.errors import CheckpointError, DiskError
from batchrun.store import in_flight
from batchrun.store.checkpoint import Checkpoint
from batchrun.store.commits import SPILL
from batchrun.store.manifest import Manifest


def wal_of(path: Path) -> Path:
    """The path of the database's write-ahead log."""
    return path.with_name(path.name + "-wal")


@contextlib.contextmanager
def private_copy(path: Path) -> Iterator[Path]:
    """A copy of the database with its log and its spill file; errors raised inside name `path`, not the copy.

    Raises:
        CheckpointError: missing or empty.
        DiskError: it can't be copied.
    """
    with contextlib.ExitStack() as stack:
        with disk_errors(path):
            if not path.exists() or not path.stat().st_size:
                raise CheckpointError(f"{path}: missing or empty")
            scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="batchrun-"))
            copy = Path(scratch) / path.name
            for original in (path, wal_of(path), path.with_name(SPILL)):
                if original.exists():
                    shutil.copyfile(original, copy.with_name(original.name))
        try:
            yield copy
        except DiskError:
            raise
        except CheckpointError as error:
            raise CheckpointError(str(error).replace(str(copy), str(path))) from error


@contextlib.contextmanager
def opened(path: Path, inflight: Path, *, quick: bool = False) -> Iterator[Checkpoint]:
    """The checkpoint as the next start would find it, with spilled answers and the requests lost in a crash.

    With `quick` only the records that are read are checked.

    Raises:
        CheckpointError: missing, empty, damaged, or of another version.
        DiskError: it can't be copied.
    """
    with private_copy(path) as copy:
        checkpoint = Checkpoint(copy, free_reserve=lambda: False, quick=quick)
        try:
            checkpoint.start_invocation(time.time(), os.getpid(), socket.gethostname(), __version__)
            record_lost(inflight, checkpoint)
            yield checkpoint
        finally:
            checkpoint.close()


def record_lost(inflight: Path, checkpoint: Checkpoint) -> int:
    """Lists the attempts in flight when an earlier process died as possibly billed; returns their number."""
    lost = [
        entry
        for entry in in_flight.read(inflight)
        if entry is in_flight.UNREADABLE or not checkpoint.has_end(entry.row, entry.n)
    ]
    has_ids = any(entry.has_id for entry in lost)
    prefix = Manifest.decode(checkpoint.manifest_entries()).attempt_prefix if has_ids else ""
    checkpoint.add_possibly_billed(in_flight.possibly_billed(lost, checkpoint.invocation - 1, "crash", prefix))
    return len(lost)
