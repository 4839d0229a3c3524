"""When a learned rate is raised, and by how much. PURE."""

ROUGH_STEP, ROUGH_EVERY_S, ROUGH_EVERY = 0.05, 1.0, 10
STEP, EVERY_S, MAX_EVERY_S, EVERY = 0.01, 3.0, 8.0, 40
FASTER, ROUGH_FASTER, MAX_STEP = 2.0, 1.5, 0.32
"""Upwards by 1, 2, 4 … 32 %, after three seconds or forty requests each (a rough rate by 5 % after one second or ten):
a doubled limit is in use within half a minute, and an unchanged one costs one refusal in a hundred requests."""

DOUBLED = 1.0
"""If the rate did not cause the refusals, it doubles each second until they return."""

WORTH = 0.0125
MOST_REST = 100
MOST_REST_S = 120.0
"""If a climb ends at the limit already known, it cost its refusals for nothing: the next climb waits until they are
1.25 % of what was sent, for 100 requests at most. Below ten a second that is longer than the steps take anyway. Where
only evenly spaced requests are accepted, each climb is refused, so it waits for up to two minutes."""

USED = 0.8
"""The rate is raised only while this share of it is used: otherwise the absence of refusals proves nothing."""


class RateClimb:
    """Steps upwards from a rate; `is_rough` if that was not measured exactly: then the steps come sooner."""

    __slots__ = ("_is_steady", "_raised_s", "_raised_total", "_rest", "_step", "counted_before", "is_rough")

    def __init__(self) -> None:
        self.is_rough = self._is_steady = False
        self.counted_before = 0  # attempts counted when the climb began
        self._step = STEP
        self._rest = 0.0  # requests before the next climb
        self._raised_s = self._raised_total = 0.0

    def begin(self, *, rough: bool, step: float | None = None, steady: bool = False) -> None:
        """The next step is the first one, of its usual size or of `step`; `steady`: later ones are no larger."""
        self.is_rough = rough
        self._is_steady = steady
        self._step = step or (ROUGH_STEP if rough else STEP)

    def restart(self, now_s: float, taken: float) -> None:
        """The rate has changed, or a pause is over; `taken` was sent so far."""
        self._raised_s, self._raised_total = now_s, taken

    def is_due(self, now_s: float, taken: float, per_s: float, requests_per_s: float) -> bool:
        """True if it is time for the next step, and the present rate was used."""
        if self.is_rough:
            every_s = min(MAX_EVERY_S, max(ROUGH_EVERY_S, ROUGH_EVERY / requests_per_s))
        else:
            every_s = min(MAX_EVERY_S, max(EVERY_S, EVERY / requests_per_s))
        if now_s - self._raised_s < every_s:
            return False
        is_used = taken - self._raised_total >= USED * (now_s - self._raised_s) * per_s
        self.restart(now_s, taken)
        self._rest -= every_s * requests_per_s
        return is_used

    def next_step(self) -> float:
        """By which share the rate is raised now. The next one is larger, unless steps are steady."""
        step = self._step
        if step < DOUBLED and not self._is_steady:
            self._step = min(MAX_STEP, (ROUGH_FASTER if self.is_rough else FASTER) * step)
        return step

    @property
    def rests(self) -> bool:
        """True while the next climb has to wait."""
        return self._rest > 0

    def rest_after(self, refused: float, counted: int) -> None:
        """This climb met the limit that was known, and cost `refused` of `counted` attempts."""
        self._rest = min(MOST_REST, refused / WORTH - (counted - self.counted_before))

    def rest_long(self, refused: float, requests_per_s: float) -> None:
        """As `rest_after`, where each climb is refused."""
        self._rest = min(refused / WORTH, max(MOST_REST, MOST_REST_S * requests_per_s))
