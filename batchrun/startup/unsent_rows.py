"""The rows of a run that take an answer without a request: found once, by the request keys of the input that was just
checked, and stored for later starts.

Keys are spread over buckets, so equal ones are together. Against each bucket every earlier result is read once, keys
only: nothing of it is held but the places of the answers that are wanted. Memory does not grow with the number of
earlier answers (docs/benchmarks.md).
"""

import contextlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa

from batchrun import compute as pc
from batchrun import durable
from batchrun.errors import InputError, writable
from batchrun.job.job import Job
from batchrun.records import Notice
from batchrun.report.wording import plural
from batchrun.source import Source
from batchrun.startup import earlier_results, input_pass
from batchrun.startup import shard as shards
from batchrun.startup.answer_match import KEYS, Questions
from batchrun.startup.buckets import MOST_BUCKETS, Buckets, count_for
from batchrun.startup.earlier_results import EarlierResult
from batchrun.startup.run_options import Start
from batchrun.store import origins
from batchrun.store.carry_over import is_unchanged
from batchrun.store.manifest import Manifest
from batchrun.store.origins import OldFile, Origins, OriginsWriter
from batchrun.tables.old_answers import OldAnswers

MOST_READS = 48
"""How often each earlier result is read at most: once per bucket, so this also bounds the buckets."""


def origins_wanted(job: Job, rows: int, layout: int, first_row: int = 0) -> Origins | None:
    """The settings for the origins of a run's rows, by the present job; None where every row is sent."""
    named = earlier_results.sources(job)
    if not (named or job.input.dedupe):
        return None
    statuses = tuple(sorted(job.input.reuse_status))
    return Origins(rows, layout, job.input.dedupe, statuses, tuple(map(writable, named)), first_row=first_row)


def are_current(made: Origins | None, now: Origins | None, path: Path) -> bool:
    """Whether a search for origins would find the same again."""
    if made is None or now is None:
        return now is None
    if made.made_of() != now or not all(map(is_unchanged, made.files)):
        return False
    if made.digest is None:
        return True
    return path.exists() and durable.digest(path) == made.digest


def find_origins(
    job: Job,
    keys: Iterable[tuple[bytes, int]],
    now: Origins | None,
    own: Path,
    path: Path,
    note: Callable[[str], None] = lambda line: None,
) -> Origins | None:
    """Writes the origins of the rows that are not sent to a file at `path`, if there are any. None if the job sends all
    rows, so that `now` is None. `keys` are (key, row) in order, `own` is the run's directory.

    Raises:
        InputError: an earlier result is not there or can't be read.
        DiskError: there is no room for the file.
    """
    if now is None:
        return None
    earlier = earlier_results.find_earlier(job, own, note)
    count = min(count_for(now.rows), MOST_READS if earlier else MOST_BUCKETS)
    reused = duplicates = 0
    with OriginsWriter(path, now.rows, now.first_row) as writer, Buckets(path.parent, count, KEYS) as buckets:
        buckets.add_all(keys)
        for bucket in range(count):
            equal = _EqualRows(buckets.entries(bucket), writer, dedupe=now.dedupe)
            duplicates += equal.copies
            reused += _take_earlier(equal, earlier, now, writer)
        made = msgspec.structs.replace(now, reused=reused, duplicates=duplicates)
        if reused:
            files = tuple(file for result in earlier for file in result.files)
            made = msgspec.structs.replace(made, files=files)
        if reused or duplicates:
            made = msgspec.structs.replace(made, digest=writer.keep())
    return made


class _EqualRows:
    """A bucket's rows by their keys: `first` has the first row of each different key, in the order of `places`.

    With `dedupe` the other rows of a key are copies of the first; else `others` has them by the key's place.
    """

    def __init__(self, entries: Iterable[tuple[bytes, int]], writer: OriginsWriter, *, dedupe: bool) -> None:
        self._places: dict[bytes, int] = {}
        self.first = array("q")
        self.others: dict[int, list[int]] = {}
        self.copies = 0
        for key, row in entries:
            if (place := self._places.setdefault(key, len(self.first))) == len(self.first):
                self.first.append(row)
            elif dedupe:
                first = self.first[place]
                writer[row] = origins.copy_of(first)
                writer[first] = origins.wanted_until(row)
                self.copies += 1
            else:
                self.others.setdefault(place, []).append(row)

    @cached_property
    def keys(self) -> "pa.Array[Any]":
        """The different keys, in their order."""
        return pa.array(list(self._places), pa.binary(16))


