"""Keeps what a run has paid for in the object store while it works, so that another machine can resume it.

With `output.keep_parts_remote` a folder of the run holds the sealed parts, the stored input of open chunks, and copies
of the checkpoint, whose totals are the bill. Every name has the digest of its content, so no object ever changes:

    000012.g1.DIGEST.part        a sealed part
    000013.0.DIGEST.input        the input of an open chunk: put before any of its rows is sent
    000000042.DIGEST.db          the checkpoint after the 42nd of these steps; the highest counts
    owner.json                   the writer that works on the run

If the machine is lost at any time, the highest checkpoint and the objects it names are there, and the inputs show which
rows may have been sent since.
"""

import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from batchrun.durable import digest
from batchrun.errors import StorageError
from batchrun.storage.claim import Claim, Writer
from batchrun.storage.folder import RemoteFolder
from batchrun.storage.publish import RUNS
from batchrun.store.checkpoint import Checkpoint, read_copy
from batchrun.store.db_tables import Chunk
from batchrun.store.manifest import Manifest
from batchrun.store.rundir import RunDirectory

OWNER = "owner.json"
PART = re.compile(r"(\d+)\.g(\d+)\.([0-9a-f]+)\.part")
INPUT = re.compile(r"(\d+)\.(\d+)\.([0-9a-f]+)\.input")
COPY = re.compile(r"(\d+)\.([0-9a-f]+)\.db")

TRIES = 20  # copies of the checkpoint, when a chunk is sealed during each; any small number does
PATIENCE_S = (2.0, 5.0, 10.0, 20.0, 40.0)
"""Waits between attempts to store something, each of which the store's own retries precede."""


class Replica:
    """A `Mirror` of one run in the store."""

    def __init__(
        self,
        place: RemoteFolder,
        mine: Writer,
        claim: Claim,
        note: Callable[[str], None],
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._place = place
        self._mine = mine
        self._claim = claim
        self._note = note
        self._sleep = sleep
        self._folder: RemoteFolder | None = None
        self._there: set[str] = set()
        self._lock = threading.Lock()  # of the thread that opens chunks and the one that seals them

    def opened(self, chunk: Chunk, directory: RunDirectory, checkpoint: Checkpoint) -> None:
        """See `Mirror`. The first call also stores what earlier starts did not."""
        self._with_retries(lambda: self._opened(chunk, directory, checkpoint))

    def sealed(self, chunk: Chunk, directory: RunDirectory, checkpoint: Checkpoint) -> None:
        """See `Mirror`.

        Raises:
            RunLockedError: another machine has taken over the run.
        """
        self._claim.require_held()
        self._with_retries(lambda: self._store_all(directory, checkpoint))

    def _with_retries(self, work: Callable[[], None]) -> None:
        for wait_s in (*PATIENCE_S, None):
            try:
                with self._lock:
                    work()
                return
            except StorageError as error:
                if wait_s is None:
                    raise
                self._note(f"warning: {error}; trying again in {wait_s:g} s")
                self._sleep(wait_s)

    def _opened(self, chunk: Chunk, directory: RunDirectory, checkpoint: Checkpoint) -> None:
        if self._folder is None:
            self._store_all(directory, checkpoint)
            return
        layout = Manifest.decode(checkpoint.manifest_entries()).layout
        self._put_missing(_files_of(chunk, directory, layout))

    def _store_all(self, directory: RunDirectory, checkpoint: Checkpoint) -> None:
        """A copy of the checkpoint is in the store, everything that it names before it, and nothing else."""
        copy = directory.path / "checkpoint.copy.tmp"
        try:
            for left in range(TRIES, -1, -1):
                copy.unlink(missing_ok=True)
                checkpoint.copy_to(copy)
                entries, chunks = read_copy(copy)
                manifest = Manifest.decode(entries)
                if self._folder is None:  # the run's folder in the store is this writer's from now on
                    folder = self._place.below(f"{RUNS}/{manifest.run_id}")
                    self._there = {each.name for each in folder.objects()}
                    folder.put(OWNER, msgspec.json.encode(self._mine))
                    self._folder = folder
                folder = self._folder
                wanted: dict[str, Path] = {}
                for chunk in chunks:
                    wanted |= _files_of(chunk, directory, manifest.layout)
                try:
                    self._put_missing(wanted)  # before the checkpoint that names them
                except FileNotFoundError:
                    if not left:
                        raise
                    continue  # a chunk was sealed meanwhile, and its input deleted
                number = max((int(match[1]) for each in self._there if (match := COPY.fullmatch(each))), default=0) + 1
                name = f"{number:09d}.{digest(copy)}.db"
                folder.put_file(name, copy)
                break
        finally:
            copy.unlink(missing_ok=True)
        for old in self._there - wanted.keys() - {OWNER}:  # after the checkpoint that no longer names them
            folder.delete(old)
        self._there = {*wanted, OWNER, name}

    def _put_missing(self, wanted: dict[str, Path]) -> None:
        assert self._folder is not None
        for name, local in wanted.items():
            if name not in self._there:
                self._folder.put_file(name, local)
                self._there.add(name)


def kept_parts(place: RemoteFolder, run_id: str) -> dict[str, str]:
    """The parts of the run's replica, by digest, with their names in `place`."""
    prefix = f"{RUNS}/{run_id}"
    found = {each.name: PART.fullmatch(each.name) for each in place.below(prefix).objects()}
    return {match[3]: f"{prefix}/{name}" for name, match in found.items() if match}


def _files_of(chunk: Chunk, directory: RunDirectory, layout: int) -> dict[str, Path]:
    """The files of a chunk by their names in the store."""
    files: dict[str, Path] = {}
    if chunk.generation:
        name = f"{chunk.chunk:06d}.g{chunk.generation}.{chunk.part_digest}.part"
        files[name] = directory.part_of(chunk.chunk, chunk.generation)
    if chunk.open:
        files[f"{chunk.chunk:06d}.{layout}.{chunk.input_digest}.input"] = directory.input_of(chunk.chunk, layout)
    return files
