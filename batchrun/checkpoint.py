"""What is known of a run, in SQLite: manifest, chunks, settled rows, attempts, totals. Sole importer of sqlite3.

One thread owns the database. Endings of attempts are handed to it by `put` and committed in groups: whatever is pending
when the last commit has ended goes into the next (no timer), each table with one multi-row INSERT. `executemany` would
hand the interpreter's lock back and forth once a row (measured beside a busy event loop: 75 ms a commit).

Every record carries a CRC-32 of all its fields: SQLite does not notice a flipped bit in a payload, we must.
"""

import queue
import sqlite3
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

import msgspec

from batchrun import tables
from batchrun.durable import fsync
from batchrun.errors import BatchrunError, CheckpointError, DiskError
from batchrun.records import Completion, Discarded, Ending, PossiblyBilled
from batchrun.spent import Spent, doubt, fold, with_possibly_billed
from batchrun.tables import Chunk, Record

FORMAT = 1
"""`PRAGMA user_version`. Another number is another version's run directory: exit 7."""

MAX_GROUP = 1000
"""Endings a commit: SQLite takes 32,766 parameters in one statement, and a row has fewer than 24."""

Field = int | float | str | bytes | None
T = TypeVar("T")


class Checkpoint:
    """An open checkpoint. Close it."""

    def __init__(self, path: Path, *, free_reserve: Callable[[], bool]) -> None:
        """`free_reserve` makes room on a full disk, once, and says whether it did.

        Raises:
            CheckpointError: damaged, or of another version.
            DiskError: the file can't be opened or made.
        """
        self._path = path
        self._free_reserve = free_reserve
        self._on_durable: Callable[[Sequence[Ending]], None] = lambda endings: None
        self._on_failure: Callable[[BatchrunError], None] = lambda error: None
        self._queue: queue.SimpleQueue[Ending | Callable[[], None]] = queue.SimpleQueue()
        self._failed: BatchrunError | None = None
        self._closing = False
        self.invocation = 0
        self.spent = Spent()
        self._database = _connect(path)
        self._thread = threading.Thread(target=self._serve, name="checkpoint", daemon=True)
        try:
            self._load()
        except BaseException:
            self._database.close()
            raise
        self._thread.start()

    # ── what any thread may call ──────────────────────────────────────────────────────────────────────────────────

    def listen(
        self, on_durable: Callable[[Sequence[Ending]], None], on_failure: Callable[[BatchrunError], None]
    ) -> None:
        """From now on each commit's endings go to `on_durable`, and the first failure to `on_failure`.

        Both are called in the database's own thread. After a failure nothing more is written.
        """
        self._on_durable, self._on_failure = on_durable, on_failure

    @property
    def broken(self) -> bool:
        """True after a failure. A failed file is never written again: its next fsync may lie."""
        return self._failed is not None

    def put(self, ending: Ending) -> None:
        """The ending is on its way to the disk; `on_durable` names it when it is there."""
        self._queue.put(ending)

    def manifest(self) -> dict[str, str]:
        """The run's fixed facts, by name."""
        return dict(self._call(lambda: [record[:2] for record in self._checked("manifest", "name, value")]))

    def write_manifest(self, facts: dict[str, str]) -> None:
        """The facts are durable, each replacing one of the same name."""
        self._call(lambda: self._transaction(lambda: self._replace("manifest", list(facts.items()))))

    def begin_invocation(self, started_at: float, pid: int, host: str, version: str) -> int:
        """This process's number among those that worked on the run, from 1."""

        def begin() -> int:
            number = self._database.execute("SELECT coalesce(max(invocation), 0) + 1 FROM invocations").fetchone()[0]
            self._transaction(lambda: self._replace("invocations", [(number, started_at, pid, host, version)]))
            return int(number)

        self.invocation = self._call(begin)
        return self.invocation

    def chunks(self) -> list[Chunk]:
        """All chunks that were ever opened, in order."""
        return self._call(lambda: [Chunk(*record) for record in self._checked("chunks", "*", "ORDER BY chunk")])

    def open_chunk(self, chunk: Chunk) -> None:
        """The chunk is on record; its input is on disk already."""
        self._call(lambda: self._transaction(lambda: self._replace("chunks", [msgspec.structs.astuple(chunk)])))

    def seal_chunk(self, chunk: Chunk) -> None:
        """The chunk's part, on disk already, takes the place of its rows here: one transaction."""

        def seal() -> None:
            self._replace("chunks", [msgspec.structs.astuple(chunk)])
            self._database.execute("DELETE FROM rows WHERE row >= ? AND row < ?", (chunk.first_row, chunk.end_row))

        self._call(lambda: self._transaction(seal))

    def settled_rows(self, chunk: Chunk) -> set[int]:
        """The rows of an open chunk that have their completion."""
        between = "WHERE row >= ? AND row < ?"
        return self._call(
            lambda: {record[0] for record in self._checked("rows", "*", between, (chunk.first_row, chunk.end_row))}
        )

    def completions(self, first_row: int, end_row: int) -> list[Completion]:
        """The completions of rows `first_row` to `end_row` - 1, in order; their usage is in their `raw`."""
        between = "WHERE row >= ? AND row < ? ORDER BY row"
        return self._call(
            lambda: [tables.completion(record) for record in self._checked("rows", "*", between, (first_row, end_row))]
        )

    def discarded(self, chunk: Chunk) -> list[Discarded]:
        """The earlier attempts of a chunk's rows, in order."""
        between = "WHERE row >= ? AND row < ? ORDER BY row, n"
        return self._call(
            lambda: [
                tables.discarded(record)
                for record in self._checked("attempts", "*", between, (chunk.first_row, chunk.end_row))
            ]
        )

    def has_end(self, row: int, n: int) -> bool:
        """True when that attempt's end is on record, or that it has none."""

        def find() -> bool:
            settled = self._database.execute("SELECT 1 FROM rows WHERE row = ? AND attempts >= ?", (row, n))
            dropped = self._database.execute("SELECT 1 FROM attempts WHERE row = ? AND n = ?", (row, n))
            sealed = self._database.execute(
                "SELECT 1 FROM chunks WHERE first_row <= ? AND first_row + rows > ? AND generation > 0", (row, row)
            )
            named = self._database.execute("SELECT 1 FROM possibly_billed WHERE row = ? AND n = ?", (row, n))
            return any(cursor.fetchone() is not None for cursor in (settled, dropped, sealed, named))

        return self._call(find)

    def last_attempts_lost(self, chunk: Chunk) -> dict[int, int]:
        """For the rows of a chunk: the number of the last attempt whose end nobody knows."""
        query = "SELECT row, max(n) FROM possibly_billed WHERE row >= ? AND row < ? GROUP BY row"
        return self._call(lambda: dict(self._database.execute(query, (chunk.first_row, chunk.end_row)).fetchall()))

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
            self._insert("possibly_billed", [tables.possibly_billed_record(entry) for entry in entries])

        def call() -> None:
            self._transaction(name)
            self.spent = with_possibly_billed(self.spent, entries)

        self._call(call)

    def close(self, *, finished: bool = False) -> None:
        """Everything put before is committed and the file closed.

        A finished run's database leaves WAL mode, so that looking at it later touches no file.
        """
        if self._thread.is_alive():
            if finished:
                self._call(lambda: self._database.execute("PRAGMA journal_mode = DELETE").fetchone())
            self._queue.put(self._stop)
            self._thread.join()
        self._database.close()
        if finished:
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
            except sqlite3.Error as error:
                self._fail(self._translated(error))
                future.set_exception(self._translated(error))
            except BaseException as error:
                future.set_exception(error)

        self._queue.put(run)
        return future.result()

    def _serve(self) -> None:
        while not self._closing:
            item: Ending | Callable[[], None] | None = self._queue.get()
            endings: list[Ending] = []
            while isinstance(item, Ending):
                endings.append(item)
                item = None if self._queue.empty() or len(endings) == MAX_GROUP else self._queue.get()
            self._commit(endings)
            if item is not None:
                item()

    def _stop(self) -> None:
        self._closing = True

    def _commit(self, endings: list[Ending]) -> None:
        if not endings or self._failed is not None:
            return  # the slots keep the names
        try:
            spent = self._write(endings)
        except sqlite3.Error as error:
            if not (_is_full(error) and self._free_reserve()):
                self._fail(self._translated(error))
                return
            try:
                spent = self._write(endings)
            except sqlite3.Error as again:
                self._fail(self._translated(again))
                return
            self._on_failure(self._translated(error))  # what is in flight may still land in the room that was freed
        self.spent = spent
        self._on_durable(endings)

    def _fail(self, error: BatchrunError) -> None:
        if self._failed is None:
            self._failed = error
            self._on_failure(error)

    def _translated(self, error: sqlite3.Error) -> BatchrunError:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
        if code == sqlite3.SQLITE_FULL:
            return DiskError(f"{self._path}: the disk is full; make room and run the same command again")
        if code in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
            return DiskError(
                f"{self._path}: the disk refused a write ({error}); mend it and run the same command again"
            )
        return CheckpointError(f"{self._path}: damaged ({error}); keep a copy of this directory before anything else")

    def _write(self, endings: Sequence[Ending]) -> Spent:
        """One commit: rows, attempts, doubts and the totals that count them stand or fall together."""
        completions = [ending for ending in endings if isinstance(ending, Completion)]
        discarded = [ending for ending in endings if isinstance(ending, Discarded)]
        doubts = [entry for ending in endings if (entry := doubt(ending, self.invocation)) is not None]
        spent = fold(self.spent, endings, self.invocation)
        changed = [line for key, line in spent.totals.items() if self.spent.totals.get(key) is not line]

        def write() -> None:
            self._insert("rows", [tables.completion_record(completion) for completion in completions])
            self._insert("attempts", [tables.discarded_record(attempt) for attempt in discarded])
            self._insert("possibly_billed", [tables.possibly_billed_record(doubt) for doubt in doubts])
            self._replace("totals", [tables.totals_record(line) for line in changed])
            if spent.answered_as is not self.spent.answered_as:
                self._replace("answered_as", list(spent.answered_as.items()))

        self._transaction(write)
        return with_possibly_billed(spent, doubts)

    def _transaction(self, work: Callable[[], None]) -> None:
        self._database.execute("BEGIN IMMEDIATE")
        try:
            work()
            self._database.execute("COMMIT")
        except BaseException:
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")
            raise

    def _insert(self, table: str, records: Sequence[Record], verb: str = "INSERT") -> None:
        if not records:
            return
        width = len(records[0]) + 1
        values = ",".join([f"({','.join('?' * width)})"] * len(records))
        parameters: list[Field] = []
        for record in records:
            parameters.extend(record)
            parameters.append(_crc(record))
        self._database.execute(f"{verb} INTO {table} VALUES {values}", parameters)

    def _replace(self, table: str, records: Sequence[Record]) -> None:
        self._insert(table, records, "INSERT OR REPLACE")

    def _checked(
        self, table: str, columns: str, clause: str = "", parameters: Iterable[Field] = ()
    ) -> Iterator[Record]:
        """The table's records without their CRC, each held against it."""
        chosen = columns if columns == "*" else f"{columns}, crc"
        statement = f"SELECT {chosen} FROM {table} {clause}"  # noqa: S608  (our own names)
        for record in self._database.execute(statement, tuple(parameters)):
            if record[-1] != _crc(record[:-1]):
                raise CheckpointError(
                    f"{self._path}: damaged: table {table}, record {record[0]!r} does not match its checksum; "
                    "keep a copy of this directory before anything else"
                )
            yield record[:-1]

    def _load(self) -> None:
        """A new file gets its tables; an old one is checked, and what was spent is read."""
        try:
            version = self._database.execute("PRAGMA user_version").fetchone()[0]
            if version == 0 and self._database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0:
                self._database.executescript(f"BEGIN; {tables.TABLES} PRAGMA user_version = {FORMAT}; COMMIT;")
                fsync(self._path.parent)
                return
            if version != FORMAT:
                raise CheckpointError(
                    f"{self._path}: of another version of batchrun (format {version}, this one reads {FORMAT}); "
                    "finish the run with that version, or start another with --new"
                )
            if (found := self._database.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
                raise CheckpointError(f"{self._path}: damaged ({found}); keep a copy of this directory")
            self.spent = self._read_spent()
        except sqlite3.Error as error:
            raise self._translated(error) from error

    def _read_spent(self) -> Spent:
        lines = [tables.totals_line(record) for record in self._checked("totals", "*")]
        doubts = [tables.possibly_billed(record) for record in self._checked("possibly_billed", "*", "ORDER BY rowid")]
        spent = Spent(
            totals={(line.invocation, line.model, line.status): line for line in lines},
            answered_as=dict(self._checked("answered_as", "*")),
        )
        return with_possibly_billed(spent, doubts)


def read_finished(path: Path) -> dict[str, str]:
    """The manifest of a run that nobody works on, read without touching any file."""
    try:
        database = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro&immutable=1", uri=True)
        try:
            return dict(database.execute("SELECT name, value FROM manifest").fetchall())
        finally:
            database.close()
    except sqlite3.Error as error:
        raise CheckpointError(f"{path}: can't be read: {error}") from error


def _connect(path: Path) -> sqlite3.Connection:
    try:
        database = sqlite3.connect(path, isolation_level=None, check_same_thread=False, cached_statements=256)
        path.chmod(0o600)
        for pragma in ("locking_mode = EXCLUSIVE", "journal_mode = WAL", "synchronous = FULL", "temp_store = MEMORY"):
            database.execute(f"PRAGMA {pragma}").fetchone()
    except (sqlite3.Error, OSError) as error:
        kind = DiskError if isinstance(error, OSError | sqlite3.OperationalError) else CheckpointError
        raise kind(f"{path}: can't open the checkpoint: {error}") from error
    return database


def _is_full(error: sqlite3.Error) -> bool:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL


def _crc(record: Record) -> int:
    return zlib.crc32(msgspec.msgpack.encode(record))
