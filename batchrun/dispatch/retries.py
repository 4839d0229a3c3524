"""Rows that failed and will be sent again: which, how often they were sent, and for what. PURE."""

from collections import Counter
from collections.abc import Callable
from datetime import datetime, timedelta

import msgspec

from batchrun.records import Retrying, RowError

MOST_NAMED = 10
"""Rows that are named one by one; all of them are counted."""

MOST_REASONS = 3

LOG_EVERY_S = 30.0
"""run.log never gets a line per row: while rows are retried it gets one so often."""


class _Waiting(msgspec.Struct, frozen=True):
    attempts: int
    due_s: float
    reason: str


class Retries:
    """The rows that wait for a retry, or are out on one. One per event loop."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._rows: dict[int, _Waiting] = {}
        self._logged_s = float("-inf")
        self._logged_last = False

    def put(self, row: int, attempts: int, error: RowError | None, due_s: float) -> None:
        """The row has failed so often, lately like this, and will be sent again at `due_s` on the clock."""
        self._rows[row] = _Waiting(attempts, due_s, _reason(error))

    def drop(self, row: int) -> None:
        """The row is settled, or was answered."""
        self._rows.pop(row, None)

    def stand(self, now: datetime) -> Retrying | None:
        """What is retried now; None where nothing is."""
        if not self._rows:
            return None
        now_s = self._clock()
        due_s = [waiting.due_s for waiting in self._rows.values() if waiting.due_s > now_s]
        reasons = Counter(waiting.reason for waiting in self._rows.values())
        return Retrying(
            rows=len(self._rows),
            first=sorted(self._rows)[:MOST_NAMED],
            attempts=max(waiting.attempts for waiting in self._rows.values()),
            reasons=dict(reasons.most_common(MOST_REASONS)),
            next_at=now + timedelta(seconds=round(min(due_s) - now_s, 3)) if due_s else None,
        )

    def is_due(self, *, last: bool) -> bool:
        """Whether run.log should hear of it; True counts as told. `last`: no other rows are left."""
        now_s = self._clock()
        if not self._rows or (now_s - self._logged_s < LOG_EVERY_S and last <= self._logged_last):
            return False
        self._logged_s, self._logged_last = now_s, last
        return True


def _reason(error: RowError | None) -> str:
    """In short: the status with its kind, or the kind alone."""
    if error is None:
        return "its answer was not accepted"
    kind = error.kind.replace("_", " ")
    return kind if error.http_status is None else f"{error.http_status} {kind}"
