"""Runs a job for a program, the command line included: job, rows and options in, a complete run or an error out."""

import asyncio
import contextlib
import functools
import logging
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, Literal, TypedDict, Unpack

import msgspec

from batchrun import engine, on_end, preflight, simulated, streams
from batchrun.destination import place as destination
from batchrun.dispatch.hooks import GRACE_S, Hooks, Host
from batchrun.engine import Runtime
from batchrun.errors import BatchrunError, ExitCode, JobError, RunStoppedError
from batchrun.job.job import Job
from batchrun.job.load import checked, load
from batchrun.limits import deadline as deadlines
from batchrun.on_end import End
from batchrun.records import Notice, Status
from batchrun.row_status import failing
from batchrun.run_summary import Summary
from batchrun.source import Rows, as_file
from batchrun.startup import shard as shards
from batchrun.startup.run_options import RunOptions
from batchrun.store import rundir
from batchrun.store.chunks import Mirror
from batchrun.store.rundir import RunDirectory
from batchrun.telemetry.views import Views

_LOG = logging.getLogger("batchrun")

RETRIED = frozenset(str(status) for status in Status if status is not Status.OK)
"""The statuses whose rows can be retried."""


MOST_DATES = 5
"""Dates of unfinished runs that are named."""


class Options(TypedDict, total=False):
    """Options of one start, all of them optional. docs/library.md says what each does."""

    output: str | Path | None
    state_dir: str | Path | None
    date: str | None
    new: bool
    limit: int | None
    shard: str | None
    deadline: str | None
    accept_changes: bool | Literal["input"]
    accept_canary: bool
    retry_failed: bool | Collection[str]
    skip_invalid: bool
    grace_s: float | None
    environ: Mapping[str, str]
    progress: Callable[[Summary], None]
    note: Callable[[str], None]
    checked: Callable[[int], None]
    command: str | None


class RunIncompleteError(RunStoppedError):
    """The run started and stopped before it was complete: because of its budget, the provider or a signal.

    `summary` has its progress, `exit_code` why it stopped. The same call resumes it.
    """

    def __init__(self, summary: Summary) -> None:
        super().__init__(summary.reason or "stopped before the end", ExitCode(summary.exit_code or 0))
        self.summary = summary


