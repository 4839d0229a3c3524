"""Reads what SQLite can still read of a damaged checkpoint. Every record is checked by its CRC.

Two views are read, the older one first: the database file alone, and the file with all pages of its log applied.
(SQLite drops whatever follows the first wrong frame of a log.) The first page comes from a new database: tables are
created in one order, so their root pages are always the same, and a damaged header or schema costs nothing.
In each table, ranges of keys that raise are halved until only the damaged pages are left out.
"""

import contextlib
import sqlite3
import tempfile
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from batchrun.store.database import Database, Record, crc_of
from batchrun.store.wal import PAGE_BYTES

LOG_HEADER_BYTES, FRAME_HEADER_BYTES = 32, 24
"""Of a log and of each page in it (sqlite.org, "WAL-mode File Format")."""

MOST_KEYS = 1 << 24
"""Keys are searched up to here if the largest one can't be read."""

MOST_FAILURES = 20_000
"""Ranges that may raise in one table: a few seconds."""

READ_AS_PLAIN = b"\x01\x01"
"""Bytes 18 and 19 of the first page: the file is not in WAL mode, so SQLite looks for no log."""


def records(database: bytes, log: bytes, tables: str, version: int) -> Iterator[tuple[str, Record]]:
    """Every intact record as (table, fields without the CRC). A record may come twice, its newer version later."""
    with tempfile.TemporaryDirectory(prefix="batchrun-") as folder:
        new = _new(Path(folder) / "new.db", tables, version)
        path = Path(folder) / "view.db"
        for view in _views(database, log):
            path.write_bytes(new[:PAGE_BYTES] + view[PAGE_BYTES:] + new[max(len(view), PAGE_BYTES) :])
            with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro&immutable=1", uri=True)) as connection:
                for table, statement in connection.execute("SELECT name, sql FROM sqlite_master").fetchall():
                    _, first, kind, *_ = connection.execute(f"PRAGMA table_info({table})").fetchone()
                    key = first if kind == "INTEGER" else None
                    if not statement.endswith("WITHOUT ROWID"):
                        key = "rowid"
                    for record in _read(connection, table, key):
                        if record[-1] == crc_of(record[:-1]):
                            yield table, record[:-1]


def _new(path: Path, tables: str, version: int) -> bytes:
    """A database with empty tables."""
    database = Database.open(path, tables, version, lambda full: False)
    database.leave_wal()
    database.close()
    content = bytearray(path.read_bytes())
    content[18:20] = READ_AS_PLAIN
    content[28:32] = bytes(4)  # the size in pages: 0 is not valid, so SQLite takes the file's own
    return bytes(content)


def _views(database: bytes, log: bytes) -> Iterator[bytes]:
    yield database
    starts = range(LOG_HEADER_BYTES, len(log) - FRAME_HEADER_BYTES, FRAME_HEADER_BYTES + PAGE_BYTES)
    salts = [log[start + 8 : start + 16] for start in starts]  # frames of an earlier round have others
    if not salts:
        return
    current = log[16:24] if log[16:24] in salts else salts[0]
    pages, most = bytearray(database), len(database) // PAGE_BYTES + len(salts)
    for start, salt in zip(starts, salts, strict=True):
        number = int.from_bytes(log[start : start + 4], "big")
        if salt == current and 0 < number <= most:
            content = log[start + FRAME_HEADER_BYTES : start + FRAME_HEADER_BYTES + PAGE_BYTES]
            pages.extend(bytes(max(0, number * PAGE_BYTES - len(pages))))
            pages[(number - 1) * PAGE_BYTES : (number - 1) * PAGE_BYTES + len(content)] = content
    yield bytes(pages)


def _read(connection: sqlite3.Connection, table: str, key: str | None) -> Iterator[Record]:
    """The table's readable records. `key`: the integer column by which its ranges are read, if it has one."""
    if key is None:  # a short table: both ends, up to the damage
        for order in ("", "ORDER BY 1 DESC"):
            with contextlib.suppress(sqlite3.Error):
                yield from connection.execute(f"SELECT * FROM {table} {order}")  # noqa: S608  (our own names)
        return
    try:
        ((last,),) = connection.execute(f"SELECT max({key}) FROM {table}")  # noqa: S608
    except sqlite3.Error:
        last = MOST_KEYS
    ranges, failures = deque([(0, (last or 0) + 1)]), 0
    while ranges and failures < MOST_FAILURES:
        low, end = ranges.popleft()
        found = low
        try:
            statement = f"SELECT {key}, * FROM {table} WHERE {key} >= ? AND {key} < ? ORDER BY {key}"  # noqa: S608
            for number, *record in connection.execute(statement, (low, end)):
                found = number
                yield tuple(record)
        except sqlite3.Error:
            failures += 1
            low = max(low, found)
            if end - low > 1:
                middle = (low + end) // 2
                ranges += ((low, middle), (middle, end))
