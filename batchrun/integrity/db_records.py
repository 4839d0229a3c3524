"""All that a run's database says, read without touching it: from the sound file, or from what is left of a damaged one.

The sound file is read through a private copy (`checkpoint.at_rest`).
"""

import contextlib
from pathlib import Path

import msgspec

from batchrun.durable import disk_errors
from batchrun.integrity.page_carver import FRAME_HEADER_BYTES, LOG_HEADER_BYTES, carve, tables_of
from batchrun.records import FAILURES, Completion, PossiblyBilled, Status
from batchrun.store import db_tables
from batchrun.store.at_rest import log_of, private_copy
from batchrun.store.checkpoint import FORMAT, SINCE
from batchrun.store.database import Database, Record
from batchrun.store.db_tables import Chunk, Reopened
from batchrun.store.totals import Totals, with_possibly_billed
from batchrun.store.wal import PAGE_BYTES

SALVAGED = "salvaged"
"""The manifest's entry of a run that was salvaged: its bill may have answers that were lost."""


class DbRecords(msgspec.Struct, frozen=True):
    """The database's records as values. `records` counts them all; `whole` is False where they are what was left.

    `torn`: the log's last commit can't be read. `attempts` and doubts before the invocation `since` speak of other
    rows: those were laid out anew then.
    """

    manifest: dict[str, str]
    invocations: list[Record]
    chunks: list[Chunk]
    rows: dict[int, Completion]
    attempts: list[Record]
    possibly_billed: list[PossiblyBilled]
    spent: Totals
    reopened: dict[int, Reopened]
    records: int
    whole: bool
    torn: bool = False

    @property
    def since(self) -> int:
        """The invocation in which the rows were laid out as they are."""
        return int(self.manifest.get(SINCE, "0"))


def read(path: Path) -> DbRecords:
    """What the database at `path` says.

    Raises:
        CheckpointError: gone, empty, damaged, or of another version.
    """
    with private_copy(path) as copy:
        return _read(copy)


def left(path: Path) -> DbRecords:
    """What can still be found of a damaged database at `path`: of each record the newest version there is."""
    with disk_errors(path):
        database, log = (file.read_bytes() if file.exists() else b"" for file in (path, log_of(path)))
    found: dict[str, dict[Record, Record]] = {name: {} for name in _TABLES}
    for name, record in carve(database, log, db_tables.TABLES):
        if _fits(name, record):
            key = _key(name, record)
            found[name][key] = _newer(name, record, found[name].get(key, record))
    return _remains({name: list(records.values()) for name, records in found.items()}, whole=False)


_STATUSES = frozenset(map(str, Status))
_TABLES = tuple(table.name for table in tables_of(db_tables.TABLES))


def _read(path: Path) -> DbRecords:
    log = log_of(path).read_bytes() if log_of(path).exists() else b""
    with contextlib.closing(Database.open(path, db_tables.TABLES, FORMAT, lambda full: False)) as database:
        known = _remains({name: list(database.records(name)) for name in _TABLES}, whole=True)
        ((_, frames, _),) = database.query("PRAGMA wal_checkpoint")
    return msgspec.structs.replace(known, torn=_has_commit(log, frames))


def _has_commit(log: bytes, frames: int) -> bool:
    """Whether a commit of this round stands in the log behind so many frames, which SQLite could read."""
    salts = log[16:24]
    starts = range(LOG_HEADER_BYTES, len(log), FRAME_HEADER_BYTES + PAGE_BYTES)[max(frames, 0) :]
    return any(any(log[start + 4 : start + 8]) and log[start + 8 : start + 16] == salts for start in starts)


def _remains(records: dict[str, list[Record]], *, whole: bool) -> DbRecords:
    lines = [db_tables.totals_line(record) for record in records["totals"]]
    changes = [db_tables.replaced_line(record) for record in records["replaced"]]
    doubts = [db_tables.possibly_billed(record) for record in records["possibly_billed"]]
    spent = Totals(
        totals={line.key: line for line in lines},
        replaced={line.key: line for line in changes},
        standing=dict(records["standing"]),
        answered_as=dict(records["answered_as"]),
    )
    return DbRecords(
        manifest=dict(records["manifest"]),
        invocations=sorted(records["invocations"]),
        chunks=sorted((Chunk(*record) for record in records["chunks"]), key=lambda chunk: chunk.chunk),
        rows={record[0]: db_tables.completion(record) for record in records["rows"]},
        attempts=records["attempts"],
        possibly_billed=doubts,
        spent=with_possibly_billed(spent, doubts),
        reopened={record[0]: Reopened(*record) for record in records["reopened"]},
        records=sum(map(len, records.values())),
        whole=whole,
    )


def _key(name: str, record: Record) -> Record:
    """What tells a record of the table from others, whatever its version."""
    match name:
        case "attempts":
            return (*record[:2], record[-1])
        case "totals" | "replaced":
            return record[:4]
        case "possibly_billed":
            return record
        case _:
            return record[:1]


def _fits(name: str, record: Record) -> bool:
    """Whether the record can be of this table, where tables have the same shape."""
    match name:
        case "manifest":
            return isinstance(record[1], str)
        case "answered_as" | "standing":
            return isinstance(record[1], int) and (record[0] in _STATUSES) == (name == "standing")
        case "invocations" | "reopened":
            return isinstance(record[1], float) == (name == "invocations")
        case "totals" | "replaced" | "attempts":
            return isinstance(record[1], int) == (name == "attempts")
        case _:
            return True


def _newer(name: str, one: Record, other: Record) -> Record:
    """The newer of two versions of a record; `one` is of the later image of a page, which may be free."""
    match name:
        case "totals":  # a line only grows, in rows or in attempts
            return max(other, one, key=lambda record: record[4] + record[5])
        case "replaced":
            return max(other, one, key=lambda record: record[-1])
        case "chunks":
            return max(one, other, key=lambda record: record[5])
        case "rows":
            return max(one, other, key=_rank_of)
        case "manifest":  # variants are only added
            return max(one, other, key=lambda record: len(record[1]))
        case _:
            return one


def _rank_of(record: Record) -> tuple[bool, int]:
    completion = db_tables.completion(record)
    return rank(completion.status, completion.attempts)


def rank(status: str, attempts: int) -> tuple[bool, int]:
    """Which of a row's records stands: an answer before a failure, then the later one."""
    return status not in FAILURES, attempts