def run(job: Job | str | Path, rows: Rows | None = None, **options: Unpack[Options]) -> Summary:
    """Sends every row and writes the result. The same call again resumes where this one stopped. Blocks.

    `job` is a Job or the path of a job file; `rows` replace `input.path`. Too many failed rows raise nothing: the
    summary has them in `exit_code` and `by_status`.

    In the main thread a first SIGINT, SIGTERM or SIGHUP drains the run, a second one ends it at once; afterwards the
    former handlers are back. In other threads signals are not touched.

    Raises:
        RunIncompleteError: the run stopped before it was complete; the same call resumes it.
        KeyboardInterrupt: the same after SIGINT; its `__cause__` is the RunIncompleteError.
        BatchrunError: the run could not start or continue; what was received is on disk.
        RuntimeError: an event loop runs in this thread, which this call would block.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        pass  # as it should be
    else:
        raise RuntimeError("an event loop runs in this thread; use `async with batchrun.Runner(…)` instead")
    try:
        return run_start(job, rows, options)
    except RunStoppedError as stopped:
        if stopped.exit_code is ExitCode.SIGINT:
            raise KeyboardInterrupt from stopped
        raise


def run_start(job: Job | str | Path, rows: Rows | None, options: Options, host: Host | None = None) -> Summary:
    """One start of the run, in this thread. `host` is the program whose event loop runs in another thread.

    Raises:
        BatchrunError: as `run` does.
    """
    if unknown := sorted(options.keys() - Options.__annotations__.keys()):
        raise TypeError(f"unknown option {unknown[0]}; expected some of {', '.join(Options.__annotations__)}")
    note = options.get("note", _LOG.info)
    text = options.get("deadline")
    deadline = None if text is None else deadlines.parse(text, datetime.now().astimezone(), time.monotonic())
    wanted, shard = shards.divided_job(_job(job, rows, options), options.get("shard"), note)
    wanted, directory, command = _place(wanted, options, note)
    began_at = datetime.now(UTC)
    views = Views(wanted, directory, note, shard)

    def ended(code: int, reason: str | None, summary: Summary | None = None) -> None:
        views.end(code, reason, summary)
        on_end.run(wanted, directory, End(code, reason, summary), began_at, note)

    try:
        environ = options.get("environ", os.environ)
        preflight.require_settings(wanted, directory)
        keys = preflight.key(wanted, environ)
        grace_s, progress = options.get("grace_s"), options.get("progress", lambda summary: None)
        hooks = Hooks(progress, note, host, command, GRACE_S if grace_s is None else grace_s, views)
        with _stream(wanted, rows, directory) as stream, _runtime(wanted, environ, note) as runtime:
            run_options = RunOptions(
                skip_invalid=options.get("skip_invalid", False),
                accept_changes=options.get("accept_changes", False),
                accept_canary=options.get("accept_canary", False),
                limit=options.get("limit"),
                deadline=deadline,
                retry=_retried(wanted, options.get("retry_failed", False)),
                shard=shard,
                stdin=stream,
                problem=options.get("note", _LOG.warning),  # seen also where a program has configured no logging
                note=note,
                checked=_checked(options, host),
            )

            def work(mirror: Mirror | None = None) -> Summary:
                mirrored = msgspec.structs.replace(hooks, mirror=mirror)
                return engine.run(wanted, directory, keys, run_options, mirrored, runtime)

            url = rundir.published_at(wanted.output, directory.path)
            summary = work() if url is None else destination.run(wanted, directory, url, work, note)
    except BaseException as error:
        ended(int(error.exit_code if isinstance(error, BatchrunError) else ExitCode.INTERNAL_ERROR), str(error))
        raise
    ended(summary.exit_code or 0, summary.reason, summary)
    if not summary.complete:
        raise RunIncompleteError(summary)
    return summary


def _checked(options: Options, host: Host | None) -> Callable[[int], None]:
    """The input check calls this from time to time; the host can stop it there."""
    report: Callable[[int], None] = options.get("checked", lambda rows: None)
    if host is None:
        return report

    def checked(rows: int) -> None:
        host.stop.raise_if_made()
        report(rows)

    return checked


def _job(job: Job | str | Path, rows: Rows | None, options: Options) -> Job:
    """The job, checked, with the input and output of this start."""
    job = checked(job) if isinstance(job, Job) else load(Path(job))
    if rows is not None:
        if job.input.path not in (None, "-"):
            raise JobError(f"input.path: the call has rows and the job has {job.input.path}; keep one of them")
        job = msgspec.structs.replace(job, input=msgspec.structs.replace(job.input, path="-"))
    if (output := options.get("output")) is not None:
        job = msgspec.structs.replace(job, output=msgspec.structs.replace(job.output, path=str(output)))
    if (state_dir := options.get("state_dir")) is not None:
        job = msgspec.structs.replace(job, output=msgspec.structs.replace(job.output, state_dir=str(state_dir)))
    return job


def _place(job: Job, options: Options, note: Callable[[str], None]) -> tuple[Job, RunDirectory, str | None]:
    """The job with its input of the run's logical date, the run's directory, and the command line that resumes it."""
    now = datetime.now().astimezone()
    pattern, new = rundir.pattern_of(job.output), options.get("new", False)
    taken, elsewhere = functools.partial(destination.is_taken, job), functools.partial(destination.elsewhere, job)
    date = options.get("date")
    path, earlier = rundir.place(pattern, job.name, date=date, now=now, new=new, taken=taken, elsewhere=elsewhere)
    if earlier is not None:
        line = f"resuming the unfinished run of {earlier} ({path}); --new starts another"
        note(Notice(line, "resuming", date=earlier, directory=path))
    if dates := [left for left, _ in rundir.unfinished(pattern, job.name, path)]:
        more = f" and {len(dates) - MOST_DATES:,} more" if dates[MOST_DATES:] else ""
        named = ", ".join(dates[:MOST_DATES]) + more
        if len(dates) == 1:
            line = f"an earlier run of this job is unfinished: {named}; this command with --date {named} finishes it"
        else:
            finish = f"this command with --date {dates[0]} finishes the first"
            line = f"earlier runs of this job are unfinished: {named}; {finish}"
        note(Notice(line, "unfinished runs", dates=dates))
    logical_date = rundir.logical_date(date or earlier, now)
    dated, command = job.on(logical_date), options.get("command")
    if command is not None and dated is not job:
        command = f"{command} --date {logical_date}"
    if command is not None and (url := rundir.published_at(job.output, path)) is not None:
        command = destination.command(command, job, url)
    return dated, RunDirectory(path), command


@contextlib.contextmanager
def _stream(job: Job, rows: Rows | None, directory: RunDirectory) -> Iterator[BinaryIO | None]:
    """The source for the input "-": the given rows, else standard input."""
    if rows is None:
        yield streams.standard_input() if job.input.path == "-" else None
        return
    directory.create()
    with as_file(rows, directory.path) as stream:
        yield stream


def _retried(job: Job, retry_failed: bool | Collection[str]) -> frozenset[str] | None:
    """The statuses whose rows are retried; None without a retry."""
    if isinstance(retry_failed, bool):
        return frozenset(map(str, failing(job.finish))) if retry_failed else None
    chosen = frozenset(map(str, retry_failed))
    if unknown := sorted(chosen - RETRIED):
        raise JobError(f"--status {unknown[0]}: expected some of truncated, filtered, empty, invalid, error")
    return chosen


@contextlib.contextmanager
def _runtime(job: Job, environ: Mapping[str, str], note: Callable[[str], None]) -> Iterator[Runtime]:
    """The event loop, and the engine that the job wants."""
    with contextlib.ExitStack() as opened:
        open_transports = None
        if job.engine.name == "ray":
            from batchrun.ray_engine import cluster  # only if the job wants it: it loads much

            open_transports = opened.enter_context(cluster.opened(job, environ, note))
        yield Runtime(_new_event_loop, opened.enter_context(simulated.opened(job, open_transports)))


def _new_event_loop() -> asyncio.AbstractEventLoop:
    """uvloop's event loop, if it is installed: half the CPU per request."""
    try:
        from uvloop import new_event_loop
    except ImportError:
        return asyncio.new_event_loop()
    return new_event_loop()
