"""Finds the runs that paths name or hold, each once: of two copies of a run the newer one counts, the other is named.

The figures come from summary.json, or from the footer of a completions file that was moved out of its run.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

import msgspec

from batchrun.errors import CheckpointError, InputError, writable
from batchrun.records import PossiblyBilled
from batchrun.report.run_state import run_state
from batchrun.report.summary import VERSION
from batchrun.run_summary import Estimate, InForce, MergedShard, TotalsLine
from batchrun.store.result_folder import MANIFEST
from batchrun.store.rundir import RunDirectory
from batchrun.store.totals import LOST
from batchrun.tables.files import read_footer

NO_RUN = "no run here; name a run directory, a folder of them, or a completions file"
UNFINISHED = ".tmp"
"""Suffix of a directory that a process did not finish."""


class Account(msgspec.Struct, frozen=True):
    """The part of a summary, or of a footer, that a bill needs. A footer lacks some of the fields after `price`."""

    version: int
    job: str
    run_id: str
    invocation: int
    updated_at: datetime
    complete: bool
    totals: list[TotalsLine]
    possibly_billed_count: int
    possibly_billed_usd: Decimal
    estimate: Estimate | None = None
    created_at: datetime | None = None
    rows: int = 0
    by_status: dict[str, int] = {}
    models: dict[str, int] = {}
    tags: dict[str, str] = {}
    price: str | None = None
    state: str = "complete"
    reason: str | None = None
    exit_code: int | None = 0
    pending: int = 0
    possibly_billed: list[PossiblyBilled] = []
    unpriced_usage: list[str] = []
    elapsed_s: float = 0.0
    requests_per_minute: float = 0.0
    tokens_per_minute: float = 0.0
    limits: InForce | None = None
    shard: str | None = None
    merged: list[MergedShard] = []

    @property
    def started_at(self) -> datetime:
        """The first start of the run, if known."""
        return self.created_at or self.updated_at

    @property
    def cost_usd(self) -> Decimal:
        """The known cost, which is complete if `all_priced`."""
        return sum((line.cost_usd for line in self.totals), Decimal(0))

    @property
    def all_priced(self) -> bool:
        """Every attempt has a cost."""
        return not any(line.unpriced or line.without_usage for line in self.totals)

    @property
    def done(self) -> int:
        """Rows in the totals."""
        return sum(line.rows for line in self.totals)

    @property
    def attempts(self) -> int:
        """Requests sent for them, including those whose answers were discarded."""
        return sum(line.attempts for line in self.totals)


class LeftOut(msgspec.Struct, frozen=True):
    """Something found under the paths that no figure includes, and why."""

    path: str
    why: str


class FoundRun(NamedTuple):
    """A run: its directory, or the completions file that was moved out of it."""

    place: Path
    account: Account


class Runs(NamedTuple):
    """The runs that count, and what is left out; both sorted, so the order of the paths does not matter."""

    found: tuple[FoundRun, ...]
    left_out: tuple[LeftOut, ...]


def find_runs(paths: Sequence[Path]) -> Runs:
    """Every run that the paths name or hold, once.

    Raises:
        InputError: a path holds no run, or one whose account can't be read: a bill without it would be wrong.
    """
    found: dict[Path, FoundRun] = {}
    left_out: dict[str, LeftOut] = {}
    for path in paths:
        if (named := _named(path)) is not None:
            account, why_not = _account(named)
            if account is None:
                raise InputError(f"{path}: {why_not}")
            found.setdefault(named.resolve(), FoundRun(named, account))
            continue
        accounts = {place: _account(place) for place in sorted(_runs_below(path))}
        for place, (account, why_not) in accounts.items():
            if account is None:
                left_out[str(place)] = LeftOut(_shown(place), why_not)
            else:
                found.setdefault(place.resolve(), FoundRun(place, account))
        if not any(account for account, _ in accounts.values()):
            raise InputError(f"{path}: {NO_RUN}")
    return _each_once(list(found.values()), list(left_out.values()))


def _each_once(found: list[FoundRun], left_out: list[LeftOut]) -> Runs:
    by_run: dict[str, list[FoundRun]] = {}
    for each in found:
        by_run.setdefault(each.account.run_id or str(each.place.resolve()), []).append(each)
    newest = []
    for copies in by_run.values():
        copies.sort(  # by age; among equal ones always the same counts
            key=lambda each: (
                each.account.invocation,
                each.account.updated_at,
                each.place.is_dir(),
                str(each.place.resolve()),
            )
        )
        newest.append(copies[-1])
        left_out += (LeftOut(_shown(other.place), _copy(other.account, copies[-1])) for other in copies[:-1])
    counted, merged = _without_merged(newest)
    left_out += merged
    counted.sort(key=lambda each: (each.account.job, each.account.run_id, each.account.updated_at))
    return Runs(tuple(counted), tuple(sorted(left_out, key=lambda each: each.path)))


def _without_merged(found: list[FoundRun]) -> tuple[list[FoundRun], list[LeftOut]]:
    """The runs without the shards that another of them was merged from, which counts them; and those."""
    merged = {shard.run_id: (each, shard) for each in found for shard in each.account.merged}
    left_out = []
    for each in found:
        if each.account.run_id not in merged:
            continue
        whole, shard = merged[each.account.run_id]
        why = f"shard {shard.shard}, merged into {_shown(whole.place)}, which counts it"
        if each.account.attempts > shard.attempts:
            later_usd = each.account.cost_usd - shard.cost_usd
            why += f", but resumed since: no figure includes at least ${max(later_usd, Decimal(0)):,.6f} of it"
        left_out.append(LeftOut(_shown(each.place), why))
    return [each for each in found if each.account.run_id not in merged], left_out


def _copy(other: Account, newest: FoundRun) -> str:
    """Why a copy is left out, and how much it spent by itself if it was resumed separately."""
    why = f"a copy of run {other.run_id}, counted as {_shown(newest.place)}"
    own, counted = _spent(other), _spent(newest.account)
    pairs = ((*spent, *counted.get(key, (0, Decimal(0)))) for key, spent in own.items())
    missing = [cost - counted_usd for n, cost, counted_n, counted_usd in pairs if n > counted_n]
    if not missing:
        return why
    return f"{why}, but resumed separately: no figure includes at least ${max(sum(missing), Decimal(0)):,.6f} of it"


def _shown(path: Path) -> str:
    """The path as one line of text, for any bytes."""
    return writable(str(path)).replace("\n", "\\n")


_Part = tuple[int, str, str]


def _spent(account: Account) -> dict[_Part, tuple[int, Decimal]]:
    """Attempts and cost by invocation, model and day. Both only grow, also when answers are replaced."""
    parts: dict[_Part, tuple[int, Decimal]] = {}
    for line in account.totals:
        if line.status == LOST:
            continue  # these cost nothing here, and move from one model to several while the run continues
        key = line.invocation, line.model, line.day
        attempts, cost = parts.get(key, (0, Decimal(0)))
        parts[key] = attempts + line.attempts, cost + line.cost_usd
    return parts


def _named(path: Path) -> Path | None:
    """The run directory or completions file that `path` names; None if it is a folder of them, or nothing."""
    if path.name == "summary.json" and path.is_file():
        return path.parent
    if path.is_file() or is_run(path):
        return path
    return path / MANIFEST if (path / MANIFEST).is_file() else None  # a result's folder that was moved


def _runs_below(folder: Path) -> Iterator[Path]:
    """The directories below `folder` that look like a run's. Links are followed, each directory once.

    Raises:
        InputError: a directory can't be read, and a bill without its runs would be wrong.
    """
    if not folder.is_dir():
        return

    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename}: can't be read: {error.strerror}") from error

    seen: set[str] = set()
    for name, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        if (real := os.path.realpath(name)) in seen:
            folders.clear()
            continue
        seen.add(real)
        if "summary.json" in files or "checkpoint.db" in files:
            yield Path(name)
        if is_run(Path(name)):
            folders.clear()  # no run inside a run
        folders[:] = [each for each in folders if not each.endswith(UNFINISHED)]


def is_run(directory: Path) -> bool:
    """True for a run directory, even a damaged one."""
    files = RunDirectory(directory)
    if files.checkpoint.exists():
        return True
    summary = files.read_summary()
    return summary is not None and summary.keys() >= {"run_id", "totals", "version"}


def _account(place: Path) -> tuple[Account | None, str]:
    """The account of the run, or of the moved file; or None, and why nothing is counted.

    Raises:
        InputError: it is a run, and its account can't be read.
    """
    if place.is_file():
        return _of_file(place)
    files = RunDirectory(place)
    if not is_run(place):
        return None, "its summary.json is not batchrun's"
    if not files.summary.exists():
        if (place / "salvaged.parquet").exists():
            return None, "salvaged and not resumed yet; the damaged run has the bill"
        raise InputError(f"{files.summary} is missing; resume that run, which writes it again, or leave the run out")
    try:
        account = _decoded(files.summary.read_bytes(), files.summary)
    except OSError as error:
        raise InputError(f"{files.summary}: can't be read: {error.strerror}") from error
    if account.exit_code is None:
        # its last process was killed or still works, and spent more than summary.json says
        with contextlib.suppress(CheckpointError):
            account = msgspec.convert(msgspec.to_builtins(run_state(files).summary), Account)
    return account, ""


def _of_file(path: Path) -> tuple[Account | None, str]:
    if path.name == MANIFEST:
        try:
            bill = msgspec.json.decode(path.read_bytes(), type=dict[str, object]).get("bill")
        except (OSError, msgspec.DecodeError) as error:
            return None, f"can't be read: {error}"
        return (None, "no bill in it") if bill is None else (_decoded(msgspec.json.encode(bill), path), "")
    try:
        footer = read_footer(path)
    except CheckpointError as error:
        return None, f"{error}".removeprefix(f"{path}: ")
    if footer is None:
        where = path.parent if is_run(path.parent) else "a run directory"
        return None, f"no bill in its footer; name {where} or a completions.parquet"
    return _decoded(msgspec.json.encode(footer), path), ""


def _decoded(content: bytes, path: Path) -> Account:
    try:
        version = msgspec.json.decode(content, type=dict[str, object]).get("version")
        if version != VERSION:
            raise InputError(
                f"{path}: written by another version of batchrun (schema {version}, this one reads {VERSION})"
            )
        return msgspec.json.decode(content, type=Account)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path}: damaged: {error}; run batchrun verify, then repair it or leave that run out of the paths"
        ) from error
