"""The checkpoint of a run in SQLite: manifest, chunks, settled rows, attempts, totals.

One thread owns the database. `put` queues the ending of an attempt; everything in the queue when a commit has ended
goes into the next one. There is no timer.
"""

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

import msgspec

from batchrun.durable import disk_errors, fsync
from batchrun.errors import BatchrunError, DiskError
from batchrun.records import Completion, Discarded, Ending, PossiblyBilled
from batchrun.run_summary import TotalsLine
from batchrun.store import db_tables, spill
from batchrun.store.database import MAX_PARAMETERS, Database, Record
from batchrun.store.db_tables import Chunk, Reopened
from batchrun.store.totals import (
    UNSTATED,
    Totals,
    Unstated,
    fold,
    possibly_billed,
    row_counts_again,
    with_carried,
    with_changes,
    with_possibly_billed,
    with_reopened,
)

FORMAT = 6
"""`PRAGMA user_version`. A run directory with another number is of another version: exit 7."""

SINCE = "since"
"""The manifest entry with the invocation that made the present chunks. Attempts of earlier invocations are of other
rows."""

SPILL = "spill.bin"

MAX_GROUP = 1000
"""Endings in one commit: enough to share the cost of its fsync, few enough that no slot waits long."""

T = TypeVar("T")


