"""The ledger of a run: the records of attempts in the database, and the totals that count them.

Most commits only add rows. Their numbers are larger than the one in `counted`, and every reader of the totals adds such
rows to the stored ones. Every other change writes the totals in its transaction. It belongs to the database's thread.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import msgspec

from batchrun.records import CompletionRecord, Discarded, Ending, PossiblyBilled
from batchrun.run_summary import LineKey, TotalsLine
from batchrun.store import db_tables
from batchrun.store.booking import fold, possibly_billed, with_possibly_billed
from batchrun.store.database import Database, Record, among
from batchrun.store.db_tables import Reopened
from batchrun.store.totals import UNSTATED, Totals, Unstated

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
        ((last,),) = database.query("SELECT coalesce(max(batch), 0) FROM rows")
        self._batch = max([last, *(batch for _, batch in database.records("counted"))])
        unstated = msgspec.json.decode(entries.get(UNSTATED, "{}"), type=Unstated)
        self._stored = read_totals(database.records, unstated)
        self.totals = with_uncounted(self._stored, database.records)

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
        """The endings are durable, and the totals count them.

        `invocation` is that of the endings; None: this process's.
        """
        started = self.invocation if invocation is None else invocation
        completions = [ending for ending in endings if isinstance(ending, CompletionRecord)]
        earlier = self.earlier_answers([completion.row for completion in completions])
        totals = fold(self.totals, endings, started, earlier)
        in_doubt = [possibly_billed(ending, started) for ending in endings if ending.maybe_billed]
        records = [db_tables.completion_record(completion, self._batch + 1) for completion in completions]
        changes_more = in_doubt or self.has_reopened or totals.unstated is not self.totals.unstated
        if invocation is None and len(completions) == len(endings) and not changes_more:
            self._database.append("rows", records)
            self._batch += 1
            self.totals = totals
            return
        discarded = [ending for ending in endings if isinstance(ending, Discarded)]

        def write() -> Totals:
            self._database.insert("rows", records)
            self._database.insert("attempts", [db_tables.discarded_record(attempt, started) for attempt in discarded])
            self._database.insert("possibly_billed", [db_tables.possibly_billed_record(entry) for entry in in_doubt])
            return with_possibly_billed(totals, in_doubt)

        self._batch += 1
        self.change(write)

    def count_spilled(self, endings: Sequence[Ending]) -> None:
        """The totals count these endings, which are durable elsewhere."""
        in_doubt = [possibly_billed(ending, self.invocation) for ending in endings if ending.maybe_billed]
        self.totals = with_possibly_billed(fold(self.totals, endings, self.invocation), in_doubt)

    def add_possibly_billed(self, entries: Sequence[PossiblyBilled]) -> None:
        """The attempts are on the permanent list of possibly billed requests."""
        records = [db_tables.possibly_billed_record(entry) for entry in entries]

        def insert() -> Totals:
            self._database.insert("possibly_billed", records)
            return with_possibly_billed(self.totals, entries)

        self.change(insert)

    def change(self, work: Callable[[], Totals]) -> None:
        """Runs `work` in one transaction, which also stores the totals that it returns."""
        totals = self.totals

        def transact() -> None:
            nonlocal totals
            totals = work()
            self._store(totals)

        self._database.transaction(transact)
        self._stored = self.totals = totals

    def save(self) -> None:
        """The stored totals count every row."""
        if self._stored is not self.totals:
            self.change(lambda: self.totals)

    def _store(self, totals: Totals) -> None:
        """Writes what differs from the stored totals."""
        known, write = self._stored, self._database.replace
        write("totals", [db_tables.totals_record(line) for line in _changed(known.booked, totals.booked)])
        write("standing", list(totals.standing.items()))
        if changed := _changed(known.replaced, totals.replaced):
            self._revision += 1
            write("replaced", [db_tables.replaced_record(line, self._revision) for line in changed])
        answered_as = known.answered_as.items()
        write("answered_as", [item for item in totals.answered_as.items() if item not in answered_as])
        if totals.unstated is not known.unstated:
            write("manifest", [(UNSTATED, msgspec.json.encode(totals.unstated).decode())])
        write("counted", [(0, self._batch)])

    def earlier_answers(self, rows: Collection[int]) -> dict[int, TotalsLine]:
        """For those of the rows that were reopened: what their earlier answer alone used and cost."""
        if not self.has_reopened:
            return {}
        again: list[Reopened] = []
        for selected, group in among(rows):
            again += [Reopened(*record) for record in self._database.records("reopened", selected, group)]
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


def _changed(known: Mapping[LineKey, TotalsLine], lines: Mapping[LineKey, TotalsLine]) -> list[TotalsLine]:
    """The lines that are not the same objects as the known ones: `fold` makes a new one for each change."""
    return [line for key, line in lines.items() if known.get(key) is not line]


Read = Callable[[str], Iterable[Record]]
"""The records of a table."""


def read_totals(records: Read, unstated: Unstated) -> Totals:
    """The stored totals, which may lack rows of the latest commits."""
    lines = [db_tables.totals_line(record) for record in records("totals")]
    changes = [db_tables.totals_line(record[:-1]) for record in records("replaced")]  # the last field is the revision
    totals = Totals(
        booked={line.key: line for line in lines},
        replaced={line.key: line for line in changes},
        standing=dict(records("standing")),
        answered_as=dict(records("answered_as")),
        unstated=unstated,
    )
    return with_possibly_billed(totals, [db_tables.possibly_billed(record) for record in records("possibly_billed")])


def with_uncounted(stored: Totals, records: Read) -> Totals:
    """The totals with the rows of later commits than they count. Nothing is added if no one knows which these are."""
    counted = max((batch for _, batch in records("counted")), default=None)
    if counted is None and stored.booked:
        return stored
    later = [db_tables.completion(record) for record in records("rows") if record[3] > (counted or 0)]
    by_start: dict[int, list[CompletionRecord]] = {}
    for completion in later:
        by_start.setdefault(completion.invocation, []).append(completion)
    for invocation, completions in by_start.items():
        stored = fold(stored, completions, invocation)
    return stored
