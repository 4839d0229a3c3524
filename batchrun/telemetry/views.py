"""Shows each summary of a run to the monitoring systems that the job names. None of them can fail or stop the run."""

import os
import socket
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from batchrun.errors import CheckpointError, ExitCode, InputError
from batchrun.job.job import Job
from batchrun.records import Summary
from batchrun.report.summary import Moment, read, starting
from batchrun.store.rundir import RunDirectory
from batchrun.telemetry.metrics import Snapshot
from batchrun.telemetry.textfile import TextFile


class Views:
    """What is shown of one start of a run. Call `end` at its end."""

    def __init__(self, job: Job, directory: RunDirectory, note: Callable[[str], None]) -> None:
        self._job = job.name
        self._directory = directory
        self._started_at = datetime.now(UTC)
        self._ended = False
        folder = job.telemetry.prometheus_dir
        self._file = None if folder is None else TextFile(Path(folder), job.name, note)

    def show(self, summary: Summary) -> None:
        """The views show this summary from now on. In any thread, but in one at a time."""
        self._ended = summary.exit_code is not None
        if self._file is not None:
            self._file.show(Snapshot(summary, str(self._directory.path.absolute())))

    def end(self, exit_code: int, reason: str | None, summary: Summary | None) -> None:
        """The start has ended, with this summary if the run has one."""
        if self._file is None:
            return
        if summary is not None:
            self.show(summary)
        elif not self._ended and exit_code != ExitCode.LOCKED:  # another process works on the run, and shows it
            self.show(self._failed(exit_code, reason))
        self._file.close()

    def _failed(self, exit_code: int, reason: str | None) -> Summary:
        """The summary of a start that ended before it wrote one: the figures of the run are those before it."""
        try:
            earlier = read(self._directory)
        except (InputError, CheckpointError):
            earlier = None
        now = datetime.now(UTC)
        moment = Moment(
            state="failed",
            invocation=0,
            started_at=self._started_at,
            now=now,
            elapsed_s=(now - self._started_at).total_seconds(),
            sent=0,
            limited_by="failed",
            pid=os.getpid(),
            host=socket.gethostname(),
            exit_code=int(exit_code),
            reason=reason,
            last_answer_at=None if earlier is None else earlier.last_answer_at,
        )
        return msgspec.structs.replace(starting(self._job, moment, self._directory, earlier, None), job=self._job)