class Checkpoint:
    """An open checkpoint. Close it."""

    def __init__(self, path: Path, *, free_reserve: Callable[[], bool], quick: bool = False) -> None:
        """`free_reserve` frees space on a full disk, once, and returns whether it did. `quick`: the file is a private
        copy to read at once, and only the records that are read are checked.

        `broken` is True once the database and the spill file have both failed: nothing can be stored any more.

        Raises:
            CheckpointError: damaged, or of another version.
            DiskError: the file can't be opened or created.
        """
        self._path = path
        self._free_reserve = free_reserve
        self._on_commit: Callable[[Sequence[Ending]], None] = lambda endings: None
        self._on_failure: Callable[[BatchrunError], None] = lambda error: None
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._endings: deque[Ending] = deque()
        self._entries: deque[tuple[str, str]] = deque()
        self._idle = False
        self._failed: BatchrunError | None = None
        self._spill = path.with_name(SPILL)
        self.broken = False
        self._closing = False
        self.invocation = 0
        self._database = (
            Database.open_copy(path, FORMAT)
            if quick
            else Database.open(path, db_tables.TABLES, FORMAT, self._make_room)
        )
        entries: dict[str, str] = dict(self._database.records("manifest"))
        self.since = int(entries.get(SINCE, "0"))
        self._reopened = bool(self._database.query("SELECT 1 FROM reopened LIMIT 1"))
        ((self._revision,),) = self._database.query("SELECT coalesce(max(revision), 0) FROM replaced")
        self._thread = threading.Thread(target=self._serve, name="checkpoint", daemon=True)
        self.totals = self._read_totals(msgspec.json.decode(entries.get(UNSTATED, "{}"), type=Unstated))
        self._restore_spilled()
        self._thread.start()

    # ── any thread may call ───────────────────────────────────────────────────────────────────────────────────────

    def listen(
        self, on_commit: Callable[[Sequence[Ending]], None], on_failure: Callable[[BatchrunError], None]
    ) -> None:
        """From now on `on_commit` gets each commit's endings, and `on_failure` the first failure.

        Both are called in the database's own thread. After a failure the database is not written again, because its
        next fsync may report a success that is none. Endings that still arrive go to the spill file, and the next start
        reads them from there.
        """
        self._on_commit, self._on_failure = on_commit, on_failure

    @property
    def failed(self) -> bool:
        """True once the database has refused a write."""
        return self._failed is not None

    def put(self, ending: Ending) -> None:
        """Queues the ending; `on_commit` gets it once it is durable."""
        self._endings.append(ending)
        if self._idle:  # waking the thread for every row would cost as much as the row's commit (measured)
            self._idle = False
            self._calls.put(_wake_up)

    def manifest_entries(self) -> dict[str, str]:
        """The entries of the manifest by name."""
        return dict(self._call(lambda: list(self._database.records("manifest"))))

    def write_manifest(self, entries: dict[str, str]) -> None:
        """The entries are durable; each replaces one of the same name."""
        self._call(lambda: self._replace("manifest", list(entries.items())))

    def put_entry(self, name: str, value: str) -> None:
        """Queues a manifest entry; it is durable before any ending that is put later."""
        self._entries.append((name, value))

    def start_invocation(self, started_at: float, pid: int, host: str, version: str) -> int:
        """This process's number among those that worked on the run, from 1."""

        def start() -> int:
            ((number,),) = self._database.query("SELECT coalesce(max(invocation), 0) + 1 FROM invocations")
            self._replace("invocations", [(number, started_at, pid, host, version)])
            return int(number)

        self.invocation = self._call(start)
        return self.invocation

    def last_invocation(self) -> int:
        """The number of the start that worked on the run last."""
        return self._call(
            lambda: int(self._database.query("SELECT coalesce(max(invocation), 0) FROM invocations")[0][0])
        )

    def chunks(self) -> list[Chunk]:
        """All chunks that were ever opened, in order."""
        return self._call(lambda: [Chunk(*record) for record in self._database.records("chunks", "ORDER BY chunk")])

    def open_chunk(self, chunk: Chunk) -> None:
        """Adds the chunk; its input is on disk already."""
        self._call(lambda: self._replace("chunks", [msgspec.structs.astuple(chunk)]))

    def seal_chunk(
        self,
        chunk: Chunk,
        carried: Mapping[int, TotalsLine] = MappingProxyType({}),
        *,
        keep: Collection[int] = (),
        drop: Collection[int] = (),
    ) -> None:
        """The chunk's part, on disk already, replaces its rows here, in one transaction.

        `carried` has its rows that took their answer without a request, as lines of the totals: they are settled now.
        Copies in later chunks need the records of the rows `keep`, and those of the rows `drop` no longer.
        """

        def seal() -> Totals:
            bounds = chunk.first_row, chunk.end_row
            totals = with_carried(self.totals, carried, self._earlier_answers(carried.keys()))
            self._database.replace("chunks", [msgspec.structs.astuple(chunk)])
            for rows in _groups(keep):
                query = f"INSERT OR REPLACE INTO originals SELECT * FROM rows {_among(rows)}"  # noqa: S608
                self._database.query(query, rows)
            for rows in _groups(drop):
                self._database.query(f"DELETE FROM originals {_among(rows)}", rows)  # noqa: S608
            self._database.query("DELETE FROM rows WHERE row >= ? AND row < ?", bounds)
            self._database.query("DELETE FROM reopened WHERE row >= ? AND row < ?", bounds)
            self._write_booked(totals)
            return self._write_standing(totals) if carried else totals

        self._call(lambda: self._change_totals(seal))

    def reopen_chunks(self, chunks: Sequence[Chunk], rows: Iterable[Reopened], entries: Mapping[str, str]) -> None:
        """The chunks are open again over their base parts and these rows of theirs pending, in one transaction.

        `entries` replace those of the same name in the manifest. The run is not finished any more. `rows` may be
        millions: a group of them is held at a time. On a full disk they are read again from the first one.
        """

        def reopen() -> Totals:
            totals, left = self.totals, iter(rows)
            self._database.replace("chunks", [msgspec.structs.astuple(chunk) for chunk in chunks])
            while group := list(islice(left, MAX_GROUP)):
                self._database.insert("reopened", [msgspec.structs.astuple(row) for row in group])
                totals = with_reopened(totals, (row.line for row in group))
                self._reopened = True
            self._database.query("DELETE FROM manifest WHERE name = 'finished'")
            self._database.replace("manifest", list(entries.items()))
            return self._write_standing(totals)

        self._call(lambda: self._change_totals(reopen))

    def replace_chunks(
        self,
        chunks: Sequence[Chunk],
        standing: Mapping[str, int],
        entries: Mapping[str, str],
        dropped: Sequence[TotalsLine] = (),
    ) -> None:
        """The run consists of these chunks from now on, in one transaction.

        Records of single rows are deleted: they are in the chunks' parts, or dropped. Attempts and possibly billed
        requests of earlier chunks stay, but are of other rows. `standing` counts the rows that have a completion.
        `dropped` are changes to the totals for answers that no row has any more.
        """

        def replace() -> Totals:
            # no row is reopened any more: each that is still pending counts by its old record again
            records = self._database.records("reopened", "WHERE row NOT IN (SELECT row FROM rows)")
            totals = with_changes(self.totals, (row_counts_again(Reopened(*record).line) for record in records))
            totals = with_changes(totals, dropped)
            for table in ("chunks", "rows", "originals", "reopened", "standing"):
                self._database.query(f"DELETE FROM {table}")  # noqa: S608  (our own names)
            self._database.insert("chunks", [msgspec.structs.astuple(chunk) for chunk in chunks])
            self._database.query("DELETE FROM manifest WHERE name = 'finished'")
            self._database.replace("manifest", [*entries.items(), (SINCE, str(self.invocation))])
            return self._write_standing(msgspec.structs.replace(totals, standing=dict(standing)))

        self._call(lambda: self._change_totals(replace))
        self.since = self.invocation

    @property
    def has_reopened(self) -> bool:
        """True while settled rows are sent again."""
        return self._reopened

    def reopened(self, chunk: Chunk) -> dict[int, Reopened]:
        """The rows of a chunk's base part that are sent again."""
        bounds = chunk.first_row, chunk.end_row
        return self._call(lambda: {record[0]: Reopened(*record) for record in self._between("reopened", *bounds)})

    def settled_rows(self, chunk: Chunk) -> set[int]:
        """The rows of an open chunk that have their completion."""
        return self._call(lambda: {record[0] for record in self._between("rows", chunk.first_row, chunk.end_row)})

    def completions(self, first_row: int, end_row: int) -> list[Completion]:
        """The completions of rows `first_row` to `end_row` - 1, in order; their usage is in their `raw`."""
        return self._call(
            lambda: [db_tables.completion(record) for record in self._between("rows", first_row, end_row)]
        )

    def rows_among(self, rows: Sequence[int]) -> set[int]:
        """Of these rows, those whose completion the database has."""

        def read() -> set[int]:
            found: set[int] = set()
            for group in _groups(rows):
                query = f"SELECT row FROM rows {_among(group)}"  # noqa: S608
                found |= {row for (row,) in self._database.query(query, group)}
            return found

        return self._call(read)

    def records_of(self, rows: Sequence[int]) -> list[Completion]:
        """The completions of these rows that the database still has, in order of rows."""

        def read() -> list[Completion]:
            found: dict[int, Completion] = {}
            for table in ("originals", "rows"):  # the newer record is the one of an open chunk
                for group in _groups(rows):
                    records = self._database.records(table, _among(group), group)
                    found |= {record[0]: db_tables.completion(record) for record in records}
            return [found[row] for row in sorted(found)]

        return self._call(read)

    def discarded(self, chunk: Chunk) -> list[Discarded]:
        """The earlier attempts of a chunk's rows, in order."""
        bounds = chunk.first_row, chunk.end_row

        def read() -> list[Discarded]:
            records = self._between("attempts", *bounds)
            return [db_tables.discarded(record) for record in records if record[-1] >= self.since]

        return self._call(read)

    def has_end(self, row: int, n: int) -> bool:
        """True if the attempt's ending is stored, or the attempt is listed as possibly billed."""

        return self._call(lambda: self._has_end(row, n))

    def _has_end(self, row: int, n: int) -> bool:
        queries = {
            "SELECT 1 FROM rows WHERE row = ? AND attempts >= ?": (row, n),
            "SELECT 1 FROM attempts WHERE row = ? AND n = ? AND invocation >= ?": (row, n, self.since),
            "SELECT 1 FROM possibly_billed WHERE row = ? AND n = ? AND invocation >= ?": (row, n, self.since),
            "SELECT 1 FROM chunks WHERE first_row <= ? AND first_row + rows > ? AND open = 0": (row, row),
        }
        return any(self._database.query(*query) for query in queries.items())

    def last_lost_attempts(self, chunk: Chunk) -> dict[int, int]:
        """For the rows of a chunk: the number of the last attempt that is listed as possibly billed."""
        query = "SELECT row, max(n) FROM possibly_billed WHERE row >= ? AND row < ? AND invocation >= ? GROUP BY row"
        return self._call(lambda: dict(self._database.query(query, (chunk.first_row, chunk.end_row, self.since))))

    def flushed(self) -> bool:
        """Waits until everything that was put before is durable; False if a failure prevented it."""
        try:
            self._call(lambda: None)
        except BatchrunError:
            return False
        return True

    def add_possibly_billed(self, entries: Sequence[PossiblyBilled]) -> None:
        """The attempts are on the permanent list of possibly billed requests."""
        if not entries:
            return

        def insert() -> None:
            self._database.insert("possibly_billed", [db_tables.possibly_billed_record(entry) for entry in entries])

        def call() -> None:
            self._database.transaction(insert)
            self.totals = with_possibly_billed(self.totals, entries)

        self._call(call)

    def copy_to(self, path: Path) -> None:
        """A copy of the database with everything that was put before, in a file that must not exist."""
        self._call(lambda: self._database.copy_to(path))

    def close(self, *, finished: bool = False) -> None:
        """Commits everything that was put before, and closes the file."""
        if self._thread.is_alive():
            finished = finished or (self._failed is None and "finished" in self.manifest_entries())
            if finished:  # without a log beside it, the file can be read later without touching it
                self._call(self._database.leave_wal)
            self._calls.put(self._stop)
            self._thread.join()
        self._database.close()
        if finished:
            with disk_errors(self._path.parent):
                fsync(self._path.parent)

    # ── the database's own thread ─────────────────────────────────────────────────────────────────────────────────

    def _call(self, work: Callable[[], T]) -> T:
        """Commits everything that was put before, then runs `work` in the database's thread; its result."""
        future: Future[T] = Future()

        def run() -> None:
            if self._failed is not None:
                future.set_exception(self._failed)
                return
            try:
                future.set_result(work())
            except DiskError as error:
                self._fail(error)
                future.set_exception(error)
            except BaseException as error:
                future.set_exception(error)

        self._calls.put(run)
        return future.result()

    def _serve(self) -> None:
        while not self._closing:
            call = self._next_call()
            while self._endings:  # those put before the call, and those that came since
                self._commit(self._pop_group())
            self._write_entries()
            call()

    def _next_call(self) -> Callable[[], None]:
        """The next call; until there is one, commits endings as they come."""
        while self._calls.empty():
            if self._endings:
                self._commit(self._pop_group())
                continue
            self._idle = True  # set before the queue is checked: an ending that is put later wakes this thread
            if not self._endings:
                break
            self._idle = False
        return self._calls.get()

    def _pop_group(self) -> list[Ending]:
        count = min(len(self._endings), MAX_GROUP)
        return [self._endings.popleft() for _ in range(count)]

    def _write_entries(self) -> None:
        # called after a group of endings was popped, so that entries put before one of them are written first
        entries = dict(self._entries.popleft() for _ in range(len(self._entries)))
        if entries and self._failed is None:
            try:
                self._replace("manifest", list(entries.items()))
            except BatchrunError as error:
                self._fail(error)

    def _stop(self) -> None:
        self._closing = True

    def _commit(self, endings: list[Ending]) -> None:
        self._write_entries()
        if not endings or self.broken:
            return  # the slots keep the names
        if self._failed is None:
            try:
                self.totals = self._write(endings, self.invocation)
                self._on_commit(endings)
                return
            except BatchrunError as error:
                self._fail(error)
            except Exception as error:  # SQLite can't store a value: stop, but let no caller wait for ever
                self.broken = True
                self._fail(BatchrunError(f"{self._path}: can't store an answer ({type(error).__name__}: {error})"))
                return
        try:
            spill.append(self._spill, endings, self.invocation)
        except BatchrunError as error:
            self.broken = True
            self._on_failure(error)
            return
        in_doubt = [entry for ending in endings if (entry := possibly_billed(ending, self.invocation)) is not None]
        self.totals = with_possibly_billed(fold(self.totals, endings, self.invocation), in_doubt)
        self._on_commit(endings)

    def _restore_spilled(self) -> None:
        """Endings that an earlier start spilled are in the database. Can be repeated."""
        for frame in spill.read(self._spill):
            # a commit that failed may be on the disk after all
            completions = [c for c in frame.completions if not self._has_end(c.row, c.attempts)]
            discarded = [d for d in frame.discarded if not self._has_end(d.row, d.n)]
            self.totals = self._write([*completions, *discarded], frame.invocation)
        if self._spill.exists():  # even without a whole frame: a torn one must not precede a later frame
            with disk_errors(self._spill):
                self._spill.unlink()
                fsync(self._path.parent)

    def _fail(self, error: BatchrunError) -> None:
        if self._failed is None:
            self._failed = error
            self._on_failure(error)

    def _write(self, endings: Sequence[Ending], invocation: int) -> Totals:
        """One commit: rows, attempts, possibly billed requests, and the totals that count them."""
        completions = [ending for ending in endings if isinstance(ending, Completion)]
        discarded = [ending for ending in endings if isinstance(ending, Discarded)]
        doubtful = [ending for ending in endings if ending.maybe_billed]
        in_doubt = [entry for ending in doubtful if (entry := possibly_billed(ending, invocation)) is not None]
        earlier = self._earlier_answers([completion.row for completion in completions]) if self._reopened else {}
        totals = fold(self.totals, endings, invocation, earlier)

        def write() -> None:
            self._database.insert("rows", list(map(db_tables.completion_record, completions)))
            self._database.insert(
                "attempts", [db_tables.discarded_record(attempt, invocation) for attempt in discarded]
            )
            self._database.insert("possibly_billed", [db_tables.possibly_billed_record(entry) for entry in in_doubt])
            self._write_booked(totals)
            if totals.unstated is not self.totals.unstated:
                self._database.replace("manifest", [(UNSTATED, msgspec.json.encode(totals.unstated).decode())])
            if completions:
                self._write_standing(totals)
            known = self.totals.answered_as.items()
            self._database.replace("answered_as", [item for item in totals.answered_as.items() if item not in known])

        self._database.transaction(write)
        return with_possibly_billed(totals, in_doubt)

    def _make_room(self, full: DiskError) -> bool:
        """Frees the reserve on a full disk, so that requests in flight can still be stored, and ends the run."""
        freed = self._free_reserve()
        if freed:
            self._on_failure(full)
        return freed

    def _change_totals(self, work: Callable[[], Totals]) -> None:
        """Runs `work` in one transaction; the totals are what it returns."""
        totals = self.totals

        def transact() -> None:
            nonlocal totals
            totals = work()

        self._database.transaction(transact)
        self.totals = totals

    def _write_standing(self, totals: Totals) -> Totals:
        """Writes the number of rows by status, and the changes by replaced answers. Call it in a transaction."""
        self._database.replace("standing", list(totals.standing.items()))
        known = self.totals.replaced
        changed = [line for key, line in totals.replaced.items() if known.get(key) is not line]
        self._revision += bool(changed)
        self._database.replace("replaced", [db_tables.replaced_record(line, self._revision) for line in changed])
        return totals

    def _write_booked(self, totals: Totals) -> None:
        """Writes the lines of the totals that have changed. Call it in a transaction."""
        known = self.totals.booked
        changed = [line for key, line in totals.booked.items() if known.get(key) is not line]
        self._database.replace("totals", [db_tables.totals_record(line) for line in changed])

    def _earlier_answers(self, rows: Collection[int]) -> dict[int, TotalsLine]:
        """For those of the rows that were reopened: what their earlier answer alone used and cost."""
        if not self._reopened:
            return {}
        again: list[Reopened] = []
        for group in _groups(rows):
            found = self._database.records("reopened", _among(group), group)
            again += [Reopened(*record) for record in found]
        return {each.row: each.line for each in again}

    def _replace(self, table: str, records: Sequence[Record]) -> None:
        self._database.transaction(lambda: self._database.replace(table, records))

    def _between(self, table: str, first_row: int, end_row: int) -> Iterator[Record]:
        return self._database.records(table, "WHERE row >= ? AND row < ? ORDER BY 1, 2", (first_row, end_row))

    def _read_totals(self, unstated: Unstated) -> Totals:
        lines = [db_tables.totals_line(record) for record in self._database.records("totals")]
        changes = [db_tables.replaced_line(record) for record in self._database.records("replaced")]
        in_doubt = self._database.records("possibly_billed", "ORDER BY rowid")
        totals = Totals(
            booked={line.key: line for line in lines},
            replaced={line.key: line for line in changes},
            standing=dict(self._database.records("standing")),
            answered_as=dict(self._database.records("answered_as")),
            unstated=unstated,
        )
        return with_possibly_billed(totals, [db_tables.possibly_billed(record) for record in in_doubt])


def _groups(rows: Collection[int]) -> Iterator[list[int]]:
    """The rows, in lists that fit into one statement."""
    left = list(rows)
    for start in range(0, len(left), MAX_PARAMETERS):
        yield left[start : start + MAX_PARAMETERS]


def _among(rows: Sequence[int]) -> str:
    """The clause that selects these rows."""
    return f"WHERE row IN ({','.join('?' * len(rows))})"


def _wake_up() -> None:
    """A call that does nothing."""


def read_copy(path: Path) -> tuple[dict[str, str], list[Chunk]]:
    """The manifest entries and the chunks of a copy that `Checkpoint.copy_to` made."""
    with contextlib.closing(Database.open_read_only(path, db_tables.TABLES, FORMAT)) as database:
        chunks = [Chunk(*record) for record in database.records("chunks", "ORDER BY chunk")]
        return dict(database.records("manifest")), chunks


def read_finished(path: Path) -> dict[str, str]:
    """The manifest entries of a finished run, read without touching any file."""
    with contextlib.closing(Database.open_read_only(path, db_tables.TABLES, FORMAT)) as database:
        return dict(database.records("manifest"))
