"""Refusals that come in runs, or in spells of seconds, whatever the rate: what shows them, and what they permit. PURE.

A limit that does not move gives the same rate each time it is measured. Where storm follows storm and each measures a
rate far below the one before, the pace is not the cause: the same number of requests, or the same time, passed between
them although we went slower. Pauses and lower rates only lose time then.
"""

import msgspec

FELL = 0.9
"""A measured rate so far below the last one is a fall: over ten requests it is off by a tenth."""

AS_BEFORE = 0.97
"""Where so much of the last one is measured again, that is a limit: a new series begins with it."""

FALLS = 2
"""A limit may fall once while it is used, and the next rate is then measured over both. It does not go on falling."""

SERIES_S = 30.0
"""A storm that comes later than this after the last is the first of a new series."""

LEAST_RUN = 4
"""Fewer refusals in a row are what a limit shows that is a little lower than the rate."""

IN_A_ROW = 10
MOST_COUNTED = 3.0
"""A run is taken for no more than three refusals of the ordinary share: some of them may be chance, one by one."""

TIMES = 2.0
MAX_PATIENCE = 3.0
"""Twice the longest run that was seen is borne before it is a storm, up to thirty refusals: a longer one lasts, and to
send into it for longer would be a flood."""

FORGOTTEN = 0.95
"""The longest run is forgotten by so much with each shorter one."""

WATCHED_S = 20.0
MOST_REFUSED = 0.5
"""Where so many attempts are refused over so long while the rate is kept up, it was the rate."""

LASTS_S = 120.0
"""How long it is believed after the last run."""

WRONG_FOR_S = 60.0
"""How long it is not believed again after it was wrong; twice as long the next time."""


class _Series(msgspec.Struct):
    """Storms that follow each other: the rate (per second; None: no limit) before the first of them."""

    before: float | None
    measured: float = 0.0
    falls: int = 0


class Runs:
    """Whether refusals come in runs whatever the rate. One per gate."""

    __slots__ = (
        "_counted",
        "_fell",
        "_last_s",
        "_longest",
        "_not_before_s",
        "_refused",
        "_series",
        "_watched_s",
        "_wrong_for_s",
        "found",
        "is_paid",
        "row",
    )

    def __init__(self) -> None:
        self.found = False
        self.row = 0  # refusals since the last attempt that was taken
        self.is_paid = False  # the rate was lowered for this row of refusals
        self._fell = False
        self._longest = 0.0
        self._last_s = -SERIES_S - 1
        self._series = _Series(None)
        self._watched_s = 0.0
        self._counted = self._refused = 0
        self._not_before_s = 0.0
        self._wrong_for_s = WRONG_FOR_S

    @property
    def is_one(self) -> bool:
        """True within a run, which counts once: where a rate is a little too high, it is refused here and there."""
        return self.found and self.row > 1

    def ordinary(self, share: float) -> float:
        """The share of attempts refused in ordinary times, when each run counts once."""
        return share / max(1.0, min(MOST_COUNTED, self._longest)) if self.found else share

    @property
    def patience(self) -> float:
        """How many times as many refusals as usual are a storm."""
        if not self.found:
            return 1.0
        return min(MAX_PATIENCE, max(1.0, TIMES * self._longest / IN_A_ROW))

    def count(self, at_s: float, *, refused: bool) -> None:
        """One attempt more, in the order of sending."""
        if self.found:
            self._watch(at_s, refused=refused)
        if refused:
            self.row += 1
        elif self.row:
            if self.row >= LEAST_RUN:
                self._longest = max(self.row, FORGOTTEN * self._longest)
                self._last_s = at_s if self.found else self._last_s
            self.row = 0
            self._fell = self.is_paid = False

    def lowered(self, now_s: float, per_s: float | None, measured: float | None) -> bool:
        """Too much is refused at the rate `per_s`, after so much was taken per second since that was so before; True
        where it has shown, just now, that the rate is not the cause.
        """
        if now_s - self._last_s > SERIES_S:
            self._series = _Series(per_s)
        self._last_s = now_s
        if self.found or now_s < self._not_before_s:
            return False
        series = self._series
        if measured is None:
            if self._fell and self.row >= LEAST_RUN:  # no limit that is a little too low refuses so many in a row
                series.falls, self._fell = series.falls + 1, False
        elif not series.measured:
            series.measured = measured
        elif measured >= AS_BEFORE * series.measured:
            self._series = series = _Series(per_s, measured)
        elif measured < FELL * series.measured:
            self._fell, series.measured = True, measured
            series.falls += 1
        if series.falls < FALLS:
            return False
        self._find(now_s)
        return True

    def is_chance(self, now_s: float) -> None:
        """A share of refusals has stayed although we went slower: if there were runs, it is runs that stay."""
        if not self.found and self._longest >= LEAST_RUN:
            self._find(now_s)

    def _find(self, now_s: float) -> None:
        self.found = True
        self._watched_s, self._counted, self._refused = now_s, 0, 0

    @property
    def before(self) -> float | None:
        """The rate before the first storm of the series."""
        return self._series.before

    def _watch(self, at_s: float, *, refused: bool) -> None:
        if at_s - self._last_s > LASTS_S:
            self.found = False
        self._counted += 1
        self._refused += refused
        if at_s - self._watched_s < WATCHED_S:
            return
        if self._refused > MOST_REFUSED * self._counted:
            self.found = False
            self._not_before_s = at_s + self._wrong_for_s
            self._wrong_for_s *= 2
        self._watched_s, self._counted, self._refused = at_s, 0, 0
