"""The run directory: its files, and the lock that one process holds. `run_path` says where it is."""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from batchrun import durable
from batchrun.durable import disk_errors
from batchrun.errors import JobError, RunLockedError

NETWORK_FILE_SYSTEMS = frozenset({"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "fuse.sshfs", "ceph", "lustre"})
"""Their locks and fsync are not what SQLite needs (sqlite.org, "How To Corrupt", section 2.1)."""

MOUNTINFO = Path("/proc/self/mountinfo")
"""The mounted file systems (proc_pid_mountinfo(5)); the file exists on Linux only."""

LOCK_RETRY_S = 0.05

RESERVE_BYTES = 16_000_000
"""Freed when the disk is full: space for the answers that are in flight then."""


class RunDirectory:
    """The paths of one run, and its lock."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.completions = path / "completions.parquet"
        self.lines = path / "completions.jsonl"  # format = "jsonl"; with .gz or .zst behind it
        self.completions_folder = path / "completions"  # layout = "parts"
        self.staging = path / "completions.tmp"  # that folder while it is made
        self.partial = path / "completions.partial.parquet"  # of a run that is not complete
        self.usage = path / "usage.parquet"
        self.summary = path / "summary.json"
        self.checkpoint = path / "checkpoint.db"
        self.inflight = path / "inflight.bin"
        self.reserve = path / "reserve.bin"
        self.parts = path / "parts"
        self.rejects = path / "rejects.jsonl"
        self.spool = path / "input.jsonl"
        self.given = path / "input.given.jsonl"  # rows that differ from those, until they are accepted
        self.spool_before = path / "input.before.jsonl"
        self.log = path / "run.log"
        self.control = path / "control.json"
        self.writer = path / "writer"  # our name among the writers of an object store

    def input_of(self, chunk: int, layout: int = 0) -> Path:
        """The stored input of an open chunk; `layout` counts how often a changed input or job was accepted."""
        return self.parts / (f"{chunk:06d}.{layout}.input.arrow" if layout else f"{chunk:06d}.input.arrow")

    def part_of(self, chunk: int, generation: int) -> Path:
        """The part of a sealed chunk."""
        return self.parts / f"{chunk:06d}.g{generation}.parquet"

    def images_of(self, layout: int = 0) -> Path:
        """The digests of the rows' images as the check pass saw them."""
        return self.path / (f"images.{layout}.bin" if layout else "images.bin")

    def origins_of(self, layout: int) -> Path:
        """The file that says which rows take an earlier answer, or that of an equal row."""
        return self.path / (f"origins.{layout}.bin" if layout else "origins.bin")

    def create(self, mountinfo: Path = MOUNTINFO) -> None:
        """Creates the directory, readable by its owner alone, on a local file system.

        Raises:
            JobError: a file is in the way, it can't be written, or it is on a network file system.
        """
        try:
            for directory in (self.path, self.parts):
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise JobError(f"{self.path}: a file is in the way; choose another directory with -o") from error
        except OSError as error:
            raise JobError(
                f"{self.path}: can't make the run directory: {error.strerror}; choose another with -o"
            ) from error
        if not os.access(self.path, os.W_OK | os.X_OK):
            raise JobError(f"{self.path}: can't be written; choose another directory with -o")
        _require_local(self.path, self.path, mountinfo)

    def require_possible(self, mountinfo: Path = MOUNTINFO) -> None:
        """Checks whether `create` would succeed, and creates nothing.

        Raises:
            JobError: as `create`.
        """
        there = self.path.absolute()
        while not os.path.lexists(there):
            there = there.parent
        if not there.is_dir() or (self.parts.exists() and not self.parts.is_dir()):
            raise JobError(f"{self.path}: a file is in the way; choose another directory with -o")
        if not os.access(there, os.W_OK | os.X_OK):
            raise JobError(f"{self.path}: can't be written; choose another directory with -o")
        _require_local(self.path, there, mountinfo)

    def try_out(self) -> None:
        """Writes a small file where the directory is or will be, and removes it.

        Raises:
            DiskError: it could not.
        """
        with disk_errors(self.path):
            durable.try_out(self.path)

    def reserve_room(self) -> None:
        """Allocates the reserve that is freed when the disk is full."""
        with contextlib.suppress(OSError):  # without space even for that, the run works without it
            descriptor = os.open(self.reserve, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                os.posix_fallocate(descriptor, 0, RESERVE_BYTES)
            finally:
                os.close(descriptor)

    def free_room(self) -> bool:
        """Frees the reserve; False if there was none."""
        try:
            self.reserve.unlink()
        except OSError:
            return False
        return True

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Locks the directory for this process until the block ends.

        Raises:
            RunLockedError: another process has locked it; the message names pid, host and since when.
        """
        # flock on the directory itself: the kernel releases it when the process dies, even by kill -9
        with disk_errors(self.path):
            descriptor = os.open(self.path, os.O_RDONLY)
        try:
            with disk_errors(self.path):
                has_lock = _flock(descriptor)
                if not has_lock:
                    time.sleep(LOCK_RETRY_S)  # `batchrun status` holds the lock for microseconds
                    has_lock = _flock(descriptor)
            if not has_lock:
                summary = self.read_summary() or {}
                pid, host, since = summary.get("pid"), summary.get("host"), summary.get("started_at")
                holder = f"pid {pid} on {host}, since {since}" if pid else "it has just started"
                raise RunLockedError(f"{self.path}: another run works here ({holder}); nothing was sent")
            yield
        finally:
            os.close(descriptor)

    def locked(self) -> bool:
        """True while a process holds the lock."""
        try:
            with self.lock():
                return False
        except RunLockedError:
            return True

    def read_summary(self) -> dict[str, object] | None:
        """The content of summary.json; None if it is missing or can't be read."""
        try:
            summary = msgspec.json.decode(self.summary.read_bytes())
        except (OSError, msgspec.DecodeError):
            return None
        return summary if isinstance(summary, dict) else None


def _require_local(path: Path, there: Path, mountinfo: Path) -> None:
    """Returns if `there`, where `path` is or will be, is on a local file system."""
    if (kind := file_system(there, mountinfo)) in NETWORK_FILE_SYSTEMS:
        raise JobError(f"{path}: is on a network file system ({kind}); choose a local directory with -o")


def _flock(descriptor: int) -> bool:
    """Takes the lock, unless another process has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def file_system(path: Path, mountinfo: Path = MOUNTINFO) -> str:
    """The type of the file system of `path`, as the kernel names it; "" if it does not say."""
    try:
        lines = mountinfo.read_text().splitlines()
    except OSError:
        return ""
    device = path.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in lines:
        fields = line.split()
        if fields[2] == wanted:
            return fields[fields.index("-") + 1]
    return ""
