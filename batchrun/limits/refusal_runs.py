"""Detects refusals that come in runs, or for seconds at a time, at any rate, so that the rate need not fall. PURE.

A constant limit gives the same rate each time it is measured. If each storm measures a much lower rate than the one
before, the rate is not the cause: as many requests, or as many seconds, lay between the storms although the gate sent
more slowly.
"""

import msgspec

FELL = 0.9
"""A measured rate below this share of the last one is a fall: over ten requests the error is a tenth."""

AS_BEFORE = 0.97
"""If this share of the last rate is measured again, it is a limit, and a new series begins."""

FALLS = 2
"""A limit that is lowered once is measured once across that change, and then as it is: its rate falls once only."""

SERIES_S = 30.0
"""A storm that comes later than this after the last starts a new series."""

FEW = 2
"""Up to two refusals in a row may be chance that refuses a few per cent."""

LEAST_RUN = 4
"""Fewer refusals in a row also occur at a limit slightly below the rate."""

IN_A_ROW = 10
"""So many refusals in a row are a storm (`refusals`)."""

MOST_COUNTED = 3.0
"""The ordinary share is divided by the length of runs, but by three at most: some refusals may be single ones."""

TIMES = 2.0
MAX_PATIENCE = 3.0
"""Twice the longest run seen is tolerated before it is a storm, up to thirty refusals: a longer one is lasting, and
sending into it would be a flood."""

FORGOTTEN = 0.95
"""The factor by which the longest run is forgotten with each shorter one."""

WATCHED_S = 20.0
MOST_REFUSED = 0.5
"""If this share is refused over the watched time while the rate is kept up, the rate was the cause."""

LASTS_S = 120.0
"""How long runs are assumed after the last one."""

RULED_OUT_FOR_S = 60.0
"""How long runs are ruled out after they proved wrong; doubled each time."""


class _Series(msgspec.Struct):
    """Consecutive storms: `before` is the rate (per second; None: no limit) before the first of them."""

    before: float | None
    measured: float = 0.0
    falls: int = 0


class RefusalRuns:
    """Whether refusals come in runs at any rate (`is_found`). One per gate.

    `in_a_row` are the refusals since the last accepted attempt. `is_handled`: they have lowered the rate already.
    """

    __slots__ = (
        "_counted",
        "_fell",
        "_last_s",
        "_longest",
        "_not_before_s",
        "_refused",
        "_ruled_out_for_s",
        "_series",
        "_watched_s",
        "in_a_row",
        "is_found",
        "is_handled",
    )

    def __init__(self) -> None:
        self.is_found = self.is_handled = False
        self.in_a_row = 0
        self._fell = False  # the last measurement was a fall, and the refusals since then have no end yet
        self._longest = 0.0  # run of refusals, slowly forgotten
        self._last_s = -SERIES_S - 1
        self._series = _Series(None)
        self._watched_s = 0.0
        self._counted = self._refused = 0
        self._not_before_s = 0.0
        self._ruled_out_for_s = RULED_OUT_FOR_S

    @property
    def is_one(self) -> bool:
        """True for all but the first refusal of a run, which counts once: a rate slightly too high has no runs."""
        return self.is_found and self.in_a_row > 1

    @property
    def are_single(self) -> bool:
        """True if the last refusals may be by chance, each by itself."""
        return not self.is_found and self.in_a_row <= FEW

    def ordinary(self, share: float) -> float:
        """The share refused in ordinary times, each run counted once."""
        return share / max(1.0, min(MOST_COUNTED, self._longest)) if self.is_found else share

    @property
    def patience(self) -> float:
        """How many times as many refusals as usual make a storm."""
        if not self.is_found:
            return 1.0
        return min(MAX_PATIENCE, max(1.0, TIMES * self._longest / IN_A_ROW))

    def count(self, at_s: float, *, refused: bool) -> None:
        """Adds one attempt, in the order of sending."""
        if self.is_found:
            self._watch(at_s, refused=refused)
        if refused:
            self.in_a_row += 1
        elif self.in_a_row:
            if self.in_a_row >= LEAST_RUN:
                self._longest = max(self.in_a_row, FORGOTTEN * self._longest)
                self._last_s = at_s if self.is_found else self._last_s
            self.in_a_row = 0
            self._fell = self.is_handled = False

    def lowered(self, now_s: float, per_s: float | None, measured: float | None) -> bool:
        """Too much was refused at the rate `per_s`; `measured` per second were accepted since the last such moment.

        True if this has just shown that the rate is not the cause.
        """
        if now_s - self._last_s > SERIES_S:
            self._series = _Series(per_s)
        self._last_s = now_s
        if self.is_found or now_s < self._not_before_s:
            return False
        series = self._series
        if measured is None:
            # a limit slightly below the rate never refuses so many in a row
            if self._fell and self.in_a_row >= LEAST_RUN:
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
        """A refused share stayed at a lower rate: if there were runs, they are the reason."""
        if not self.is_found and self._longest >= LEAST_RUN:
            self._find(now_s)

    def _find(self, now_s: float) -> None:
        self.is_found = True
        self._watched_s, self._counted, self._refused = now_s, 0, 0

    @property
    def before(self) -> float | None:
        """The rate before the first storm of the series."""
        return self._series.before

    def _watch(self, at_s: float, *, refused: bool) -> None:
        """Rules runs out when none came for two minutes, or when half of everything is refused."""
        if at_s - self._last_s > LASTS_S:
            self.is_found = False
        self._counted += 1
        self._refused += refused
        if at_s - self._watched_s < WATCHED_S:
            return
        if self._refused > MOST_REFUSED * self._counted:
            self.is_found = False
            self._not_before_s = at_s + self._ruled_out_for_s
            self._ruled_out_for_s *= 2
        self._watched_s, self._counted, self._refused = at_s, 0, 0