def _take_earlier(equal: _EqualRows, earlier: Sequence[EarlierResult], now: Origins, writer: OriginsWriter) -> int:
    """Gives each row the acceptable earlier answer to its key, if there is one; returns how many rows got one."""
    taken = number = 0
    is_found = bytearray(len(equal.first))
    for result in earlier:
        if 0 not in is_found:
            break
        fresh = bytearray(len(equal.first))
        for file in result.files:
            for place, row in _matches(file, equal.keys, now):
                others = equal.others.get(place)
                # of the first result that has any answer to the key: another may have the same ones, reused
                if is_found[place] or (fresh[place] and not others):
                    continue
                # each of several equal rows that are sent takes a different answer
                taker = others.pop(0) if fresh[place] and others else equal.first[place]
                writer[taker] = origins.earlier(number, row)
                fresh[place] = 1
                taken += 1
            number += 1
        is_found = bytearray(map(int.__or__, is_found, fresh))
    return taken


def _matches(file: OldFile, keys: "pa.Array[Any]", now: Origins) -> Iterator[tuple[int, int]]:
    """(place in `keys`, row in the file) of each acceptable answer of the file to one of them."""
    with contextlib.closing(OldAnswers(file.path)) as answers:
        for known, rows in answers.keys(now.statuses, copies=now.dedupe):
            places = pc.index_in(known, value_set=keys)
            there = pc.is_valid(places)
            yield from zip(places.filter(there).to_pylist(), rows.filter(there).to_pylist(), strict=True)
    if not is_unchanged(file):
        raise InputError(f"{file.path}: an earlier result changed while it was read; run again when it is at rest")


def in_words(made: Origins) -> str | None:
    """The start's line on the rows that are not sent; None where all are sent."""
    parts = []
    if made.reused:
        parts.append(f"{made.reused:,} reused")
    if made.duplicates:
        parts.append(f"{made.duplicates:,} equal to an earlier row")
    if not parts:
        return None
    return f"to send: {made.new:,} of {plural(made.rows, 'row')}; not sent: {', '.join(parts)}"


def find_unsent(
    start: Start, manifest: Manifest, keys: Iterable[tuple[bytes, int]], note: Callable[[str], None]
) -> Origins | None:
    """The rows that take an answer without a request, by their keys; None if the job sends all of them."""
    job, directory = start.job, start.directory
    now = origins_wanted(job, manifest.rows, manifest.layout)
    made = find_origins(job, keys, now, directory.path, directory.origins_of(manifest.layout), note)
    if made is not None and (line := in_words(made)) is not None:
        fields = {"rows": made.rows, "to_send": made.new, "reused": made.reused, "duplicates": made.duplicates}
        note(Notice(line, "reused", **fields))
    return made


def stored_or_found(start: Start, known: Manifest, source: Source) -> Origins | None:
    """The stored origins of the run's rows. If the job wants others, or their sources have changed, the input is read
    again for its keys, and the origins are found again.
    """
    job, directory, checkpoint = start.job, start.directory, start.checkpoint
    entry = checkpoint.manifest_entries().get(origins.ENTRY, "null")
    made = msgspec.json.decode(entry, type=Origins | None)
    now = origins_wanted(job, known.rows, known.layout, known.first_row)
    if are_current(made, now, directory.origins_of(known.layout)):
        return None if now is None else made
    settled, opened = checkpoint.totals.settled(), start.opened_rows(known)
    if start.options.read_only or settled == known.rows or (checkpoint.has_reopened and opened == known.rows):
        return None  # only rows of a retry are left
    with Questions(directory.path) as keys:
        as_read = job if known.share is None else shards.reading(job, known.dialect)
        found = input_pass.check(source, as_read, directory, start.options, keys)
        made = find_unsent(start, known, keys.rows(found.rejected), start.options.note)
    checkpoint.write_manifest(origins.encode(made))
    return made
