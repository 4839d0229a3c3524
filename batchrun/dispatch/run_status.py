"""The status of a run while it works: summary.json from the first second to the last, and run.log."""

import contextlib
import os
import socket
import time
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import msgspec

from batchrun.credentials import Credentials
from batchrun.dispatch.runlog import RunLog
from batchrun.durable import disk_errors, replace_bytes
from batchrun.errors import CheckpointError, DiskError, ExitCode, InputError
from batchrun.limits import overruns
from batchrun.limits.admission import Limit
from batchrun.limits.deadline import Deadline
from batchrun.limits.forecast import Forecast, Recent, Sample
from batchrun.limits.gates import Gates
from batchrun.records import Notice
from batchrun.report.limit_lines import limiting_factor, waiting_to_retry
from batchrun.report.notices import nearly_used, unknown_reason, unpriced_tier, unpriced_usage
from batchrun.report.summary import Moment, read, starting, summarise
from batchrun.run_summary import EndpointTotals, Live, Retrying, Summary, Tuned
from batchrun.startup.resume import Plan
from batchrun.store.checkpoint import Checkpoint
from batchrun.store.rundir import RunDirectory
from batchrun.telemetry.views import Views

if TYPE_CHECKING:
    from batchrun.dispatch.worker import Workers  # with aiohttp, which a start without a request does not need


class Checking(msgspec.Struct, frozen=True):
    """The input is being checked; only the checkpoint is known, once it is open."""

    checkpoint: Checkpoint | None = None


class Running(msgspec.Struct, frozen=True):
    """The plan is made. `workers` is None before rows are sent, and if no row is pending."""

    checkpoint: Checkpoint
    plan: Plan
    workers: "Workers | None" = None
    deadline: Deadline | None = None


