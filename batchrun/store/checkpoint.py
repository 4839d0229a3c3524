"""What is known of a run, in SQLite: manifest, chunks, settled rows, attempts, totals.

One thread owns the database. Endings of attempts are handed to it by `put` and committed in groups: whatever is pending
when the last commit has ended goes into the next (no timer), each table with one multi-row INSERT.
"""

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

import msgspec

from batchrun.durable import disk_errors, fsync
from batchrun.errors import BatchrunError, DiskError
from batchrun.records import Completion, Discarded, Ending, PossiblyBilled, TotalsLine
from batchrun.store import db_tables, spill, totals
from batchrun.store.database import MAX_PARAMETERS, Database, Record
from batchrun.store.db_tables import Chunk, Reopened
from batchrun.store.totals import (
    UNSTATED,
    Totals,
    Unstated,
    doubt,
    fold,
    reopened,
    settled_still,
    with_changes,
    with_possibly_billed,
)

FORMAT = 5
"""`PRAGMA user_version`. Another number is another version's run directory: exit 7."""

SINCE = "since"
"""The manifest's entry that holds the invocation in which the rows were last laid out."""

SPILL = "spill.bin"

MAX_GROUP = 1000
"""Endings a commit: enough to amortise its fsync, few enough to keep its slots from waiting long."""

T = TypeVar("T")


