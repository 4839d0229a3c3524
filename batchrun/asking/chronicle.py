"""What is told of a run while it works: lines in run.log, and summary.json from the first second to the last."""

import os
import socket
import time
from collections.abc import Mapping
from datetime import UTC, datetime

import msgspec

from batchrun.asking.pipeline import Pipeline
from batchrun.asking.runlog import RunLog
from batchrun.checkpoint.checkpoint import Checkpoint
from batchrun.credentials import Credentials
from batchrun.durable import replace_bytes, told
from batchrun.errors import CheckpointError, DiskError, ExitCode, InputError
from batchrun.gate.admission import Limit
from batchrun.gate.deadline import Deadline
from batchrun.gate.forecast import Forecast, Recent, Sample
from batchrun.gate.gate import Gate
from batchrun.plan.plan import Plan
from batchrun.records import Retrying, Summary, Tuned
from batchrun.report.summary import Moment, limiting_factor, read, starting, summarise, waiting_to_retry
from batchrun.rundir import RunDirectory


class Chronicle:
    """Knows as much of the run as there is yet: the stages are attached as they come to be. Close it."""

    def __init__(
        self,
        job: str,
        directory: RunDirectory,
        credentials: Credentials,
        command: str | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """summary.json names this process from now on, and the `command` that resumes the run."""
        self._tags = dict(tags or {})
        self._job = job
        self._directory = directory
        self._credentials = credentials
        self._command = None if command is None else credentials.clean_text(command)
        self.started_at = datetime.now(UTC)
        self._started_s = time.monotonic()
        self.state = "checking"
        self.plan: Plan | None = None
        self.checkpoint: Checkpoint | None = None
        self.gate: Gate | None = None
        self.pipeline: Pipeline | None = None
        self.deadline: Deadline | None = None
        self.forecast: Forecast | None = None
        self.tuned: Tuned | None = None
        self._recent = Recent()
        self._earlier = _left_by_the_last_start(directory)
        with told(directory.log):
            self.log = RunLog(directory.log)
        self.write(self.summary())

    def summary(self, exit_code: int | None = None, reason: str | None = None) -> Summary:
        """The run as it stands now; all its figures are durable."""
        moment = Moment(
            state=self.state,
            invocation=self.checkpoint.invocation if self.checkpoint is not None else 0,
            started_at=self.started_at,
            now=datetime.now(UTC),
            elapsed_s=time.monotonic() - self._started_s,
            sent=self.pipeline.sent if self.pipeline is not None else 0,
            limited_by=self._limited_by(),
            pid=os.getpid(),
            host=socket.gethostname(),
            exit_code=exit_code,
            reason=None if reason is None else self._credentials.clean_text(reason),
            complete=self.state == "complete",
            forecast=self.forecast if self.state == "running" else None,
            deadline=self.deadline,
            now_s=time.monotonic(),
            limits=None if self.gate is None else self.gate.in_force,
            tuned=self.tuned,
            unknown_finish_reasons=self._unknown_finish_reasons(),
            example_error=self._example_error(),
            command=self._command,
            retrying=self._retrying() if self.state == "running" else None,
            tags=self._tags,
        )
        if self.plan is None or self.checkpoint is None:
            spent = None if self.checkpoint is None else self.checkpoint.spent
            return starting(self._job, moment, self._directory, self._earlier, spent)
        return summarise(
            self.plan.facts, self.plan.rows, self.plan.prices, self.checkpoint.spent, moment, self._directory
        )

    def observe(self, now_s: float) -> None:
        """One more moment is known, and so what will come."""
        if self.plan is None or self.checkpoint is None or self.gate is None:
            return
        spent = self.checkpoint.spent
        tokens = sum(line.total_tokens for line in spent.totals.values())
        self._recent.add(Sample(now_s, spent.settled(), tokens, self.gate.binding.limit))
        self.forecast = self._recent.forecast(self.plan.rows)
        self._log_retries()

    def write(self, summary: Summary) -> None:
        """summary.json holds the summary, if the disk takes it: a heartbeat must never cost an answer."""
        try:
            replace_bytes(self._directory.summary, msgspec.json.format(msgspec.json.encode(summary), indent=2))
        except DiskError as error:
            self.log.write("summary not written", why=str(error))

    def end(self, state: str, exit_code: ExitCode, reason: str | None) -> Summary:
        """The last summary of this invocation is written."""
        self.state = state
        summary = self.summary(int(exit_code), reason)
        self.log.write(state, exit_code=int(exit_code), reason=summary.reason)
        self.write(summary)
        return summary

    def close(self) -> None:
        self.log.close()

    def _unknown_finish_reasons(self) -> tuple[str, ...]:
        """Those of this start and of the ones before."""
        before = [] if self._earlier is None else self._earlier.unknown_finish_reasons
        now = [] if self.pipeline is None else self.pipeline.signs.finish_reasons
        return tuple(dict.fromkeys((*before, *now)))

    def _example_error(self) -> str | None:
        """Why the first row of this start failed; of an earlier start where none did."""
        now = None if self.pipeline is None else self.pipeline.signs.example_error
        return now if now is not None or self._earlier is None else self._earlier.example_error

    def _retrying(self) -> Retrying | None:
        if self.pipeline is None:
            return None
        return self.pipeline.retries.stand(datetime.now(UTC))

    def _log_retries(self) -> None:
        """run.log has heard which rows are retried, and for what."""
        pipeline, retrying = self.pipeline, self._retrying()
        if pipeline is None or retrying is None:
            return
        last = pipeline.backlog.drained
        if pipeline.retries.is_due(last=last):
            self.log.write("retrying", nothing_else_left=last, **msgspec.to_builtins(retrying))

    def _limited_by(self) -> str:
        if self.gate is None or self.state != "running":
            return "checking the input" if self.state == "checking" else self.state
        if self.pipeline is not None and not self.pipeline.backlog.has_room:
            return "the reader of completions"
        if self.gate.binding.limit is Limit.LATENCY and not self.gate.in_flight and (retrying := self._retrying()):
            return waiting_to_retry(retrying)
        # the gate's clock is the event loop's, which is time.monotonic()
        factor = limiting_factor(self.gate.binding, time.time() - time.monotonic())
        quiet = self.gate.refusals is None or self.gate.binding.limit is Limit.COOLING
        return factor if quiet else f"{factor}; {self.gate.refusals}"


def _left_by_the_last_start(directory: RunDirectory) -> Summary | None:
    """The run's summary until now; None where there is none that can be read."""
    try:
        return read(directory)
    except (InputError, CheckpointError):
        return None
