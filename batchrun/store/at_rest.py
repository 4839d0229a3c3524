"""The checkpoint of a run that no process works on, read without touching the run directory.

A process that was killed leaves a write-ahead log, and SQLite writes it back into the database even for a reader. So a
private copy is opened instead, in a temporary directory. The database holds open chunks only and stays small.
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
from batchrun.store import in_flight, manifest
from batchrun.store.checkpoint import SPILL, Checkpoint


def log_of(path: Path) -> Path:
    """Where SQLite keeps the write-ahead log."""
    return path.with_name(path.name + "-wal")


@contextlib.contextmanager
def private_copy(path: Path) -> Iterator[Path]:
    """A copy of the database at `path` with its log and what was spilled; errors inside name `path`, not the copy.

    Raises:
        CheckpointError: gone or empty.
        DiskError: it can't be copied.
    """
    with contextlib.ExitStack() as stack:
        with disk_errors(path):
            if not path.exists() or not path.stat().st_size:
                raise CheckpointError(f"{path}: gone or empty")
            scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="batchrun-"))
            copy = Path(scratch) / path.name
            for original in (path, log_of(path), path.with_name(SPILL)):
                if original.exists():
                    shutil.copyfile(original, copy.with_name(original.name))
        try:
            yield copy
        except DiskError:
            raise
        except CheckpointError as error:
            raise CheckpointError(str(error).replace(str(copy), str(path))) from error


@contextlib.contextmanager
def opened(path: Path, inflight: Path, *, glance: bool = False) -> Iterator[Checkpoint]:
    """The checkpoint as the next start would find it: spilled answers are in it, requests in flight at a crash named.

    With `glance` only records that are read are checked, so that it takes no longer than the copy.

    Raises:
        CheckpointError: gone, empty, damaged, or of another version.
        DiskError: it can't be copied.
    """
    with private_copy(path) as copy:
        checkpoint = Checkpoint(copy, free_reserve=lambda: False, glance=glance)
        try:
            checkpoint.begin_invocation(time.time(), os.getpid(), socket.gethostname(), __version__)
            name_lost(inflight, checkpoint)
            yield checkpoint
        finally:
            checkpoint.close()


def name_lost(inflight: Path, checkpoint: Checkpoint, *, with_ids: bool = False) -> int:
    """Who was in flight when an earlier process died is on the permanent list, unless their end is known; how many.

    `with_ids`: the ids that were sent with these attempts are listed, too.
    """
    lost = [
        entry
        for entry in in_flight.read(inflight)
        if entry is in_flight.UNREADABLE or not checkpoint.has_end(entry.row, entry.n)
    ]
    run = manifest.read(checkpoint.manifest()).attempt_prefix if lost and with_ids else None
    checkpoint.name_possibly_billed(in_flight.possibly_billed(lost, checkpoint.invocation - 1, "crash", run))
    return len(lost)
