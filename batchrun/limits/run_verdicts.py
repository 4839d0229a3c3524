"""Verdicts on the whole run (a wrong key, an empty account), none of which is believed of a single row. PURE.

Such a verdict is suspected until a second row meets it, or an answer disproves it. Only a row sent *after* the verdict
came can do either: when a key is revoked, older requests still succeed for minutes. A wrong key (401) may also be one
of several behind the address. So it is disproved by rows that were in flight with it, too.
"""

from enum import Enum, auto

import msgspec

from batchrun.limits.admission import Outcome
from batchrun.records import Verdict

MOST_DISPROVED = 4
"""Each verdict that an answer disproved makes the next one need one more confirmation, up to five: a gateway with one
bad key among several refuses rows at random, and a revoked key refuses them all."""

ACCEPTED_BESIDE = 2
"""This many rows that were sent after one with a wrong key, and accepted, show that there is another key. One alone may
have reached another process of a server that just revoked the key."""

REFUSED_IN_A_ROW = 6
"""Where there are several keys, a wrong one is its row's own until so many come without an answer between."""


class Suspected(Enum):
    """What one more verdict makes of those before it."""

    NEW = auto()
    AT_ONCE = auto()  # with an earlier one: where one key of several is bad, two rows at once may well meet it
    CONFIRMED = auto()


class _Suspicion(msgspec.Struct, frozen=True):
    """The verdict on the attempt of this `order`; attempts of order >= `since` were sent after it."""

    verdict: Verdict
    is_of_key: bool
    order: int
    since: int


class RunVerdicts:
    """The suspected verdicts, by row; true while there are any."""

    __slots__ = (
        "_accepted_beside",
        "_confirmed",
        "_disproved",
        "_has_several_keys",
        "_in_a_row",
        "_rows",
        "_successes",
    )

    def __init__(self) -> None:
        self._rows: dict[int, _Suspicion] = {}
        self._disproved = 0
        self.forget()

    def __bool__(self) -> bool:
        return bool(self._rows)

    def forget(self) -> None:
        """Starts again, since the cause may be gone."""
        self._rows.clear()
        self._confirmed = self._disproved = self._accepted_beside = 0
        self._has_several_keys = False
        self._in_a_row = self._successes = 0

    @property
    def may_be_of_one_key(self) -> bool:
        """True if rows that are in flight may still disprove what is suspected."""
        return all(suspicion.is_of_key for suspicion in self._rows.values())

    def is_rows_own(self, outcome: Outcome, successes: int) -> bool:
        """True for a wrong key where others are known to be good. `successes` counts the good answers so far."""
        if not self._has_several_keys or self._rows or not _is_of_key(outcome):
            return False
        self._in_a_row = 1 + (self._in_a_row if successes == self._successes else 0)
        self._successes = successes
        return self._in_a_row < REFUSED_IN_A_ROW

    def add(self, outcome: Outcome, order: int, sent: int) -> Suspected:
        """Suspects the verdict of the attempt of this order, after so many were `sent`."""
        alike = [each.since for each in self._rows.values() if each.verdict is outcome.verdict]
        if alike and order < min(alike):
            self._rows[outcome.row] = _Suspicion(outcome.verdict, _is_of_key(outcome), order, min(alike))
            return Suspected.AT_ONCE
        self._rows[outcome.row] = _Suspicion(outcome.verdict, _is_of_key(outcome), order, sent)
        self._confirmed += bool(alike)
        return Suspected.CONFIRMED if self._confirmed > min(self._disproved, MOST_DISPROVED) else Suspected.NEW

    def disproved_by(self, row: int, order: int, episode: int) -> tuple[int, ...]:
        """Drops what this success disproves; returns the other rows whose verdict was their own. Attempts of order <
        `episode` were in flight when the newest suspicion arose.
        """
        of_keys = [each.order for each in self._rows.values() if each.is_of_key]
        if of_keys and min(of_keys) < order < episode:
            self._accepted_beside += 1
        other_key = self._accepted_beside >= ACCEPTED_BESIDE
        self._has_several_keys |= other_key
        cleared = [
            suspect
            for suspect, each in self._rows.items()
            if suspect == row or order >= each.since or (other_key and each.is_of_key)
        ]
        for suspect in cleared:
            del self._rows[suspect]
        if cleared and not self._rows:
            self._confirmed, self._disproved, self._accepted_beside = 0, self._disproved + 1, 0
        return tuple(suspect for suspect in cleared if suspect != row)


def _is_of_key(outcome: Outcome) -> bool:
    return outcome.error is not None and outcome.error.http_status == 401
