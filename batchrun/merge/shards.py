"""The shards of one run, read and checked: all there, each complete and intact, of one job and one input.

Everything that is wrong is found before anything is written, in all shards at once.
"""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from batchrun.errors import BatchrunError, CheckpointError, ExitCode, InputError, RunLockedError, quoted
from batchrun.integrity.db_records import DbRecords
from batchrun.integrity.verify import inspected
from batchrun.records import FinishedResult
from batchrun.report.summary import read as read_summary
from batchrun.report.wording import are, plural
from batchrun.run_summary import Summary
from batchrun.startup.resume import SHAPE
from batchrun.store import price_tables, result, variants
from batchrun.store.manifest import InputShare, Manifest
from batchrun.store.price_tables import Tables
from batchrun.store.rundir import RunDirectory
from batchrun.store.variants import Variant, differences

MOST_NAMED = 10
"""Shards that one line names."""


class ShardsError(BatchrunError):
    """The shards can't be merged. The message has a line for each thing that is wrong."""

    def __init__(self, message: str, exit_code: ExitCode) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class ShardProblem(msgspec.Struct, frozen=True):
    """The problem in one line. The exit code says what helps: 4 waiting, 2 other directories, 7 `verify`."""

    line: str
    exit_code: ExitCode


class CompleteShard(msgspec.Struct, frozen=True):
    """A shard with everything that its database says. `prices` are those of its models."""

    directory: RunDirectory
    known: DbRecords
    manifest: Manifest
    share: InputShare
    variants: tuple[Variant, ...]
    prices: Tables
    summary: Summary
    result: FinishedResult

    @property
    def number(self) -> int:
        return self.share.shard.number


def read(places: Sequence[Path]) -> list[CompleteShard]:
    """The shards in the directories, in the order of their rows.

    Raises:
        ShardsError: they are not all shards of one run, complete and intact.
    """
    found: list[CompleteShard] = []
    problems: list[ShardProblem] = []
    unfinished: set[int] = set()
    for place in dict.fromkeys(path.resolve() for path in places):
        shown = next(path for path in places if path.resolve() == place)
        shard, share, wrong = _read_one(shown)
        problems += wrong
        if shard is not None:
            found.append(shard)
        elif share is not None:
            unfinished.add(share.shard.number)
    found.sort(key=lambda shard: shard.number)
    problems += _mismatches(found, unfinished)
    if problems:
        codes = {problem.exit_code for problem in problems}
        worst = next(code for code in (ExitCode.DAMAGED, ExitCode.USAGE, ExitCode.STOPPED) if code in codes)
        raise ShardsError("\n".join(f"{problem.line}" for problem in problems), worst)
    return found


def _read_one(place: Path) -> tuple[CompleteShard | None, InputShare | None, list[ShardProblem]]:
    """The shard; the input it is a share of, if known; and its problems."""
    directory = RunDirectory(place)
    try:
        with inspected(directory) as inspection:
            damages, known = inspection.damages, inspection.known
    except RunLockedError:
        return None, None, [ShardProblem(f"{place}: a process works on it; wait for its end", ExitCode.STOPPED)]
    except (InputError, CheckpointError) as error:
        code = ExitCode.USAGE if isinstance(error, InputError) else ExitCode.DAMAGED
        return None, None, [ShardProblem(str(error), code)]
    if damages:
        first, more = damages[0], len(damages) - 1
        others = f" (and {plural(more, 'other damage')})" if more else ""
        what = f"{place}: damaged: {first.file}: {first.what}{others}; see batchrun verify {quoted(place)}"
        return None, None, [ShardProblem(what, ExitCode.DAMAGED)]
    if Manifest.ENTRY not in known.manifest:
        return None, None, [ShardProblem(f"{place}: no row of it was sent yet; run it to its end", ExitCode.STOPPED)]
    manifest = Manifest.decode(known.manifest)
    if (share := manifest.share) is None:
        return None, None, [ShardProblem(f"{place}: is not a shard; name runs with --shard", ExitCode.USAGE)]
    left = manifest.rows - known.totals.settled()
    if left or result.FINISHED not in known.manifest:
        what = f"{plural(left, 'row')} {are(left)} pending" if left else "its result is not written yet"
        return None, share, [ShardProblem(f"{place}: shard {share.shard}: {what}; run it to its end", ExitCode.STOPPED)]
    shard = CompleteShard(
        directory,
        known,
        manifest,
        share,
        variants.decode(known.manifest),
        price_tables.decode(known.manifest),
        read_summary(directory),
        result.finished(known.manifest),
    )
    return shard, share, []


def _mismatches(found: Sequence[CompleteShard], unfinished: set[int]) -> Iterator[ShardProblem]:
    """The problems that keep the shards from being one run."""
    if not found:
        return
    first = found[0]
    count = first.share.shard.count
    wrong = set[int]()
    for place, shard in enumerate(found[1:], start=1):
        if differs := ", ".join(_differences(first, shard)):
            wrong.add(place)
            yield ShardProblem(
                f"{shard.directory.path}: not of one run with {first.directory.path}: {differs}", ExitCode.USAGE
            )
    alike = [shard for place, shard in enumerate(found) if place not in wrong]
    for one, other in itertools.pairwise(alike):
        if one.number == other.number:
            both = f"{one.directory.path} and {other.directory.path}"
            yield ShardProblem(f"{both}: both are shard {one.share.shard}; name one of them", ExitCode.USAGE)
        elif one.number + 1 == other.number and one.share.span.end != other.share.span.start.ordinal:
            yield ShardProblem(
                f"{other.directory.path}: its rows don't follow those of {one.directory.path}", ExitCode.USAGE
            )
    missing = [str(number) for number in range(count) if number not in {shard.number for shard in alike} | unfinished]
    if missing:
        more = f" and {len(missing) - MOST_NAMED:,} more" if len(missing) > MOST_NAMED else ""
        which = f"shard {missing[0]}" if len(missing) == 1 else f"shards {', '.join(missing[:MOST_NAMED])}{more}"
        yield ShardProblem(f"{which} of {count} {are(len(missing))} not among these directories", ExitCode.STOPPED)


def _differences(one: CompleteShard, other: CompleteShard) -> Iterator[str]:
    """The differences that two shards of one run can't have."""
    if one.manifest.job != other.manifest.job:
        yield f"job {other.manifest.job}, not {one.manifest.job}"
    if one.share.shard.count != other.share.shard.count:
        yield f"one of {other.share.shard.count} shards, not of {one.share.shard.count}"
    if (one.manifest.digests, one.share.span.records) != (other.manifest.digests, other.share.span.records):
        yield "another input"
    yield from differences(one.variants[0], other.variants[0])
    for name in SHAPE:
        if getattr(one.manifest.output, name) != getattr(other.manifest.output, name):
            yield f"output.{name}"
    if one.manifest.types != other.manifest.types:
        yield "the types of its columns"
    for model in sorted(one.prices.keys() & other.prices.keys()):
        tables = one.prices[model], other.prices[model]
        if len({None if table is None else table.rates for table in tables}) > 1:
            yield f"the price of {model}"
