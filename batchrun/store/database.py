"""A SQLite file whose records each end with a CRC-32, since SQLite does not notice a flipped bit in a value.

The only importer of sqlite3; its errors are raised as ours.
"""

import contextlib
import functools
import os
import sqlite3
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import msgspec

from batchrun.durable import FILE_SIZE_STEP, fsync, is_at_size_limit
from batchrun.errors import ANOTHER, BatchrunError, CheckpointError, DiskError, RunLockedError
from batchrun.store.wal import commits_dropped

MAX_PARAMETERS = 32_766
"""Most parameters in one SQLite statement (sqlite.org, "Implementation Limits")."""

BUSY_S = 1.0  # how long another program may read the file while a run starts
SHARED_BUSY_S = 30.0  # how long the transactions of other processes may take together

Field = int | float | str | bytes | bytearray | None
Record = tuple[Any, ...]


class Database:
    """An open file with its format in `PRAGMA user_version`. One thread at a time. Close it."""

    def __init__(self, path: Path, connection: sqlite3.Connection, make_room: Callable[[DiskError], bool]) -> None:
        self._path = path
        self._connection = connection
        self._make_room = make_room

    @classmethod
    def open(cls, path: Path, tables: str, version: int, make_room: Callable[[DiskError], bool]) -> Self:
        """Opens the file for this connection alone. A new file gets its tables, an old one is checked as a whole.

        `make_room` is called when the disk is full, and returns whether it freed space.

        Raises:
            CheckpointError: damaged, of another version, or open in another program.
            DiskError: the file can't be opened or created.
        """
        with _sqlite_errors(path):
            _require_whole(path.with_name(path.name + "-wal"))
            connection = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
            with _closed_on_error(connection):
                path.chmod(0o600)
                for pragma in ("locking_mode = EXCLUSIVE", "journal_mode = WAL", "synchronous = FULL"):
                    connection.execute(f"PRAGMA {pragma}").fetchone()
                connection.execute("PRAGMA temp_store = MEMORY")
                database = cls(path, connection, make_room)
                database._set_up(tables, version)
        return database

    @classmethod
    def open_shared(cls, path: Path, tables: str, version: int) -> Self:
        """The file at `path`, which other processes have open too; each transaction waits for theirs.

        It has a rollback journal, which is there only during a transaction: at rest there is one file.

        Raises:
            CheckpointError: damaged, of another version, or locked for longer than `SHARED_BUSY_S`.
            DiskError: the file can't be opened or made.
        """
        with _sqlite_errors(path):
            connection = sqlite3.connect(path, timeout=SHARED_BUSY_S, isolation_level=None, check_same_thread=False)
            with _closed_on_error(connection):
                path.chmod(0o600)
                connection.execute("PRAGMA synchronous = FULL")
                database = cls(path, connection, lambda error: False)
                database._set_up(tables, version)
        return database

    @classmethod
    def open_read_only(cls, path: Path, tables: str, version: int) -> Self:
        """Opens the file of a finished run without touching any file."""
        if not path.exists() or not path.stat().st_size:
            raise CheckpointError(
                f"{path}: missing or empty, though its run is complete; restore the file, or {ANOTHER}"
            )
        with _sqlite_errors(path):
            connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro&immutable=1", uri=True)
            database = cls(path, connection, lambda error: False)
            with _closed_on_error(connection):
                database._require(tables, version)
        return database

    @classmethod
    def open_copy(cls, path: Path, version: int) -> Self:
        """Opens a private copy, with its log, to read at once: only the records that are read are checked."""
        with _sqlite_errors(path):
            connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            database = cls(path, connection, lambda error: False)
            with _closed_on_error(connection):
                connection.execute("PRAGMA locking_mode = EXCLUSIVE").fetchone()
                database._require_version(version)
        return database

    def query(self, statement: str, parameters: Sequence[Field] = ()) -> list[Record]:
        """The statement's rows, without a check of their CRC."""
        try:
            return self._connection.execute(statement, parameters).fetchall()
        except _FAILURES as error:
            raise _as_ours(self._path, error) from error

    def records(self, table: str, clause: str = "", parameters: Sequence[Field] = ()) -> Iterator[Record]:
        """The table's records, each checked against its CRC, which is cut off."""
        with _sqlite_errors(self._path):
            statement = f"SELECT * FROM {table} {clause}"  # noqa: S608  (our own names)
            for record in self._connection.execute(statement, parameters):
                if record[-1] != crc_of(record[:-1]):
                    raise CheckpointError(
                        f"{self._path}: damaged: table {table}, record {record[0]!r} does not match its checksum; "
                        "keep a copy of this directory before anything else"
                    )
                yield record[:-1]

    def transaction(self, work: Callable[[], None]) -> None:
        """All of `work` is durable, or nothing of it. On a full disk it is tried again if space can be freed."""
        self._with_room(lambda: self._transact(work))

    def append(self, table: str, records: Sequence[Record]) -> None:
        """Inserts the records, which fit one statement, and they are durable: it is a transaction of its own.

        Without BEGIN and COMMIT, each of which hands over the interpreter's lock twice (docs/benchmarks.md).
        """
        self._with_room(lambda: self.insert(table, records))

    def insert(self, table: str, records: Sequence[Record], verb: str = "INSERT") -> None:
        """Inserts the records, with as few statements as possible."""
        # `executemany` releases and takes the interpreter's lock for each record: beside a busy event loop a commit
        # took 75 ms (measured)
        width = len(records[0]) + 1 if records else 1
        for start in range(0, len(records), MAX_PARAMETERS // width):
            group = records[start : start + MAX_PARAMETERS // width]
            parameters: list[Field] = []
            for record in group:
                parameters += record
                parameters.append(crc_of(record))
            self.query(_insertion(verb, table, width, len(group)), parameters)

    def replace(self, table: str, records: Sequence[Record]) -> None:
        """Inserts the records; each replaces one with the same key."""
        self.insert(table, records, "INSERT OR REPLACE")

    def leave_wal(self) -> None:
        """Everything is in the one file, so that `open_read_only` can read it."""
        self.query("PRAGMA journal_mode = DELETE")

    def copy_to(self, path: Path) -> None:
        """A copy of the database as of now, without free pages, in a file that must not exist."""
        with _sqlite_errors(path):
            self._connection.execute("VACUUM INTO CAST(? AS TEXT)", (os.fsencode(path),))

    def close(self) -> None:
        self._connection.close()

    def _with_room(self, write: Callable[[], None]) -> None:
        """Calls `write`; on a full disk once more if space can be freed."""
        try:
            write()
        except DiskError as error:
            if not _is_full(error) or not self._make_room(error):
                raise
            write()

    def _transact(self, work: Callable[[], None]) -> None:
        self.query("BEGIN IMMEDIATE")
        try:
            work()
            self.query("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self.query("ROLLBACK")
            raise

    def _set_up(self, tables: str, version: int) -> None:
        """Creates the tables of a new file; checks those of an old one."""

        def create() -> None:
            if not self.query("SELECT 1 FROM sqlite_master"):  # read again: another process may be first
                for statement in (*tables.split(";"), f"PRAGMA user_version = {version}"):
                    self.query(statement)

        if not self.query("SELECT 1 FROM sqlite_master"):
            self._transact(create)
            fsync(self._path.parent)
        self._require(tables, version)

    def _require(self, tables: str, version: int) -> None:
        """The file is of this version, and all its pages and records are intact."""
        self._require_version(version)
        ((state,),) = self.query("PRAGMA quick_check(1)")
        if state != "ok":
            raise CheckpointError(f"{self._path}: damaged ({state}); keep a copy of this directory")
        found_tables: dict[str, object] = dict(self.query("SELECT name, sql FROM sqlite_master WHERE type = 'table'"))
        if set(found_tables.values()) != {statement.strip() for statement in tables.split(";")} - {""}:
            raise CheckpointError(f"{self._path}: damaged (its schema); keep a copy of this directory")
        for table in found_tables:
            deque(self.records(table), maxlen=0)  # a record whose key is damaged would not be found by its key

    def _require_version(self, version: int) -> None:
        ((found,),) = self.query("PRAGMA user_version")
        if found != version:
            raise CheckpointError(
                f"{self._path}: of another version of batchrun (format {found}, this one reads {version}); "
                f"finish the run with that version, or {ANOTHER}"
            )


def _require_whole(log: Path) -> None:
    if log.exists() and (dropped := commits_dropped(log.read_bytes())) > 1:
        raise CheckpointError(
            f"{log}: damaged ({dropped} commits can't be read); keep a copy of this directory before anything else"
        )


@contextlib.contextmanager
def _closed_on_error(connection: sqlite3.Connection) -> Iterator[None]:
    """Closes the connection if the block, which sets it up, raises."""
    try:
        yield
    except BaseException:
        connection.close()
        raise


@contextlib.contextmanager
def _sqlite_errors(path: Path) -> Iterator[None]:
    """Raises errors of SQLite as ours, with `path` in the message."""
    try:
        yield
    except _FAILURES as error:
        raise _as_ours(path, error) from error


@functools.lru_cache(maxsize=4096)
def _insertion(verb: str, table: str, width: int, records: int) -> str:
    fields = f"({','.join('?' * width)})"
    return f"{verb} INTO {table} VALUES {','.join([fields] * records)}"


_FAILURES = (sqlite3.Error, UnicodeDecodeError, OSError)
_REFUSALS = (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM)


def _as_ours(path: Path, error: sqlite3.Error | UnicodeDecodeError | OSError) -> BatchrunError:
    if isinstance(error, UnicodeDecodeError):  # raised by sqlite3 for a message that quotes damaged text
        return CheckpointError(f"{path}: damaged; keep a copy of this directory before anything else")
    if isinstance(error, OSError):
        return DiskError(f"{path}: can't be opened: {error.strerror}")
    match code := _code(error):
        case sqlite3.SQLITE_FULL:
            return DiskError(f"{path}: the disk is full; make room and run the same command again")
        case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
            return RunLockedError(f"{path}: another program has it open; close that one and run again")
        case sqlite3.SQLITE_IOERR if is_at_size_limit(path, path.with_name(f"{path.name}-wal")):
            return DiskError(f"{path}: has the largest size that this process may write; {FILE_SIZE_STEP}")
        case _ if code in _REFUSALS and not (code == sqlite3.SQLITE_READONLY and _says_read_only(path)):
            return DiskError(f"{path}: the disk refused a write ({error}); fix that and run the same command again")
        case _:
            return CheckpointError(f"{path}: damaged ({error}); keep a copy of this directory before anything else")


def _says_read_only(path: Path) -> bool:
    """Whether the file's header names a format that SQLite only reads. We never wrote one."""
    try:
        with path.open("rb") as file:
            return file.read(19)[18:] > b"\x02"  # the write version: sqlite.org/fileformat2.html
    except OSError:  # it was moved or deleted, which SQLite reports with the same code
        return False


def _is_full(error: DiskError) -> bool:
    return isinstance(error.__cause__, sqlite3.Error) and _code(error.__cause__) == sqlite3.SQLITE_FULL


def _code(error: sqlite3.Error) -> int:
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF


def crc_of(record: Record) -> int:
    """The CRC-32 of a record's fields, which is stored as its last one."""
    return zlib.crc32(_encode(record))


_encode = msgspec.msgpack.Encoder().encode
