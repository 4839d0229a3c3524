"""Shows each summary of a run to the monitoring systems that the job names. They can't fail or stop the run."""

import os
import socket
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from batchrun.errors import ExitCode, JobError
from batchrun.job.job import Job
from batchrun.records import Notice
from batchrun.report.summary import Moment, read_or_none, starting
from batchrun.run_summary import Shard, Summary
from batchrun.store.rundir import RunDirectory
from batchrun.telemetry.samples import Snapshot
from batchrun.telemetry.textfile import TextFile

if TYPE_CHECKING:
    from batchrun.telemetry.otel import OpenTelemetry


def wants_otel(job: Job) -> bool:
    """Whether the job is shown to OpenTelemetry, which the environment can turn off."""
    return job.telemetry.otel and os.environ.get("OTEL_SDK_DISABLED", "").lower() != "true"


def require_otel(job: Job) -> None:
    """Returns if the job can be shown to OpenTelemetry.

    Raises:
        JobError: a package is missing.
    """
    if not wants_otel(job):
        return
    try:
        from batchrun.telemetry import otel
    except ImportError as error:
        raise JobError(f"telemetry.otel: {error.name} is not installed; pip install 'batchrun[otel]'") from error
    for signal in ("metrics", "traces"):
        otel.exporter(signal)


def _open_telemetry(job: Job, note: Callable[[str], None]) -> "OpenTelemetry | None":
    try:
        from batchrun.telemetry.otel import OpenTelemetry

        return OpenTelemetry(job, note)
    except (ImportError, JobError):
        return None  # `require_otel` reports it
    except Exception as error:  # an exporter whose variables are wrong may raise anything
        line = f"warning: OpenTelemetry can't be set up ({type(error).__name__}); the run continues without"
        note(Notice(line, "telemetry", why=type(error).__name__))
        return None


class Views:
    """The views of one start of a run. Call `end` at its end."""

    def __init__(
        self, job: Job, directory: RunDirectory, note: Callable[[str], None], shard: Shard | None = None
    ) -> None:
        """`note` gets one line for each view that can't be shown, in any thread."""
        self._job = job.name
        self._directory = directory
        self._started_at = datetime.now(UTC)
        self._last: Summary | None = None
        folder = job.telemetry.prometheus_dir
        self._shard = None if shard is None else str(shard)
        name = job.name if shard is None else job.name + shard.suffix
        self._file = None if folder is None else TextFile(Path(folder), name, note)
        self.otel = None if not wants_otel(job) else _open_telemetry(job, note)

    def show(self, summary: Summary) -> None:
        """The views show this summary from now on. In any thread, but in one at a time."""
        self._last = summary
        if summary.complete:  # the result may still go to an object store: `end` says how that ended
            summary = msgspec.structs.replace(summary, state="writing", exit_code=None)
        for view in (self._file, self.otel):
            if view is not None:
                view.show(self._snapshot(summary))

    def end(self, exit_code: int, reason: str | None, summary: Summary | None) -> None:
        """The start has ended, with this summary if the run has one."""
        if self._file is None and self.otel is None:
            return
        snapshot = self._snapshot(summary or self._failed(exit_code, reason))
        is_ours = exit_code != ExitCode.LOCKED  # else another process shows it
        if self._file is not None:
            self._file.end(snapshot if is_ours else None)
        if self.otel is not None:
            self.otel.end(snapshot, with_metrics=is_ours)

    def _snapshot(self, summary: Summary) -> Snapshot:
        return Snapshot(summary, str(self._directory.path.absolute()), shard=self._shard)

    def _failed(self, exit_code: int, reason: str | None) -> Summary:
        """The last summary of a start that failed. If it wrote none, the figures of the run are those before it."""
        if (last := self._last) is not None and last.exit_code is not None:
            state = last.state if last.exit_code == exit_code else "failed"
            return msgspec.structs.replace(last, state=state, exit_code=int(exit_code))
        earlier = read_or_none(self._directory)
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
