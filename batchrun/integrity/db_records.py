"""Everything in a run's database, read without changing it: from the intact file, or as far as a damaged one allows.

The intact file is read through a private copy (`store.at_rest`).
"""

import contextlib
import re
from pathlib import Path

import msgspec

from batchrun.durable import disk_errors
from batchrun.integrity import damaged_db
from batchrun.integrity.damaged_db import FRAME_HEADER_BYTES, LOG_HEADER_BYTES
from batchrun.records import FAILURES, CompletionRecord, PossiblyBilled
from batchrun.store import db_tables
from batchrun.store.at_rest import private_copy, wal_of
from batchrun.store.checkpoint import FORMAT
from batchrun.store.database import Database, Record
from batchrun.store.db_tables import Chunk, Reopened
from batchrun.store.ledger import SINCE, read_totals, with_uncounted
from batchrun.store.totals import Totals, Unstated
from batchrun.store.wal import PAGE_BYTES

SALVAGED = "salvaged"
"""The manifest's entry of a salvaged run, whose bill may include answers that were lost."""


class DbRecords(msgspec.Struct, frozen=True):
    """The database's records as values. `records` counts them; `whole` is False if the database is damaged.

    `torn`: the log's last commit can't be read. `attempts` and `possibly_billed` before the invocation `since` are
    about other rows: the input got a new layout then.
    """

    manifest: dict[str, str]
    invocations: list[Record]
    chunks: list[Chunk]
    rows: dict[int, CompletionRecord]
    attempts: list[Record]
    possibly_billed: list[PossiblyBilled]
    totals: Totals
    reopened: dict[int, Reopened]
    records: int
    whole: bool
    torn: bool = False

    @property
    def since(self) -> int:
        """The invocation from which on the rows have their present numbers."""
        return int(self.manifest.get(SINCE, "0"))


def read(path: Path) -> DbRecords:
    """The records of the database at `path`.

    Raises:
        CheckpointError: gone, empty, damaged, or of another version.
    """
    with private_copy(path) as copy:
        log = wal_of(copy).read_bytes() if wal_of(copy).exists() else b""
        with contextlib.closing(Database.open(copy, db_tables.TABLES, FORMAT, lambda full: False)) as database:
            known = _as_values({name: list(database.records(name)) for name in _TABLES}, whole=True)
            ((_, frames, _),) = database.query("PRAGMA wal_checkpoint")
    # A commit of this round after the frames that SQLite could read: its frames have the log's salts.
    starts = range(LOG_HEADER_BYTES, len(log), FRAME_HEADER_BYTES + PAGE_BYTES)[max(frames, 0) :]
    torn = any(any(log[start + 4 : start + 8]) and log[start + 8 : start + 16] == log[16:24] for start in starts)
    return msgspec.structs.replace(known, torn=torn)


def readable(path: Path) -> DbRecords:
    """The readable records of a damaged database at `path`: the newest version of each."""
    with disk_errors(path):
        database, log = (file.read_bytes() if file.exists() else b"" for file in (path, wal_of(path)))
    found: dict[str, dict[Record, Record]] = {name: {} for name in _TABLES}
    for name, record in damaged_db.records(database, log, db_tables.TABLES, FORMAT):
        key = _key(name, record)
        found[name][key] = _newer(name, record, found[name].get(key, record))
    return _as_values({name: list(records.values()) for name, records in found.items()}, whole=False)


_TABLES = tuple(re.findall(r"CREATE TABLE (\w+)", db_tables.TABLES))


def _as_values(records: dict[str, list[Record]], *, whole: bool) -> DbRecords:
    stored = with_uncounted(read_totals(records.__getitem__, Unstated()), records.__getitem__)
    return DbRecords(
        manifest=dict(records["manifest"]),
        invocations=sorted(records["invocations"]),
        chunks=sorted((Chunk(*record) for record in records["chunks"]), key=lambda chunk: chunk.chunk),
        rows={record[0]: db_tables.completion(record) for record in records["rows"]},
        attempts=records["attempts"],
        possibly_billed=[db_tables.possibly_billed(record) for record in records["possibly_billed"]],
        totals=stored,
        reopened={record[0]: Reopened(*record) for record in records["reopened"]},
        records=sum(map(len, records.values())),
        whole=whole,
    )


def _key(name: str, record: Record) -> Record:
    """The key that all versions of a record share."""
    match name:
        case "attempts":
            return (*record[:2], record[-1])
        case "totals" | "replaced":
            return record[:5]
        case "possibly_billed":
            return record
        case _:
            return record[:1]


def _newer(name: str, one: Record, other: Record) -> Record:
    """The newer of two versions of a record; `one` was read later, from the newer view."""
    match name:
        case "totals":  # a line only grows, in rows or in attempts
            return max(other, one, key=lambda record: record[5] + record[6])
        case "replaced":
            return max(other, one, key=lambda record: record[-1])
        case "chunks":
            return max(one, other, key=lambda record: record[5])
        case "rows":
            completions = (db_tables.completion(one), db_tables.completion(other))
            ranks = [rank(completion.status, completion.attempts) for completion in completions]
            return one if ranks[0] >= ranks[1] else other
        case "manifest":  # variants are only added
            return max(one, other, key=lambda record: len(record[1]))
        case _:
            return one


def rank(status: str, attempts: int) -> tuple[bool, int]:
    """Sorts a row's records: an answer after a failure, then the later attempt."""
    return status not in FAILURES, attempts
