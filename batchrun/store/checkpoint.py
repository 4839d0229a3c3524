"""The checkpoint of a run in SQLite: manifest, chunks, settled rows, attempts, totals.

Checkpoint ─┬─ Commits: the one thread that owns the database
            └─ Ledger: what a commit writes, and the totals
"""

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from types import MappingProxyType

import msgspec

from batchrun.durable import disk_errors, fsync
from batchrun.errors import BatchrunError, CheckpointError, DiskError
from batchrun.records import CompletionRecord, Discarded, Ending, PossiblyBilled
from batchrun.run_summary import TotalsLine
from batchrun.store import db_tables
from batchrun.store.commits import Commits, Listeners
from batchrun.store.database import Database, Record
from batchrun.store.db_tables import Chunk, Reopened
from batchrun.store.ledger import SINCE, Ledger, among, groups
from batchrun.store.totals import Totals, row_counts_again, with_carried, with_changes, with_reopened

FORMAT = 9
"""`PRAGMA user_version`. A run directory with another number is of another version: exit 7. A changed table, record or
output column needs a new number: this version can't resume a run whose records and parts lack it.
"""

REOPENED_AT_ONCE = 1000
"""Reopened rows in memory at a time."""


class Checkpoint:
    """An open checkpoint. Close it."""

    def __init__(self, path: Path, *, free_reserve: Callable[[], bool], quick: bool = False) -> None:
        """`free_reserve` frees space on a full disk, once, and returns whether it did. `quick`: the file is a private
        copy to read at once, and only the records that are read are checked.

        Raises:
            CheckpointError: damaged, or of another version.
            DiskError: the file can't be opened or created.
        """
        self._path = path
        self._listeners = listeners = Listeners()

        def make_room(full: DiskError) -> bool:
            """Frees the reserve on a full disk, so that requests in flight can still be stored, and ends the run."""
            freed = free_reserve()
            if freed:
                listeners.on_failure(full)
            return freed

        self._database = (
            Database.open_copy(path, FORMAT) if quick else Database.open(path, db_tables.TABLES, FORMAT, make_room)
        )
        self._ledger = Ledger(self._database)
        self._commits = Commits(path, self._ledger, listeners)

    def listen(
        self,
        on_commit: Callable[[Sequence[Ending]], None],
        on_failure: Callable[[BatchrunError], None],
        call_soon: Callable[[Callable[[], None]], object] = lambda call: call(),
    ) -> None:
        """From now on `on_commit` gets each commit's endings, and `on_failure` the first failure.

        Both are called in the database's own thread. After a failure the database is not written again, because its
        next fsync may wrongly report success. Endings that still arrive go to the spill file, and the next start
        reads them from there. `call_soon` is the event loop's whose thread puts endings: they share commits.
        """
        listeners = self._listeners
        listeners.on_commit, listeners.on_failure, listeners.call_soon = on_commit, on_failure, call_soon

    @property
    def totals(self) -> Totals:
        """The durable totals: a new object after each commit."""
        return self._ledger.totals

    @property
    def invocation(self) -> int:
        """This process's number among those that worked on the run; 0 before it has one."""
        return self._ledger.invocation

    @property
    def broken(self) -> bool:
        """True once the database and the spill file have both failed: nothing can be stored any more."""
        return self._commits.broken

    @property
    def failed(self) -> bool:
        """True once the database has refused a write."""
        return self._commits.failed

    def put(self, ending: Ending) -> None:
        """Queues the ending; `on_commit` gets it once it is durable."""
        self._commits.put(ending)

    def manifest_entries(self) -> dict[str, str]:
        """The entries of the manifest by name."""
        return dict(self._commits.call(lambda: list(self._database.records("manifest"))))

    def write_manifest(self, entries: dict[str, str]) -> None:
        """The entries are durable; each replaces one of the same name."""
        self._commits.call(lambda: self._ledger.write_entries(entries))

    def put_entry(self, name: str, value: str) -> None:
        """Queues a manifest entry; it is durable before any ending that is put later."""
        self._commits.put_entry(name, value)

    def start_invocation(self, started_at: float, pid: int, host: str, version: str) -> int:
        """This process's number among those that worked on the run, from 1."""
        return self._commits.call(lambda: self._ledger.start_invocation(started_at, pid, host, version))

    def last_invocation(self) -> int:
        """The number of the start that worked on the run last."""
        return self._commits.call(
            lambda: int(self._database.query("SELECT coalesce(max(invocation), 0) FROM invocations")[0][0])
        )

    def chunks(self) -> list[Chunk]:
        """All chunks that were ever opened, in order."""
        return self._commits.call(
            lambda: [Chunk(*record) for record in self._database.records("chunks", "ORDER BY chunk")]
        )

    def open_chunk(self, chunk: Chunk) -> None:
        """Adds the chunk; its input is on disk already."""
        record = msgspec.structs.astuple(chunk)
        self._commits.call(lambda: self._database.transaction(lambda: self._database.replace("chunks", [record])))

    def seal_chunk(
        self,
        chunk: Chunk,
        carried: Mapping[int, TotalsLine] = MappingProxyType({}),
        *,
        stored: int | None = None,
        keep: Collection[int] = (),
        drop: Collection[int] = (),
    ) -> None:
        """The chunk's part, on disk already, replaces its rows here, in one transaction.

        `carried` has its rows that took their answer without a request, as lines of the totals: they are settled now.
        Copies in later chunks need the records of the rows `keep`, and those of the rows `drop` no longer. `stored` is
        how many records of the chunk must be here; None: not known.

        Raises:
            CheckpointError: there is another number of them. Nothing is changed.
        """

        def seal() -> Totals:
            bounds = chunk.first_row, chunk.end_row
            totals = with_carried(self.totals, carried, self._ledger.earlier_answers(carried.keys()))
            self._database.replace("chunks", [msgspec.structs.astuple(chunk)])
            for rows in groups(keep):
                query = f"INSERT OR REPLACE INTO originals SELECT * FROM rows {among(rows)}"  # noqa: S608
                self._database.query(query, rows)
            for rows in groups(drop):
                self._database.query(f"DELETE FROM originals {among(rows)}", rows)  # noqa: S608
            self._database.query("DELETE FROM rows WHERE row >= ? AND row < ?", bounds)
            ((found,),) = self._database.query("SELECT changes()")
            if stored is not None and found != stored:
                raise CheckpointError(f"chunk {chunk.chunk}: rows are missing from the checkpoint")
            self._database.query("DELETE FROM reopened WHERE row >= ? AND row < ?", bounds)
            return totals

        self._commits.call(lambda: self._ledger.change(seal))

    def reopen_chunks(self, chunks: Sequence[Chunk], rows: Iterable[Reopened], entries: Mapping[str, str]) -> None:
        """The chunks are open again over their base parts and these rows of theirs pending, in one transaction.

        `entries` replace those of the same name in the manifest. The run is not finished any more. `rows` may be
        millions: a group of them is held at a time. On a full disk they are read again from the first one.
        """

        def reopen() -> Totals:
            totals, left = self.totals, iter(rows)
            self._database.replace("chunks", [msgspec.structs.astuple(chunk) for chunk in chunks])
            while group := list(islice(left, REOPENED_AT_ONCE)):
                self._database.insert("reopened", [msgspec.structs.astuple(row) for row in group])
                totals = with_reopened(totals, (row.line for row in group))
                self._ledger.has_reopened = True
            self._database.query("DELETE FROM manifest WHERE name = 'finished'")
            self._database.replace("manifest", list(entries.items()))
            return totals

        self._commits.call(lambda: self._ledger.change(reopen))

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
            return msgspec.structs.replace(totals, standing=dict(standing))

        self._commits.call(lambda: self._ledger.change(replace))
        self._ledger.since = self.invocation

    @property
    def has_reopened(self) -> bool:
        """True while settled rows are sent again."""
        return self._ledger.has_reopened

    def reopened(self, chunk: Chunk) -> dict[int, Reopened]:
        """The rows of a chunk's base part that are sent again."""
        bounds = chunk.first_row, chunk.end_row
        return self._commits.call(
            lambda: {record[0]: Reopened(*record) for record in self._between("reopened", *bounds)}
        )

    def settled_rows(self, chunk: Chunk) -> set[int]:
        """The rows of an open chunk that have their completion."""
        return self._commits.call(
            lambda: {record[0] for record in self._between("rows", chunk.first_row, chunk.end_row)}
        )

    def completions(self, first_row: int, end_row: int) -> list[CompletionRecord]:
        """The completions of rows `first_row` to `end_row` - 1, in order; their usage is in their `raw`."""
        return self._commits.call(
            lambda: [db_tables.completion(record) for record in self._between("rows", first_row, end_row)]
        )

    def rows_among(self, rows: Sequence[int]) -> set[int]:
        """Of these rows, those whose completion the database has."""

        def read() -> set[int]:
            found: set[int] = set()
            for group in groups(rows):
                query = f"SELECT row FROM rows {among(group)}"  # noqa: S608
                found |= {row for (row,) in self._database.query(query, group)}
            return found

        return self._commits.call(read)

    def records_of(self, rows: Sequence[int]) -> list[CompletionRecord]:
        """The completions of these rows that the database still has, in order of rows."""

        def read() -> list[CompletionRecord]:
            found: dict[int, CompletionRecord] = {}
            for table in ("originals", "rows"):  # the newer record is the one of an open chunk
                for group in groups(rows):
                    records = self._database.records(table, among(group), group)
                    found |= {record[0]: db_tables.completion(record) for record in records}
            return [found[row] for row in sorted(found)]

        return self._commits.call(read)

    def discarded(self, chunk: Chunk) -> list[Discarded]:
        """The earlier attempts of a chunk's rows, in order."""
        bounds = chunk.first_row, chunk.end_row

        def read() -> list[Discarded]:
            records = self._between("attempts", *bounds)
            return [db_tables.discarded(record) for record in records if record[-1] >= self._ledger.since]

        return self._commits.call(read)

    def has_end(self, row: int, n: int) -> bool:
        """True if the attempt's ending is stored, or the attempt is listed as possibly billed."""
        return self._commits.call(lambda: self._ledger.has_end(row, n))

    def last_lost_attempts(self, chunk: Chunk) -> dict[int, int]:
        """For the rows of a chunk: the number of the last attempt that is listed as possibly billed."""
        query = "SELECT row, max(n) FROM possibly_billed WHERE row >= ? AND row < ? AND invocation >= ? GROUP BY row"
        bounds = chunk.first_row, chunk.end_row, self._ledger.since
        return self._commits.call(lambda: dict(self._database.query(query, bounds)))

    def flushed(self) -> bool:
        """Waits until everything that was put before is durable; False if a failure prevented it."""
        try:
            self._commits.call(lambda: None)
        except BatchrunError:
            return False
        return True

    def add_possibly_billed(self, entries: Sequence[PossiblyBilled]) -> None:
        """The attempts are on the permanent list of possibly billed requests."""
        if entries:
            self._commits.call(lambda: self._ledger.add_possibly_billed(entries))

    def copy_to(self, path: Path) -> None:
        """A copy of the database with everything that was put before, in a file that must not exist."""
        self._commits.call(lambda: self._database.copy_to(path))

    def close(self, *, finished: bool = False) -> None:
        """Commits everything that was put before, and closes the file."""

        def leave() -> None:
            nonlocal finished
            self._ledger.save()
            finished = finished or "finished" in dict(self._database.records("manifest"))
            if finished:  # without a log beside it, the file can be read later without touching it
                self._database.leave_wal()

        self._commits.stop(leave)
        self._database.close()
        if finished:
            with disk_errors(self._path.parent):
                fsync(self._path.parent)

    def _between(self, table: str, first_row: int, end_row: int) -> Iterator[Record]:
        return self._database.records(table, "WHERE row >= ? AND row < ? ORDER BY 1, 2", (first_row, end_row))


def read_copy(path: Path) -> tuple[dict[str, str], list[Chunk]]:
    """The manifest entries and the chunks of a copy that `Checkpoint.copy_to` made."""
    with contextlib.closing(Database.open_read_only(path, db_tables.TABLES, FORMAT)) as database:
        chunks = [Chunk(*record) for record in database.records("chunks", "ORDER BY chunk")]
        return dict(database.records("manifest")), chunks


def write_new(path: Path, records: Mapping[str, Sequence[Record]]) -> None:
    """Makes a checkpoint of these records, by table, in one transaction."""
    with contextlib.closing(Database.open(path, db_tables.TABLES, FORMAT, lambda full: False)) as database:

        def insert() -> None:
            for name, lines in records.items():
                database.insert(name, lines)

        database.transaction(insert)


def read_finished(path: Path) -> dict[str, str]:
    """The manifest entries of a finished run, read without touching any file."""
    with contextlib.closing(Database.open_read_only(path, db_tables.TABLES, FORMAT)) as database:
        return dict(database.records("manifest"))