class RunStatus:
    """The status of the run for people, programs and the next process. Close it.

    `phase` is how far this start has come, `state` the word for it in summary.json. `forecast` says when the run will
    be complete at the pace of the last minutes. `tuned` is the reply to `batchrun tune` that summaries contain.
    """

    def __init__(
        self,
        job: str,
        directory: RunDirectory,
        credentials: Credentials,
        command: str | None = None,
        tags: Mapping[str, str] | None = None,
        views: Views | None = None,
    ) -> None:
        """Writes the first summary.json, with this process's id and the `command` that resumes the run.

        `views` show every summary that is written.
        """
        self._views = views
        self._tags = dict(tags or {})
        self._job = job
        self._directory = directory
        self._credentials = credentials
        self._command = None if command is None else credentials.clean_text(command)
        self.started_at = datetime.now(UTC)
        self._started_s = time.monotonic()
        self.state = "checking"
        self.phase: Checking | Running = Checking()
        self.forecast: Forecast | None = None
        self.tuned: Tuned | None = None
        self._seen_in_flight = self._seen_answers = 0
        self._seen = Counter[str]()  # how many anomalies of each kind are reported
        self._seen_used: set[tuple[str, str]] = set()
        self._recent = Recent()
        self._earlier: Summary | None = None
        with contextlib.suppress(InputError, CheckpointError):  # none, or not readable
            self._earlier = read(directory)
        self._last_answer_at = None if self._earlier is None else self._earlier.last_answer_at
        with disk_errors(directory.log):
            self.log = RunLog(directory.log)
        self.write(self.summary())

    @property
    def _workers(self) -> "Workers | None":
        return self.phase.workers if isinstance(self.phase, Running) else None

    def reached(self, phase: Checking | Running) -> None:
        """The start has reached this phase."""
        if isinstance(phase, Running) and phase.workers is not None and self._workers is not None:
            phase.workers.resume(self._workers)
        self.phase = phase

    def start_running(self, phase: Running) -> None:
        """The plan is made; the state is "running"."""
        self.phase, self.state = phase, "running"
        plan = phase.plan
        self.log.write("started", invocation=phase.checkpoint.invocation, resumed=plan.resumed, rows=plan.rows)
        self.write(self.summary())

    def start_writing(self) -> None:
        """All rows are settled: the result is being written."""
        self.state = "writing"

    def summary(self, exit_code: int | None = None, reason: str | None = None) -> Summary:
        """The run as it stands now; all its figures are durable."""
        workers, checkpoint = self._workers, self.phase.checkpoint
        moment = Moment(
            state=self.state,
            invocation=checkpoint.invocation if checkpoint is not None else 0,
            started_at=self.started_at,
            now=datetime.now(UTC),
            elapsed_s=time.monotonic() - self._started_s,
            sent=workers.sent if workers is not None else 0,
            limited_by=self._limited_by(),
            pid=os.getpid(),
            host=socket.gethostname(),
            exit_code=exit_code,
            reason=None if reason is None else self._credentials.clean_text(reason),
            complete=self.state == "complete",
            forecast=self.forecast if self.state == "running" else None,
            deadline=self.phase.deadline if isinstance(self.phase, Running) else None,
            now_s=time.monotonic(),
            limits=None if workers is None else workers.gate.in_force,
            tuned=self.tuned,
            unknown_finish_reasons=self._with_earlier("unknown_finish_reasons"),
            unpriced_tiers=self._with_earlier("unpriced_tiers"),
            unpriced_usage=self._with_earlier("unpriced_usage"),
            example_error=self._example_error(),
            command=self._command,
            retrying=self._retrying() if self.state == "running" else None,
            tags=self._tags,
            endpoints=self._endpoints(),
            budgets=[] if workers is None else list(workers.gate.budget.uses()),
            live=self._live() if self.state == "running" else None,
            last_answer_at=self._last_answer_at,
        )
        if not isinstance(self.phase, Running):
            spent = None if checkpoint is None else checkpoint.totals
            return starting(self._job, moment, self._directory, self._earlier, spent)
        plan, spent = self.phase.plan, self.phase.checkpoint.totals
        return summarise(plan.manifest, plan.rows, plan.prices, spent, moment, self._directory)

    def observe(self, now_s: float) -> None:
        """Adds a sample of the progress, and updates the forecast."""
        if not isinstance(self.phase, Running) or self.phase.workers is None:
            return
        totals, workers = self.phase.checkpoint.totals, self.phase.workers
        tokens = sum(line.total_tokens for line in totals.booked.values())
        limit = workers.gate.binding.limit
        self._recent.add(Sample(now_s, totals.settled(), tokens, limit, workers.sent, workers.refused))
        self.forecast = self._recent.forecast(self.phase.plan.rows)
        is_last = workers.backlog.drained
        if (retrying := self._retrying()) is not None and workers.retries.should_log(last=is_last):
            self.log.write("retrying", nothing_else_left=is_last, **msgspec.to_builtins(retrying))

    def log_changes(self) -> list[Notice]:
        """Logs what has changed since the last call; returns the warnings to print."""
        if (workers := self._workers) is None:
            return []
        answers, seen_answers = workers.gate.successes, self._seen_answers
        self._seen_answers = answers  # after a canary it counts from 0 again
        if answers > seen_answers:
            self._last_answer_at = datetime.now(UTC)
        now, before = workers.gate.allowed_in_flight, self._seen_in_flight
        if now != before:
            self._seen_in_flight = now
            self.log.write("in flight", before=before, after=now, why=workers.gate.why_in_flight)
        warnings: list[Notice] = []

        def warn(event: str, words: str, **fields: object) -> None:
            self.log.write(event, **fields)
            warnings.append(Notice(f"warning: {words}", event, **fields))

        anomalies = workers.anomalies
        for reason in self._unseen("finish_reason", anomalies.unknown_finish_reasons):
            warn("unknown finish_reason", unknown_reason(reason), finish_reason=reason)
        for tier in self._unseen("service_tier", anomalies.unpriced_tiers):
            warn("unpriced service_tier", unpriced_tier(tier), service_tier=tier)
        for what in self._unseen("usage", anomalies.unpriced_usage):
            warn("unpriced usage", unpriced_usage(what), what=what)
        for model, overrun in workers.learned.overruns.taken():
            words = overruns.in_words(model, overrun)
            warn("overrun", words, model=model, **msgspec.structs.asdict(overrun))
        used = [use for use in workers.gate.budget.uses() if use.is_nearly_used and use.key not in self._seen_used]
        for use in used:
            self._seen_used.add(use.key)
            warn("budget nearly used", nearly_used(use), **msgspec.structs.asdict(use))
        return warnings

    def _unseen(self, kind: str, values: list[str]) -> list[str]:
        """Those of a growing list that the last call did not return."""
        unseen = values[self._seen[kind] :]
        self._seen[kind] = len(values)
        return unseen

    def write(self, summary: Summary) -> None:
        """Replaces summary.json."""
        try:
            replace_bytes(self._directory.summary, summary.to_json())
        except DiskError as error:  # not raised: a heartbeat must never cost an answer
            self.log.write("summary not written", why=str(error))
        if self._views is not None:
            self._views.show(summary)

    def end(self, state: str, exit_code: ExitCode, reason: str | None) -> Summary:
        """Writes the last summary of this invocation."""
        self.state = state
        summary = self.summary(int(exit_code), reason)
        self.log.write(state, exit_code=int(exit_code), reason=summary.reason)
        self.write(summary)
        return summary

    def close(self) -> None:
        self.log.close()

    def _with_earlier(self, name: str) -> list[str]:
        """This field of the summary: what earlier starts saw and what this one has seen."""
        before = [] if self._earlier is None else getattr(self._earlier, name)
        now = [] if self._workers is None else getattr(self._workers.anomalies, name)
        return list(dict.fromkeys((*before, *now)))

    def _example_error(self) -> str | None:
        """Why a row of this start failed, else one of an earlier start."""
        now = None if self._workers is None else self._workers.anomalies.example_error
        return now if now is not None or self._earlier is None else self._earlier.example_error

    def _endpoints(self) -> list[EndpointTotals]:
        if self._workers is None or not isinstance(self._workers.gate, Gates):
            return []
        return [
            each
            if each.set_aside is None
            else msgspec.structs.replace(each, set_aside=self._credentials.clean_text(each.set_aside))
            for each in self._workers.gate.totals
        ]

    def _live(self) -> Live | None:
        """How requests are sent now; None while none are."""
        if (workers := self._workers) is None:
            return None
        forecast = self.forecast
        return Live(
            in_flight=workers.gate.in_flight,
            allowed_in_flight=workers.gate.allowed_in_flight,
            requests_per_second=0.0 if forecast is None else round(forecast.requests_per_s, 3),
            refused=workers.refused,
            refused_share=None if forecast is None else forecast.refused_share,
            circuit=type(workers.gate.phase).__name__.lower(),
        )

    def _retrying(self) -> Retrying | None:
        return None if self._workers is None else self._workers.retries.summary(datetime.now(UTC))

    def _limited_by(self) -> str:
        workers = self._workers
        if workers is None or self.state != "running":
            return "checking the input" if self.state == "checking" else self.state
        gate = workers.gate
        if not workers.backlog.has_room():
            return "the reader of completions"
        if gate.binding.limit is Limit.LATENCY and not gate.in_flight and (retrying := self._retrying()):
            return waiting_to_retry(retrying)
        # the gate's clock is the event loop's: time.monotonic()
        factor = limiting_factor(gate.binding, time.time() - time.monotonic())
        quiet = gate.refusals is None or gate.binding.limit is Limit.COOLING
        return factor if quiet else f"{factor}; {gate.refusals}"
