"""Where many runs stand: a line each, those with something left to do first."""

import os
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import msgspec

from batchrun.errors import CheckpointError, ExitCode, InputError
from batchrun.report import again
from batchrun.report.at_rest import Standing, standing
from batchrun.report.summary import age_in_words, failures, known_cost
from batchrun.store.rundir import RunDirectory


class Night(msgspec.Struct, frozen=True):
    """One run. `state` is that of summary.json, or `died`, or `unreadable`; the figures of an unreadable one are 0.

    `working`: a process works on it. `next` is the command that finishes it; None where nothing is left to do, or
    where no command line started it. `age_s` counts from `updated_at`.
    """

    path: str
    job: str
    state: str
    working: bool
    complete: bool
    rows: int
    done: int
    failed: int
    pending: int
    by_status: dict[str, int]
    cost_usd: Decimal | None
    possibly_billed_usd: Decimal
    unpriced: int
    begun_at: datetime | None
    updated_at: datetime | None
    age_s: float | None
    exit_code: int | None
    reason: str | None
    next: str | None

    @property
    def unfinished(self) -> bool:
        """Something is left to do, and no process does it."""
        return not self.complete and not self.working


def collect(paths: Sequence[Path], now: datetime) -> list[Night]:
    """Every run that the paths name or hold, once: unfinished ones first, then those at work, each newest first.

    Raises:
        InputError: a path holds no run.
    """
    places: dict[Path, Path] = {}
    for path in paths:
        found = list(_run_directories(path))
        if not found:
            raise InputError(f"{path}: no run here; name a run directory, or a folder of them")
        for place in found:
            places.setdefault(place.resolve(), place)
    nights = sorted((_night(place, now) for place in places.values()), key=_newness, reverse=True)
    return sorted(nights, key=lambda night: (not night.unfinished, night.complete))


def exit_code(nights: Sequence[Night]) -> ExitCode:
    """What `--exit-code` makes of them."""
    if any(night.state == "unreadable" for night in nights):
        return ExitCode.DAMAGED
    return ExitCode.STOPPED if any(night.unfinished for night in nights) else ExitCode.COMPLETE


def as_json(nights: Sequence[Night]) -> str:
    """A JSON array of an object for each run; amounts are strings, times are UTC."""
    return msgspec.json.format(msgspec.json.encode(nights), indent=2).decode()


def lines(nights: Sequence[Night]) -> Iterator[str]:
    """A table: a line for each run, a sum where they are several."""
    table = [_HEADER, *map(_cells, nights)]
    widths = [max(len(row[column]) for row in table) for column in range(len(_HEADER) - 1)]
    for row in table:
        cells = [
            cell.ljust(width) if column in _LEFT else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=False))
        ]
        yield "  ".join([*cells, row[-1]]).rstrip()
    unfinished = sum(night.unfinished for night in nights)
    if len(nights) > 1:
        yield f"{len(nights):,} runs, {unfinished:,} unfinished"


_HEADER = ("state", "done", "rows", "failed", "pending", "cost", "age", "run", "next")
_LEFT = {0, 7}


def _cells(night: Night) -> tuple[str, ...]:
    cost = "unknown" if night.cost_usd is None else f"${night.cost_usd:,.4f}"
    counts = (f"{number:,}" for number in (night.done, night.rows, night.failed, night.pending))
    age = "" if night.age_s is None else age_in_words(night.age_s)
    if night.state == "unreadable":
        return (night.state, "", "", "", "", "", "", night.path, night.reason or "")
    return (night.state, *counts, cost, age, night.path, night.next or "")


def is_run(path: Path) -> bool:
    """True for a run directory: other programs write a file called summary.json, too."""
    directory = RunDirectory(path)
    return directory.summary.exists() and (
        directory.checkpoint.exists() or "run_id" in (directory.read_summary() or {})
    )


def _run_directories(path: Path) -> Iterator[Path]:
    """The run directories that `path` is or holds, at any depth; what lies in a run directory is none."""
    for folder, names, files in os.walk(path):
        if "summary.json" in files and is_run(Path(folder)):
            names.clear()
            yield Path(folder)
        names.sort()


def _night(path: Path, now: datetime) -> Night:
    try:
        return _told(path, standing(RunDirectory(path)), now)
    except (InputError, CheckpointError) as error:
        return _unreadable(path, str(error))


def _told(path: Path, found: Standing, now: datetime) -> Night:
    summary = found.summary
    return Night(
        path=str(path),
        job=summary.job,
        state="died" if found.died else summary.state,
        working=found.alive,
        complete=summary.complete,
        rows=summary.rows,
        done=summary.rows - summary.pending,
        failed=failures(summary),
        pending=summary.pending,
        by_status=summary.by_status,
        cost_usd=known_cost(summary.cost_usd, summary.unpriced + summary.without_usage),
        possibly_billed_usd=summary.possibly_billed_usd,
        unpriced=summary.unpriced,
        begun_at=summary.begun_at,
        updated_at=summary.updated_at,
        age_s=round((now - summary.updated_at).total_seconds(), 1),
        exit_code=summary.exit_code,
        reason=found.problem or summary.reason,
        next=None if summary.complete or found.alive else again.in_directory(summary.command, path),
    )


def _unreadable(path: Path, why: str) -> Night:
    return Night(
        path=str(path), job="", state="unreadable", working=False, complete=False, rows=0, done=0, failed=0, pending=0,
        by_status={}, cost_usd=None, possibly_billed_usd=Decimal(0), unpriced=0, begun_at=None, updated_at=None,
        age_s=None, exit_code=None, reason=why, next=None,
    )  # fmt: skip


def _newness(night: Night) -> tuple[datetime, str]:
    return night.begun_at or datetime.max.replace(tzinfo=UTC), night.path
