"""Predicts when a run ends, and how much is done by its deadline: the last minutes are extrapolated. PURE.

Waits, retries and coolings are included as they occurred. Times are seconds of a clock that never jumps.
"""

from collections import Counter, deque

import msgspec

from batchrun.limits.admission import Limit

WINDOW_S = 300.0
"""How much of the past is extrapolated: long enough to include a cooling, short enough to follow a changed limit."""

RATE_S = 30.0
"""The span of the rate shown as the present one."""

RIPE_S = 60.0
RIPE_SHARE = 0.1
"""A warning needs a minute of experience, or a tenth of the time available: the first seconds, with few requests in
flight, are not representative."""

MARGIN = 0.98
"""Warn if a smaller share of the rows will be done by the deadline; the rest is the forecast's own error."""

WORSE = 0.1
"""Warn again when the share has fallen by this much since the last warning."""

LEAK = 0.01
"""How fast a slow answer is forgotten: after a hundred faster ones, two thirds of the difference."""


LONGEST_S = 10 * 365 * 86_400.0
"""Longer forecasts are not shown."""


class Sample(msgspec.Struct, frozen=True):
    """The run at one moment: rows settled, tokens used, and what the next row waits for.

    `sent` and `refused` count this process's requests.
    """

    at_s: float
    settled: int
    tokens: int
    limit: Limit
    sent: int = 0
    refused: int = 0


class Forecast(msgspec.Struct, frozen=True):
    """`done_in_s`: None if hardly anything was done lately. `limit`: what rows waited for most of the time.

    `refused_share`: of the requests of the last seconds; None without a request.
    """

    rows_per_s: float
    tokens_per_s: float
    done_in_s: float | None
    limit: Limit
    seen_s: float
    requests_per_s: float = 0.0
    refused_share: float | None = None

    def share_by(self, left_s: float, settled: int, rows: int) -> float:
        """The share of all rows that will be settled in `left_s` seconds, at most 1."""
        return min(1.0, (settled + self.rows_per_s * max(0.0, left_s)) / rows) if rows else 1.0


class Recent:
    """The last minutes of a run, sample by sample."""

    def __init__(self) -> None:
        self._samples: deque[Sample] = deque()
        self._limits: Counter[Limit] = Counter()

    def add(self, sample: Sample) -> None:
        """Adds the newest sample and drops those older than the window."""
        self._samples.append(sample)
        self._limits[sample.limit] += 1
        while sample.at_s - self._samples[0].at_s > WINDOW_S:
            self._limits[self._samples.popleft().limit] -= 1

    def forecast(self, rows: int) -> Forecast | None:
        """The forecast for a run of so many rows; None with fewer than two samples."""
        if len(self._samples) < 2:
            return None
        first, last = self._samples[0], self._samples[-1]
        per_s = (last.settled - first.settled) / (last.at_s - first.at_s)
        shown = next(sample for sample in self._samples if last.at_s - sample.at_s <= RATE_S or sample is last)
        shown = first if shown is last else shown
        pending, shown_s = rows - last.settled, last.at_s - shown.at_s
        sent, refused = last.sent - shown.sent, last.refused - shown.refused
        return Forecast(
            rows_per_s=per_s,
            tokens_per_s=(last.tokens - shown.tokens) / shown_s,
            done_in_s=0.0 if not pending else pending / per_s if per_s * LONGEST_S > pending else None,
            limit=self._limits.most_common(1)[0][0],
            seen_s=last.at_s - first.at_s,
            requests_per_s=sent / shown_s,
            refused_share=min(1.0, refused / max(sent, 1)) if sent or refused else None,
        )


class Concern:
    """Decides when to warn that a deadline will be missed: once, and again when the forecast gets markedly worse."""

    def __init__(self, allotted_s: float) -> None:
        """`allotted_s` is the whole time available."""
        self._ripe_s = min(RIPE_S, RIPE_SHARE * allotted_s)
        self._warned_at = 1.0 + WORSE

    def rises(self, share: float, seen_s: float) -> bool:
        """Whether to warn now, given the share of rows done by the deadline after so much experience; True counts as
        warned.
        """
        if seen_s < self._ripe_s or share >= MARGIN or share > self._warned_at - WORSE:
            return False
        self._warned_at = share
        return True


def peak(held_s: float, latency_s: float) -> float:
    """The latency that nearly all answers keep, updated by one: rises at once to a slower answer, sinks slowly."""
    return latency_s if latency_s > held_s else held_s - (held_s - latency_s) * LEAK
