"""Which rows take an answer without a request: found once, from the request keys of the input that was just checked.

Keys are spread over buckets, so equal ones are together. Against each bucket every earlier result is read once, keys
only: nothing of it is held but the places of the answers that are wanted. Memory does not grow with the number of
earlier answers (docs/benchmarks.md).
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.compute as pc

from batchrun import durable
from batchrun.errors import InputError
from batchrun.job.job import Job
from batchrun.report.summary import plural
from batchrun.startup.answer_match import Spread, buckets_of
from batchrun.startup.earlier_results import EarlierResult, find, sources
from batchrun.store import origins
from batchrun.store.carry_over import is_unchanged
from batchrun.store.origins import OldFile, Origins, OriginsWriter
from batchrun.tables.old_answers import OldAnswers


def wanted(job: Job, rows: int, layout: int) -> Origins | None:
    """What the origins of a run's rows are made of, as the job says now; None where every row is to be sent."""
    named = sources(job)
    if not (named or job.input.dedupe):
        return None
    return Origins(rows, layout, job.input.dedupe, tuple(sorted(job.input.reuse_status)), named)


def still_holds(made: Origins | None, now: Origins | None, path: Path) -> bool:
    """Whether the origins that were found before are those that would be found now."""
    if made is None or now is None:
        return now is None
    if made.made_of() != now or not all(map(is_unchanged, made.files)):
        return False
    if made.digest is None:
        return True
    return path.exists() and durable.digest(path) == made.digest


def make(
    job: Job,
    keys: Iterable[tuple[bytes, int]],
    now: Origins,
    own: Path,
    path: Path,
    tell: Callable[[str], None] = lambda line: None,
) -> Origins:
    """The origins of the rows are in a file at `path`, unless every row is to be sent. `keys` are (key, row) in order.

    `own` is the run's directory.

    Raises:
        InputError: an earlier result is not there or can't be read.
        DiskError: there is no room for the file.
    """
    earlier = find(job, own, tell)
    files = tuple(file for result in earlier for file in result.files)
    count = buckets_of(now.rows)
    reused = duplicates = 0
    used: set[int] = set()
    with OriginsWriter(path, now.rows) as writer, Spread(keys, count, path.parent) as buckets:
        for bucket in range(count):
            rows_of: dict[bytes, list[int]] = {}
            for key, row in buckets.entries(bucket):
                rows_of.setdefault(key, []).append(row)
            found = _found(rows_of, earlier, files, now)
            for rows, answers in zip(rows_of.values(), found, strict=True):
                reused += len(answers)
                used.update(place[0] for answer in answers if (place := origins.place(answer)) is not None)
                duplicates += _say(writer, rows, answers, dedupe=now.dedupe)
        made = msgspec.structs.replace(now, files=files, reused=reused, duplicates=duplicates)
        if reused or duplicates:
            made = msgspec.structs.replace(made, digest=writer.keep())
    return made if used else msgspec.structs.replace(made, files=())


def _say(writer: OriginsWriter, rows: Sequence[int], answers: Sequence[int], *, dedupe: bool) -> int:
    """The equal rows have their origins; how many are copies of the first."""
    for row, answer in zip(rows, answers, strict=False):
        writer[row] = answer
    if not dedupe or len(rows) < 2:
        return 0
    for row in rows[1:]:
        writer[row] = origins.copy_of(rows[0])
    if not answers:
        writer[rows[0]] = origins.wanted_until(rows[-1])
    return len(rows) - 1


def _found(
    rows_of: dict[bytes, list[int]], earlier: Sequence[EarlierResult], files: Sequence[OldFile], now: Origins
) -> list[list[int]]:
    """For each key the earlier answers that its rows take: one, or where equal rows are sent one for each of them.

    All of a key's are of the first result that has any: another may have the same answers, reused.
    """
    found: list[list[int]] = [[] for _ in rows_of]
    if not earlier or not rows_of:
        return found
    keys, left, number = pa.array(list(rows_of), pa.binary(16)), len(rows_of), 0
    most = [1] * len(rows_of) if now.dedupe else [len(rows) for rows in rows_of.values()]
    for result in earlier:
        fresh: dict[int, list[int]] = {}
        for file in result.files:
            for at, row in _matches(file, keys, now):
                if not found[at] and len(answers := fresh.setdefault(at, [])) < most[at]:
                    answers.append(origins.earlier(number, row))
            number += 1
        for at, answers in fresh.items():
            found[at] = answers
        left -= len(fresh)
        if not left:
            break
    return found


def _matches(file: OldFile, keys: "pa.Array[Any]", now: Origins) -> Iterator[tuple[int, int]]:
    """(place in `keys`, row in the file) of each acceptable answer of the file to one of them."""
    with contextlib.closing(OldAnswers(Path(file.path))) as answers:
        for known, rows in answers.keys(now.statuses, copies=now.dedupe):
            places = pc.index_in(known, value_set=keys)
            there = pc.is_valid(places)
            yield from zip(places.filter(there).to_pylist(), rows.filter(there).to_pylist(), strict=True)
    if not is_unchanged(file):
        raise InputError(f"{file.path}: an earlier result changed while it was read; run again when it is at rest")


def in_words(made: Origins) -> str | None:
    """What a start says of the rows that are not sent; None where all are."""
    parts = []
    if made.reused:
        parts.append(f"{made.reused:,} reused")
    if made.duplicates:
        parts.append(f"{made.duplicates:,} equal to an earlier row")
    if not parts:
        return None
    return f"to send: {made.new:,} of {plural(made.rows, 'row')}; not sent: {', '.join(parts)}"
