"""Writes a run's figures for node_exporter's textfile collector, one file for each job."""

import contextlib
import fcntl
import hashlib
import os
import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

import msgspec

from batchrun.durable import TEMP_SUFFIX
from batchrun.records import Notice
from batchrun.telemetry.prometheus import render
from batchrun.telemetry.samples import Snapshot
from batchrun.telemetry.side_thread import SideThread

MODE = 0o644
"""node_exporter runs as another user and must read it; no prompt, answer or key is in it."""

MOST_NAME = 200
"""A longer file name is cut: 255 bytes is what file systems take, and a suffix follows."""

_LAST_SUCCESS = re.compile(r"^batchrun_last_success_timestamp_seconds\{.*\} (\S+)$", re.MULTILINE)


class TextFile:
    """The file of one job. Only one run at a time writes it: two files with the same labels would fail every scrape."""

    def __init__(self, folder: Path, job: str, note: Callable[[str], None]) -> None:
        """`note` gets one line if the file can't be written; the run continues."""
        content = job.encode("utf-8", "replace")
        name = quote(content, safe="")
        if len(name) > MOST_NAME:  # another name for each job, also for those that start alike
            name = f"{name[:MOST_NAME]}-{hashlib.blake2b(content, digest_size=8).hexdigest()}"
        self.path = folder / f"batchrun-{name}.prom"
        self._note: Callable[[str], None] | None = note
        self._lock: int | None = None
        self._last_success_at: datetime | None = None
        self._side_thread = SideThread(lambda: self._warn(f"telemetry.prometheus_dir: {folder} does not answer"))

    def show(self, snapshot: Snapshot) -> None:
        """Replaces the file by one with these figures, at once or as soon as its file system answers."""
        self._side_thread.do(lambda: self._write(snapshot))

    def end(self, snapshot: Snapshot | None) -> None:
        """Writes the last figures (None: the file stays as it is), then lets another run write it."""

        def write() -> None:
            if snapshot is not None:
                self._write(snapshot)
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None

        self._side_thread.do(write, last=True)

    def _write(self, snapshot: Snapshot) -> None:
        try:
            if self._lock is None and not self._take_over():
                self._warn(f"another run of this job writes {self.path}, so this one does not")
                return
            if snapshot.summary.exit_code == 0:
                self._last_success_at = snapshot.summary.updated_at
            self._replace(render(msgspec.structs.replace(snapshot, last_success_at=self._last_success_at)))
        except OSError as error:
            self._warn(f"telemetry.prometheus_dir: {self.path} can't be written: {error.strerror or error}")

    def _take_over(self) -> bool:
        """Locks the file and reads the time of the last success from it; False if another process has locked it."""
        lock = os.open(self.path.with_name(f".{self.path.stem}.lock"), os.O_RDONLY | os.O_CREAT, MODE)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock)
            if isinstance(error, BlockingIOError):
                return False
            raise
        self._lock = lock
        with contextlib.suppress(OSError, ValueError, OverflowError):  # no file, or none of ours
            if (found := _LAST_SUCCESS.search(self.path.read_text("utf-8"))) is not None:
                self._last_success_at = datetime.fromtimestamp(float(found[1]), UTC)
        return True

    def _replace(self, content: bytes) -> None:
        """Not flushed to the disk: after a power failure an older file, or none, will do."""
        temporary = self.path.with_name(self.path.name + TEMP_SUFFIX)  # the collector reads *.prom only
        try:
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, MODE), "wb") as file:
                os.fchmod(file.fileno(), MODE)  # with any umask
                file.write(content)
            temporary.rename(self.path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise

    def _warn(self, line: str) -> None:
        if self._note is not None:
            self._note(Notice(f"warning: {line}", "telemetry", path=self.path))
            self._note = None
