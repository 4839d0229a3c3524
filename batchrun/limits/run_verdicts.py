"""Verdicts on the whole run (a wrong key, an empty account), none of which is believed of a single row. PURE.

Such a verdict is suspected until other rows confirm it, or an answer disproves it. Only a row sent *after* the verdict
came can do either: when an account runs out, older and smaller requests still succeed for minutes. Of a wrong key any
row sent after the refused one counts, although it may be in flight already: one of several keys may be bad.
"""

import msgspec

from batchrun.limits.admission import Outcome, Stop
from batchrun.records import OTHER_API, WRONG_KEY

MOST_DISPROVED = 4
"""Each verdict that an answer disproved makes the next one need one more confirmation, up to five."""

REFUSED_IN_A_ROW = 6
"""So many refused keys without an answer between are the run's. A gateway with some bad keys refuses rows at random,
and that costs nothing: where a third is refused, six in a row come once in 729 times, two once in nine."""

_KEY = "key"


class _Suspicion(msgspec.Struct):
    """Of these rows; attempts of order >= `since` can confirm or disprove it."""

    since: int
    rows: set[int]
    confirmed: int = 0


class RunVerdicts:
    """The suspected verdicts; true while there are any. `stop` is the one that enough rows confirmed."""

    __slots__ = ("_disproved", "_first", "_has_several_keys", "_in_a_row", "_successes", "_suspicions", "stop")

    def __init__(self) -> None:
        self._suspicions: dict[str, _Suspicion] = {}
        self.forget()

    def __bool__(self) -> bool:
        return bool(self._suspicions)

    def forget(self) -> None:
        """Starts again, since the cause may be gone."""
        self._suspicions.clear()
        self.stop: Stop | None = None
        self._disproved = 0
        self._has_several_keys = False
        self._in_a_row = self._successes = 0
        self._first = 0  # the order of the first refused key in a row

    @property
    def may_be_of_one_key(self) -> bool:
        """True if rows that are in flight may still disprove what is suspected."""
        return self._suspicions.keys() == {_KEY}

    def is_rows_own(self, outcome: Outcome, order: int, successes: int) -> bool:
        """True for a wrong key where others are known to be good. `successes` counts the good answers so far."""
        if not self._has_several_keys or self._suspicions or _subject(outcome) != _KEY:
            return False
        if successes != self._successes:
            self._successes, self._in_a_row = successes, 0
        self._first = min(order, self._first) if self._in_a_row else order
        self._in_a_row += 1
        return self._in_a_row < REFUSED_IN_A_ROW

    def add(self, outcome: Outcome, order: int, sent: int, stop: Stop) -> None:
        """Suspects the verdict of the attempt of this order, after so many were `sent`. `stop` is what it means for
        the run once it is confirmed.
        """
        subject = _subject(outcome)
        suspicion = self._suspicions.get(subject)
        if suspicion is None:
            first = self._first if subject == _KEY and self._has_several_keys else order
            since = first + 1 if subject in (_KEY, OTHER_API) else sent
            self._suspicions[subject] = _Suspicion(since, {outcome.row})
            return
        suspicion.rows.add(outcome.row)
        suspicion.confirmed += order >= suspicion.since
        needed = 1 if subject == OTHER_API else 1 + min(self._disproved, MOST_DISPROVED)
        if suspicion.confirmed >= (REFUSED_IN_A_ROW - 1 if subject == _KEY else needed):
            self.stop = stop

    def disproved_by(self, row: int, order: int) -> tuple[int, ...]:
        """Drops what this success disproves; returns the other rows whose verdict was their own."""
        own: set[int] = set()
        for subject, suspicion in list(self._suspicions.items()):
            if order >= suspicion.since:
                own |= suspicion.rows
                del self._suspicions[subject]
                self._has_several_keys |= subject == _KEY
                self.stop = None
        if own and not self._suspicions:
            self._disproved += 1
        return tuple(sorted(own - {row}))


def _subject(outcome: Outcome) -> str:
    """What the verdict is about: only verdicts on the same confirm each other."""
    if outcome.error is not None and outcome.error.kind == WRONG_KEY:
        return _KEY
    if outcome.error is not None and outcome.error.kind == OTHER_API:
        return OTHER_API
    return outcome.verdict.name
