"""The ledger of a run: the records of attempts in the database, and the totals that count them, in one transaction.

It belongs to the database's thread.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import msgspec

from batchrun.records import Completion, Discarded, Ending, PossiblyBilled
from batchrun.run_summary import TotalsLine
from batchrun.store import db_tables
from batchrun.store.database import MAX_PARAMETERS, Database
from batchrun.store.db_tables import Reopened
from batchrun.store.totals import (
    UNSTATED,
    Totals,
    Unstated,
    fold,
    possibly_billed,
    with_possibly_billed,
)

SINCE = "since"
"""The manifest entry with the invocation that made the present chunks. Attempts of earlier invocations are of other
rows."""


class Ledger:
    """`totals` is a new object after each change, so any thread may read it.

    `since` is the first invocation whose attempts are of the present rows, `invocation` this process's number.
    `has_reopened`: settled rows are sent again.
    """

    def __init__(self, database: Database) -> None:
        """Reads the totals.

        Raises:
            CheckpointError: a record is damaged.
        """
        self._database = database
        entries: dict[str, str] = dict(database.records("manifest"))
        self.since = int(entries.get(SINCE, "0"))
        self.invocation = 0
        self.has_reopened = bool(database.query("SELECT 1 FROM reopened LIMIT 1"))
        ((self._revision,),) = database.query("SELECT coalesce(max(revision), 0) FROM replaced")
        self.totals = _read_totals(database, msgspec.json.decode(entries.get(UNSTATED, "{}"), type=Unstated))

    def start_invocation(self, started_at: float, pid: int, host: str, version: str) -> int:
        """This process's number among those that worked on the run, from 1."""
        ((number,),) = self._database.query("SELECT coalesce(max(invocation), 0) + 1 FROM invocations")
        record = number, started_at, pid, host, version
        self._database.transaction(lambda: self._database.replace("invocations", [record]))
        self.invocation = int(number)
        return self.invocation

    def write_entries(self, entries: Mapping[str, str]) -> None:
        """The manifest entries are durable; each replaces one of the same name."""
        self._database.transaction(lambda: self._database.replace("manifest", list(entries.items())))

    def commit(self, endings: Sequence[Ending], invocation: int | None = None) -> None:
        """Rows, attempts, possibly billed requests, and the totals that count them are durable.

        `invocation` is that of the endings; None: this process's.
        """
        invocation = self.invocation if invocation is None else invocation
        completions = [ending for ending in endings if isinstance(ending, Completion)]
        discarded = [ending for ending in endings if isinstance(ending, Discarded)]
        in_doubt = _in_doubt(endings, invocation)
        earlier = self.earlier_answers([completion.row for completion in completions])
        totals = fold(self.totals, endings, invocation, earlier)

        def write() -> None:
            self._database.insert("rows", list(map(db_tables.completion_record, completions)))
            self._database.insert(
                "attempts", [db_tables.discarded_record(attempt, invocation) for attempt in discarded]
            )
            self._database.insert("possibly_billed", [db_tables.possibly_billed_record(entry) for entry in in_doubt])
            self.write_booked(totals)
            if totals.unstated is not self.totals.unstated:
                self._database.replace("manifest", [(UNSTATED, msgspec.json.encode(totals.unstated).decode())])
            if completions:
                self.write_standing(totals)
            known = self.totals.answered_as.items()
            self._database.replace("answered_as", [item for item in totals.answered_as.items() if item not in known])

        self._database.transaction(write)
        self.totals = with_possibly_billed(totals, in_doubt)

    def count_spilled(self, endings: Sequence[Ending]) -> None:
        """The totals count these endings, which are durable elsewhere."""
        totals = fold(self.totals, endings, self.invocation)
        self.totals = with_possibly_billed(totals, _in_doubt(endings, self.invocation))

    def add_possibly_billed(self, entries: Sequence[PossiblyBilled]) -> None:
        """The attempts are on the permanent list of possibly billed requests."""
        records = [db_tables.possibly_billed_record(entry) for entry in entries]
        self._database.transaction(lambda: self._database.insert("possibly_billed", records))
        self.totals = with_possibly_billed(self.totals, entries)

    def change(self, work: Callable[[], Totals]) -> None:
        """Runs `work` in one transaction; the totals are what it returns."""
        totals = self.totals

        def transact() -> None:
            nonlocal totals
            totals = work()

        self._database.transaction(transact)
        self.totals = totals

    def write_standing(self, totals: Totals) -> Totals:
        """Writes the number of rows by status, and the changes by replaced answers. Call it in a transaction."""
        self._database.replace("standing", list(totals.standing.items()))
        known = self.totals.replaced
        changed = [line for key, line in totals.replaced.items() if known.get(key) is not line]
        self._revision += bool(changed)
        self._database.replace("replaced", [db_tables.replaced_record(line, self._revision) for line in changed])
        return totals

    def write_booked(self, totals: Totals) -> None:
        """Writes the lines of the totals that have changed. Call it in a transaction."""
        known = self.totals.booked
        changed = [line for key, line in totals.booked.items() if known.get(key) is not line]
        self._database.replace("totals", [db_tables.totals_record(line) for line in changed])

    def earlier_answers(self, rows: Collection[int]) -> dict[int, TotalsLine]:
        """For those of the rows that were reopened: what their earlier answer alone used and cost."""
        if not self.has_reopened:
            return {}
        again: list[Reopened] = []
        for group in groups(rows):
            found = self._database.records("reopened", among(group), group)
            again += [Reopened(*record) for record in found]
        return {each.row: each.line for each in again}

    def has_end(self, row: int, n: int) -> bool:
        """True if the attempt's ending is stored, or the attempt is listed as possibly billed."""
        queries = {
            "SELECT 1 FROM rows WHERE row = ? AND attempts >= ?": (row, n),
            "SELECT 1 FROM attempts WHERE row = ? AND n = ? AND invocation >= ?": (row, n, self.since),
            "SELECT 1 FROM possibly_billed WHERE row = ? AND n = ? AND invocation >= ?": (row, n, self.since),
            "SELECT 1 FROM chunks WHERE first_row <= ? AND first_row + rows > ? AND open = 0": (row, row),
        }
        return any(self._database.query(*query) for query in queries.items())


def groups(rows: Collection[int]) -> Iterator[list[int]]:
    """The rows, in lists that fit into one statement."""
    left = list(rows)
    for start in range(0, len(left), MAX_PARAMETERS):
        yield left[start : start + MAX_PARAMETERS]


def among(rows: Sequence[int]) -> str:
    """The clause that selects these rows."""
    return f"WHERE row IN ({','.join('?' * len(rows))})"


def _in_doubt(endings: Sequence[Ending], invocation: int) -> list[PossiblyBilled]:
    return [entry for ending in endings if (entry := possibly_billed(ending, invocation)) is not None]


def _read_totals(database: Database, unstated: Unstated) -> Totals:
    lines = [db_tables.totals_line(record) for record in database.records("totals")]
    changes = [db_tables.replaced_line(record) for record in database.records("replaced")]
    in_doubt = database.records("possibly_billed", "ORDER BY rowid")
    totals = Totals(
        booked={line.key: line for line in lines},
        replaced={line.key: line for line in changes},
        standing=dict(database.records("standing")),
        answered_as=dict(database.records("answered_as")),
        unstated=unstated,
    )
    return with_possibly_billed(totals, [db_tables.possibly_billed(record) for record in in_doubt])
