"""Runs the job's `on_end` command at the end of each start.

The command can't change how the start ended: a failure of it is a warning.
"""

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable
from datetime import datetime

import msgspec

from batchrun import signals
from batchrun.dispatch.runlog import RunLog
from batchrun.errors import RunStoppedError
from batchrun.job.job import Job
from batchrun.records import Notice
from batchrun.run_summary import Summary
from batchrun.store.rundir import RunDirectory

TERM_S = 2.0
"""From SIGTERM to SIGKILL, for a command that takes too long."""


class End(msgspec.Struct, frozen=True):
    """How a start ended: its exit code, the reason in one line, and the summary if the run has one."""

    exit_code: int
    reason: str | None
    summary: Summary | None = None


class Brief(msgspec.Struct, frozen=True):
    """Replaces summary.json if the start ended before it wrote one. The fields have the same names and meanings."""

    job: str
    state: str
    exit_code: int
    reason: str | None
    complete: bool


def run(job: Job, directory: RunDirectory, end: End, began_at: datetime, note: Callable[[str], None]) -> None:
    """Runs the command with the summary on its standard input, and waits for it. Blocks; never raises."""
    if not job.on_end:
        return
    texts = {"BATCHRUN_JOB": job.name, "BATCHRUN_REASON": end.reason or ""}
    texts = {name: text.replace("\0", "").encode("utf-8", "replace").decode() for name, text in texts.items()}
    ours = {"BATCHRUN_EXIT_CODE": str(end.exit_code), "BATCHRUN_OUT": str(directory.path), **texts}
    # the environment holds no key that came from a file
    problem = _run(job, _input(job, directory, end, began_at), {**os.environ, **ours})
    if problem is not None:
        line = f"warning: on_end: {job.on_end[0]} {problem}; the run ended as it would have without it"
        note(Notice(line, "on_end", command=job.on_end[0], problem=problem))
    if directory.path.is_dir():
        with contextlib.suppress(OSError), contextlib.closing(RunLog(directory.log)) as log:
            log.write("on_end", command=job.on_end[0], exit_code=end.exit_code, problem=problem)


def _input(job: Job, directory: RunDirectory, end: End, began_at: datetime) -> bytes:
    """summary.json, if this start wrote it or found the run complete; else the few known fields."""
    with contextlib.suppress(OSError, msgspec.MsgspecError):
        content = directory.summary.read_bytes()
        written = msgspec.json.decode(content, type=Summary)
        ours = written.pid == os.getpid() and written.started_at >= began_at
        if ours or (end.summary is not None and end.summary.complete):
            return content
    return msgspec.json.encode(Brief(job.name, "failed", end.exit_code, end.reason, complete=False))


def _run(job: Job, content: bytes, environment: dict[str, str]) -> str | None:
    """The error, in words that follow the command's name; None if there was none."""
    try:
        process = subprocess.Popen(  # noqa: S603  (the user's own command)
            job.on_end, stdin=subprocess.PIPE, stdout=2, env=environment, start_new_session=True
        )  # its output goes to stderr: the run's results are on stdout
    except (OSError, ValueError) as error:
        return f"can't be started: {error.strerror if isinstance(error, OSError) else error}"
    with process:
        try:
            with signals.raised():
                process.communicate(content, timeout=job.on_end_timeout_s)
        except subprocess.TimeoutExpired:
            _end(process)
            return f"took longer than {job.on_end_timeout_s:g} s (on_end_timeout_s) and was killed"
        except (RunStoppedError, KeyboardInterrupt) as stopped:
            _end(process)
            return f"was killed by a signal ({stopped})"
        code = process.returncode
        return None if code == 0 else f"ended with exit code {code}"


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Kills the command and its children."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(TERM_S)
