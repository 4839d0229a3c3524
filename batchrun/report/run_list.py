"""The lines of `batchrun status` for many runs: one each, unfinished ones first."""

import os
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import msgspec

from batchrun.errors import CheckpointError, ExitCode, InputError, writable
from batchrun.report import resume_command
from batchrun.report.cost_lines import cost_in_words, cost_so_far
from batchrun.report.run_state import run_state
from batchrun.report.runs import is_run
from batchrun.report.summary import failures
from batchrun.report.wording import age_in_words, aligned
from batchrun.store.rundir import RunDirectory


class ListedRun(msgspec.Struct, frozen=True):
    """One run. `state` comes from summary.json, or is `died` or `unreadable`. An unreadable run has figures of 0.

    `working`: a process works on it. `next` is the command that finishes it; None if nothing is left to do, or if no
    command line started it. `age_s` counts from `updated_at`.
    """

    path: str
    job: str = ""
    state: str = "unreadable"
    working: bool = False
    complete: bool = False
    rows: int = 0
    done: int = 0
    failed: int = 0
    pending: int = 0
    by_status: dict[str, int] = {}
    cost_usd: Decimal | None = None
    possibly_billed_usd: Decimal = Decimal(0)
    unpriced: int = 0
    created_at: datetime | None = None
    updated_at: datetime | None = None
    age_s: float | None = None
    exit_code: int | None = None
    reason: str | None = None
    next: str | None = None

    @property
    def unfinished(self) -> bool:
        """Rows are pending, and no process works on them."""
        return not self.complete and not self.working


def collect(paths: Sequence[Path], now: datetime) -> list[ListedRun]:
    """Every run that the paths name or hold, once: unfinished ones first, then running ones, each newest first.

    Raises:
        InputError: a path holds no run.
    """
    places: dict[Path, Path] = {}
    for path in paths:
        found = False
        for folder, names, files in os.walk(path):
            if "summary.json" in files and is_run(Path(folder)):
                names.clear()  # no run inside a run
                places.setdefault(Path(folder).resolve(), Path(folder))
                found = True
            names.sort()
        if not found:
            raise InputError(f"{path}: no run here; name a run directory, or a folder of them")
    latest = datetime.max.replace(tzinfo=UTC)
    runs = [_run(place, now) for place in places.values()]
    runs.sort(key=lambda run: (run.created_at or latest, run.path), reverse=True)
    return sorted(runs, key=lambda run: (not run.unfinished, run.complete))


def exit_code(runs: Sequence[ListedRun]) -> ExitCode:
    """The exit code of `--exit-code`."""
    if any(run.state == "unreadable" for run in runs):
        return ExitCode.DAMAGED
    return ExitCode.STOPPED if any(run.unfinished for run in runs) else ExitCode.COMPLETE


def lines(runs: Sequence[ListedRun]) -> Iterator[str]:
    """A table with a line for each run, and a count if there are several."""
    header = ("state", "done", "rows", "failed", "pending", "cost", "age", "run", "next")
    yield from aligned([header, *map(_cells, runs)], left=(0, 7, 8))
    unfinished = sum(run.unfinished for run in runs)
    if len(runs) > 1:
        yield f"{len(runs):,} runs, {unfinished:,} unfinished"


def _cells(run: ListedRun) -> tuple[str, ...]:
    if run.state == "unreadable":
        return (run.state, "", "", "", "", "", "", run.path, run.reason or "")
    cost = cost_in_words(run.cost_usd, run.possibly_billed_usd, ",.4f")
    counts = (f"{number:,}" for number in (run.done, run.rows, run.failed, run.pending))
    age = "" if run.age_s is None else age_in_words(run.age_s)
    return (run.state, *counts, cost, age, run.path, run.next or "")


def _run(path: Path, now: datetime) -> ListedRun:
    try:
        found = run_state(RunDirectory(path))
    except (InputError, CheckpointError) as error:
        return ListedRun(writable(str(path)), reason=str(error))

    summary = found.summary
    return ListedRun(
        path=writable(str(path)),
        job=summary.job,
        state="died" if found.died else summary.state,
        working=found.working,
        complete=summary.complete,
        rows=summary.rows,
        done=summary.done,
        failed=failures(summary),
        pending=summary.pending,
        by_status=summary.by_status,
        cost_usd=cost_so_far(summary),
        possibly_billed_usd=summary.possibly_billed_usd,
        unpriced=summary.unpriced,
        created_at=summary.created_at,
        updated_at=summary.updated_at,
        age_s=round((now - summary.updated_at).total_seconds(), 1),
        exit_code=summary.exit_code,
        reason=found.problem or summary.reason,
        next=None if summary.complete or found.working else resume_command.in_directory(summary.command, path),
    )
