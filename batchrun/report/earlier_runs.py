"""Compares the newest run of each job with its earlier runs: what is unusual, and what jumped."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from batchrun.errors import InputError, JobError
from batchrun.report import drift, run_rows, runs
from batchrun.report.drift import Jump
from batchrun.report.findings import Finding, Night, findings
from batchrun.report.profile import profile
from batchrun.report.runs import FoundRun

NIGHTS = 7
"""Earlier nights with which the newest is compared."""


class Against(msgspec.Struct, frozen=True):
    """The runs to compare each job's newest run with: the `nights` before it, or the newest run at a `path`."""

    nights: int = NIGHTS
    path: Path | None = None


class Compared(msgspec.Struct, frozen=True):
    """A job's newest run, with every figure compared; `before` are the directories of the earlier runs."""

    job: str
    run_id: str
    before: tuple[str, ...]
    jumps: tuple[Jump, ...]

    @property
    def jumped(self) -> list[str]:
        """The names of the figures that jumped."""
        return [jump.name for jump in self.jumps if jump.jumped]


def against(text: str) -> Against:
    """`last`, a number of nights, or a path.

    Raises:
        JobError: it is something else.
    """
    if text == "last":
        return Against(1)
    if Path(text).exists():
        return Against(path=Path(text))
    if not text.isdecimal() or not 1 <= int(text) <= 1_000:
        raise JobError(f"--against {text}: expected last, a number of nights, or a run directory")
    return Against(int(text))


def unusual(found: Sequence[FoundRun], limits: Mapping[str, float]) -> list[Finding]:
    """The unusual figures in the newest run of each job."""
    return [
        finding
        for newest, *before in _by_job(found)
        for finding in findings(_night(newest), [_night(each) for each in before[:NIGHTS]], limits)
    ]


def compared(found: Sequence[FoundRun], with_: Against) -> list[Compared]:
    """The newest run of each job, compared.

    Raises:
        InputError: there is no run to compare with.
    """
    other = None if with_.path is None else runs.find_runs([with_.path]).found
    table = []
    for newest, *earlier in _by_job(found):
        before = earlier[: with_.nights]
        if other is not None:
            same = [each for each in _ordered(other) if each.account.run_id != newest.account.run_id]
            before = [each for each in same if each.account.job == newest.account.job][:1] or same[:1]
        before = [each for each in before if each.account.complete]
        if not before:
            continue
        now, *then = (drift.figures(night.account, night.profile) for night in map(_night, (newest, *before)))
        places = tuple(str(each.place) for each in before)
        table.append(Compared(newest.account.job, newest.account.run_id, places, tuple(drift.jumps(now, then))))
    if not table:
        raise InputError("--against: no complete run before the newest one of any job; name more runs, or a path")
    return table


def _night(found: FoundRun) -> Night:
    return Night(found.account, run_rows.if_readable(found.place, profile))


def _ordered(found: Sequence[FoundRun]) -> list[FoundRun]:
    return sorted(found, key=lambda each: (each.account.started_at, each.account.run_id), reverse=True)


def _by_job(found: Sequence[FoundRun]) -> list[list[FoundRun]]:
    """Each job's runs, the newest first."""
    jobs: dict[str, list[FoundRun]] = {}
    for each in _ordered(found):
        jobs.setdefault(each.account.job, []).append(each)
    return [jobs[job] for job in sorted(jobs)]