class Checkpoint:
    """An open checkpoint. Close it."""

    def __init__(self, path: Path, *, free_reserve: Callable[[], bool], glance: bool = False) -> None:
        """`free_reserve` makes room on a full disk, once, and says whether it did. `glance`: the file is a private
        copy to be read at once, so only the records that are read are checked.

        `broken` turns True when the database and the spill file have both failed: nothing can be kept any more.

        Raises:
            CheckpointError: damaged, or of another version.
            DiskError: the file can't be opened or made.
        """
        self._path = path
        self._free_reserve = free_reserve
        self._on_durable: Callable[[Sequence[Ending]], None] = lambda endings: None
        self._on_failure: Callable[[BatchrunError], None] = lambda error: None
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._endings: deque[Ending] = deque()
        self._notes: deque[tuple[str, str]] = deque()
        self._idle = False
        self._failed: BatchrunError | None = None
        self._spill = path.with_name(SPILL)
        self.broken = False
        self._closing = False
        self.invocation = 0
        self._database = (
            Database.glance(path, FORMAT) if glance else Database.open(path, db_tables.TABLES, FORMAT, self._make_room)
        )
        manifest: dict[str, str] = dict(self._database.records("manifest"))
        self.since = int(manifest.get(SINCE, "0"))
        self._reopened = bool(self._database.query("SELECT 1 FROM reopened LIMIT 1"))
        ((self._revision,),) = self._database.query("SELECT coalesce(max(revision), 0) FROM replaced")
        self._thread = threading.Thread(target=self._serve, name="checkpoint", daemon=True)
        self.spent = self._read_spent(msgspec.json.decode(manifest.get(UNSTATED, "{}"), type=Unstated))
        self._take_in_spilled()
        self._thread.start()

    # ── what any thread may call ──────────────────────────────────────────────────────────────────────────────────

    def listen(
        self, on_durable: Callable[[Sequence[Ending]], None], on_failure: Callable[[BatchrunError], None]
    ) -> None:
        """From now on each commit's endings go to `on_durable`, and the first failure to `on_failure`.

        Both are called in the database's own thread. After a failure the database is not written again: its next fsync
        may lie. What still arrives is spilled, and taken in by the next start.
        """
        self._on_durable, self._on_failure = on_durable, on_failure

    @property
    def failed(self) -> bool:
        """True once the database has refused a write."""
        return self._failed is not None

    def put(self, ending: Ending) -> None:
        """The ending is on its way to the disk; `on_durable` names it when it is there."""
        self._endings.append(ending)
        if self._idle:  # waking the thread for every row would cost as much as the row's commit (measured)
            self._idle = False
            self._calls.put(_nothing)

    def manifest(self) -> dict[str, str]:
        """The run's fixed facts, by name."""
        return dict(self._call(lambda: list(self._database.records("manifest"))))

    def write_manifest(self, facts: dict[str, str]) -> None:
        """The facts are durable, each replacing one of the same name."""
        self._call(lambda: self._replace("manifest", list(facts.items())))

    def note(self, name: str, value: str) -> None:
        """The manifest's entry is durable before any ending that is put after this; nobody waits for it."""
        self._notes.append((name, value))

    def begin_invocation(self, started_at: float, pid: int, host: str, version: str) -> int:
        """This process's number among those that worked on the run, from 1."""

        def begin() -> int:
            ((number,),) = self._database.query("SELECT coalesce(max(invocation), 0) + 1 FROM invocations")
            self._replace("invocations", [(number, started_at, pid, host, version)])
            return int(number)

        self.invocation = self._call(begin)
        return self.invocation

    def chunks(self) -> list[Chunk]:
        """All chunks that were ever opened, in order."""
        return self._call(lambda: [Chunk(*record) for record in self._database.records("chunks", "ORDER BY chunk")])

    def open_chunk(self, chunk: Chunk) -> None:
        """The chunk is on record; its input is on disk already."""
        self._call(lambda: self._replace("chunks", [msgspec.structs.astuple(chunk)]))

    def seal_chunk(
        self,
        chunk: Chunk,
        carried: Mapping[int, TotalsLine] = MappingProxyType({}),
        *,
        keep: Collection[int] = (),
        drop: Collection[int] = (),
    ) -> None:
        """The chunk's part, on disk already, takes the place of its rows here: one transaction.

        `carried` are its rows that took their answer without a request, as lines of the bill: they are settled now.
        The records of the rows `keep` are wanted by copies in later chunks, those of `drop` by none any more.
        """

        def seal() -> Totals:
            bounds = chunk.first_row, chunk.end_row
            spent = totals.carried(self.spent, carried, self._before(list(carried)))
            self._database.replace("chunks", [msgspec.structs.astuple(chunk)])
            for rows in _groups(keep):
                query = f"INSERT OR REPLACE INTO originals SELECT * FROM rows {_among(rows)}"  # noqa: S608
                self._database.query(query, rows)
            for rows in _groups(drop):
                self._database.query(f"DELETE FROM originals {_among(rows)}", rows)  # noqa: S608
            self._database.query("DELETE FROM rows WHERE row >= ? AND row < ?", bounds)
            self._database.query("DELETE FROM reopened WHERE row >= ? AND row < ?", bounds)
            self._write_totals(spent)
            return self._stand(spent) if carried else spent

        self._call(lambda: self._account(seal))

    def reopen_chunks(self, chunks: Sequence[Chunk], rows: Sequence[Reopened], facts: Mapping[str, str]) -> None:
        """The chunks are open again over their base parts, and these rows of theirs are pending: one transaction.

        `facts` replace those of the same name in the manifest; the run is not finished any more.
        """

        def reopen() -> Totals:
            self._database.replace("chunks", [msgspec.structs.astuple(chunk) for chunk in chunks])
            self._database.insert("reopened", [msgspec.structs.astuple(row) for row in rows])
            self._database.query("DELETE FROM manifest WHERE name = 'finished'")
            self._database.replace("manifest", list(facts.items()))
            return self._stand(reopened(self.spent, (row.line for row in rows)))

        self._call(lambda: self._account(reopen))
        self._reopened = self._reopened or bool(rows)

    def lay_out(
        self,
        chunks: Sequence[Chunk],
        standing: Mapping[str, int],
        manifest: Mapping[str, str],
        given_up: Sequence[TotalsLine] = (),
    ) -> None:
        """The run's rows are these chunks now, whatever they were: one transaction.

        What the database held of single rows is in the chunks' parts or was given up; attempts and doubts of earlier
        layouts stay on record, but speak of other rows. `standing` counts the rows that have a completion; `given_up`
        is what is added to the account's `replaced` for answers that no row has any more.
        """

        def lay_out() -> Totals:
            spent = with_changes(self._none_pending_again(), given_up)
            for table in ("chunks", "rows", "originals", "reopened", "standing"):
                self._database.query(f"DELETE FROM {table}")  # noqa: S608  (our own names)
            self._database.insert("chunks", [msgspec.structs.astuple(chunk) for chunk in chunks])
            self._database.query("DELETE FROM manifest WHERE name = 'finished'")
            self._database.replace("manifest", [*manifest.items(), (SINCE, str(self.invocation))])
            return self._stand(msgspec.structs.replace(spent, standing=dict(standing)))

        self._call(lambda: self._account(lay_out))
        self.since = self.invocation

    @property
    def has_reopened(self) -> bool:
        """True while settled rows are sent again."""
        return self._reopened

    def reopened(self, chunk: Chunk) -> dict[int, Reopened]:
        """The rows of a chunk's base part that are asked again."""
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
        """The earlier attempts of a chunk's rows in this layout, in order."""
        bounds = chunk.first_row, chunk.end_row

        def read() -> list[Discarded]:
            records = self._between("attempts", *bounds)
            return [db_tables.discarded(record) for record in records if record[-1] >= self.since]

        return self._call(read)

    def has_end(self, row: int, n: int) -> bool:
        """True when that attempt's end is on record, or that it has none."""

        return self._call(lambda: self._has_end(row, n))

    def _has_end(self, row: int, n: int) -> bool:
        queries = {
            "SELECT 1 FROM rows WHERE row = ? AND attempts >= ?": (row, n),
            "SELECT 1 FROM attempts WHERE row = ? AND n = ? AND invocation >= ?": (row, n, self.since),
            "SELECT 1 FROM possibly_billed WHERE row = ? AND n = ? AND invocation >= ?": (row, n, self.since),
            "SELECT 1 FROM chunks WHERE first_row <= ? AND first_row + rows > ? AND open = 0": (row, row),
        }
        return any(self._database.query(*query) for query in queries.items())

    def last_attempts_lost(self, chunk: Chunk) -> dict[int, int]:
        """For the rows of a chunk in this layout: the number of the last attempt whose end nobody knows."""
        query = "SELECT row, max(n) FROM possibly_billed WHERE row >= ? AND row < ? AND invocation >= ? GROUP BY row"
        return self._call(lambda: dict(self._database.query(query, (chunk.first_row, chunk.end_row, self.since))))

    def flushed(self) -> bool:
        """Everything that was put before is durable; False where a failure prevented it."""
        try:
            self._call(lambda: None)
        except BatchrunError:
            return False
        return True

    def name_possibly_billed(self, entries: Sequence[PossiblyBilled]) -> None:
        """The attempts are on the permanent list."""
        if not entries:
            return

        def name() -> None:
            self._database.insert("possibly_billed", [db_tables.possibly_billed_record(entry) for entry in entries])

        def call() -> None:
            self._database.transaction(name)
            self.spent = with_possibly_billed(self.spent, entries)

        self._call(call)

    def close(self, *, finished: bool = False) -> None:
        """Everything put before is committed and the file closed.

        A finished run's database leaves WAL mode, so that looking at it later touches no file.
        """
        if self._thread.is_alive():
            finished = finished or (self._failed is None and "finished" in self.manifest())
            if finished:
                self._call(self._database.rest)
            self._calls.put(self._stop)
            self._thread.join()
        self._database.close()
        if finished:
            with disk_errors(self._path.parent):
                fsync(self._path.parent)

    # ── the database's own thread ─────────────────────────────────────────────────────────────────────────────────

    def _call(self, work: Callable[[], T]) -> T:
        """What `work` returns, after everything that was put before it is committed."""
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
            while self._endings:  # those put before the call, and what has come since
                self._commit(self._taken())
            self._write_notes()
            call()

    def _next_call(self) -> Callable[[], None]:
        """The next call; until there is one, endings are committed as soon as the last commit has ended."""
        while self._calls.empty():
            if self._endings:
                self._commit(self._taken())
                continue
            self._idle = True  # before the last look: what is put after it wakes this thread
            if not self._endings:
                break
            self._idle = False
        return self._calls.get()

    def _taken(self) -> list[Ending]:
        count = min(len(self._endings), MAX_GROUP)
        return [self._endings.popleft() for _ in range(count)]

    def _write_notes(self) -> None:
        """To be called when the endings to be written next are known: what was noted before one of them goes first."""
        notes = dict(self._notes.popleft() for _ in range(len(self._notes)))
        if notes and self._failed is None:
            try:
                self._replace("manifest", list(notes.items()))
            except BatchrunError as error:
                self._fail(error)

    def _stop(self) -> None:
        self._closing = True

    def _commit(self, endings: list[Ending]) -> None:
        self._write_notes()
        if not endings or self.broken:
            return  # the slots keep the names
        if self._failed is None:
            try:
                self.spent = self._write(endings, self.invocation)
                self._on_durable(endings)
                return
            except BatchrunError as error:
                self._fail(error)
            except Exception as error:  # a value that SQLite has no place for: stop, but never hang those who wait
                self.broken = True
                self._fail(BatchrunError(f"{self._path}: can't keep an answer ({type(error).__name__}: {error})"))
                return
        self._spill_over(endings)

    def _spill_over(self, endings: list[Ending]) -> None:
        """The endings are durable beside the database that failed."""
        try:
            spill.append(self._spill, endings, self.invocation)
        except BatchrunError as error:
            self.broken = True
            self._on_failure(error)
            return
        doubts = [entry for ending in endings if (entry := doubt(ending, self.invocation)) is not None]
        self.spent = with_possibly_billed(fold(self.spent, endings, self.invocation), doubts)
        self._on_durable(endings)

    def _take_in_spilled(self) -> None:
        """What an earlier start spilled is in the database. A commit that failed may have arrived after all, so each
        ending is looked for first; and so this can be repeated.
        """
        frames = list(spill.read(self._spill))
        for frame in frames:
            completions = [c for c in frame.completions if not self._has_end(c.row, c.attempts)]
            discarded = [d for d in frame.discarded if not self._has_end(d.row, d.n)]
            self.spent = self._write([*completions, *discarded], frame.invocation)
        if self._spill.exists():  # without a whole frame, too: what is torn must not stand before a later frame
            with disk_errors(self._spill):
                self._spill.unlink()
                fsync(self._path.parent)

    def _fail(self, error: BatchrunError) -> None:
        if self._failed is None:
            self._failed = error
            self._on_failure(error)

    def _write(self, endings: Sequence[Ending], invocation: int) -> Totals:
        """One commit: rows, attempts, doubts and the totals that count them stand or fall together."""
        completions = [ending for ending in endings if isinstance(ending, Completion)]
        discarded = [ending for ending in endings if isinstance(ending, Discarded)]
        doubts = [entry for ending in endings if (entry := doubt(ending, invocation)) is not None]
        spent = fold(self.spent, endings, invocation, self._before([completion.row for completion in completions]))

        def write() -> None:
            self._database.insert("rows", [db_tables.completion_record(completion) for completion in completions])
            self._database.insert(
                "attempts", [db_tables.discarded_record(attempt, invocation) for attempt in discarded]
            )
            self._database.insert("possibly_billed", [db_tables.possibly_billed_record(doubt) for doubt in doubts])
            self._write_totals(spent)
            if spent.unstated is not self.spent.unstated:
                self._database.replace("manifest", [(UNSTATED, msgspec.json.encode(spent.unstated).decode())])
            if completions:
                self._stand(spent)
            known = self.spent.answered_as.items()
            self._database.replace("answered_as", [item for item in spent.answered_as.items() if item not in known])

        self._database.transaction(write)
        return with_possibly_billed(spent, doubts)

    def _make_room(self, full: DiskError) -> bool:
        """The reserve is given back, so that what is in flight may still land; the run hears that it must end."""
        freed = self._free_reserve()
        if freed:
            self._on_failure(full)
        return freed

    def _account(self, work: Callable[[], Totals]) -> None:
        """`work` is durable, and the account is what it returns."""
        account = self.spent

        def transact() -> None:
            nonlocal account
            account = work()

        self._database.transaction(transact)
        self.spent = account

    def _stand(self, spent: Totals) -> Totals:
        """How the account's rows stand is in the database, once the transaction at hand commits."""
        self._database.replace("standing", list(spent.standing.items()))
        known = self.spent.replaced
        changed = [line for key, line in spent.replaced.items() if known.get(key) is not line]
        self._revision += bool(changed)
        self._database.replace("replaced", [db_tables.replaced_record(line, self._revision) for line in changed])
        return spent

    def _write_totals(self, spent: Totals) -> None:
        """The lines that the account has anew are in the database, once the transaction at hand commits."""
        known = self.spent.totals
        changed = [line for key, line in spent.totals.items() if known.get(key) is not line]
        self._database.replace("totals", [db_tables.totals_record(line) for line in changed])

    def _before(self, rows: Sequence[int]) -> dict[int, TotalsLine]:
        """For those rows that had a record before: what its answer alone used and cost."""
        if not self._reopened:
            return {}
        again: list[Reopened] = []
        for group in _groups(rows):
            found = self._database.records("reopened", _among(group), group)
            again += [Reopened(*record) for record in found]
        return {each.row: each.line for each in again}

    def _none_pending_again(self) -> Totals:
        """The account as if no row were reopened: each that is still pending has its old record."""
        records = self._database.records("reopened", "WHERE row NOT IN (SELECT row FROM rows)")
        return with_changes(self.spent, (settled_still(Reopened(*record).line) for record in records))

    def _replace(self, table: str, records: Sequence[Record]) -> None:
        self._database.transaction(lambda: self._database.replace(table, records))

    def _between(self, table: str, first_row: int, end_row: int) -> Iterator[Record]:
        return self._database.records(table, "WHERE row >= ? AND row < ? ORDER BY 1, 2", (first_row, end_row))

    def _read_spent(self, unstated: Unstated) -> Totals:
        lines = [db_tables.totals_line(record) for record in self._database.records("totals")]
        changes = [db_tables.replaced_line(record) for record in self._database.records("replaced")]
        doubts = self._database.records("possibly_billed", "ORDER BY rowid")
        spent = Totals(
            totals={line.key: line for line in lines},
            replaced={line.key: line for line in changes},
            standing=dict(self._database.records("standing")),
            answered_as=dict(self._database.records("answered_as")),
            unstated=unstated,
        )
        return with_possibly_billed(spent, [db_tables.possibly_billed(record) for record in doubts])


def _groups(rows: Collection[int]) -> Iterator[list[int]]:
    """The rows in as many as one statement takes."""
    left = list(rows)
    for start in range(0, len(left), MAX_PARAMETERS):
        yield left[start : start + MAX_PARAMETERS]


def _among(rows: Sequence[int]) -> str:
    """The clause of a statement that is about these rows."""
    return f"WHERE row IN ({','.join('?' * len(rows))})"


def _nothing() -> None:
    """What wakes the database's thread."""


def read_finished(path: Path) -> dict[str, str]:
    """The manifest of a run that nobody works on, read without touching any file."""
    with contextlib.closing(Database.open_resting(path, db_tables.TABLES, FORMAT)) as database:
        return dict(database.records("manifest"))
