"""Which rows wait for a retry, how often they were sent, and why they failed. PURE."""

from collections import Counter
from collections.abc import Callable
from datetime import datetime, timedelta

import msgspec

from batchrun.records import RowError
from batchrun.run_summary import Retrying

MOST_NAMED = 10
"""How many rows are named one by one; all are counted."""

MOST_REASONS = 3

LOG_EVERY_S = 30.0
"""While rows are retried run.log gets one line in this time, never a line per row."""


class _Waiting(msgspec.Struct, frozen=True):
    attempts: int
    due_s: float
    reason: str


class Retries:
    """The rows that wait for a retry or are being retried. One per event loop."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._rows: dict[int, _Waiting] = {}
        self._logged_s = float("-inf")
        self._logged_last = False

    def put(self, row: int, attempts: int, error: RowError | None, due_s: float) -> None:
        """The row has failed `attempts` times, the last time with `error`, and will be sent again at `due_s`."""
        if error is None:
            reason = "its answer was not accepted"
        else:
            kind = error.kind.replace("_", " ")
            reason = kind if error.http_status is None else f"{error.http_status} {kind}"
        self._rows[row] = _Waiting(attempts, due_s, reason)

    def drop(self, row: int) -> None:
        """The row is settled, or was answered."""
        self._rows.pop(row, None)

    def summary(self, now: datetime) -> Retrying | None:
        """What is retried now; None if nothing is."""
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

    def should_log(self, *, last: bool) -> bool:
        """Whether run.log gets a line now; after True not again for a while. `last`: no other rows are left."""
        now_s = self._clock()
        if not self._rows or (now_s - self._logged_s < LOG_EVERY_S and last <= self._logged_last):
            return False
        self._logged_s, self._logged_last = now_s, last
        return True
