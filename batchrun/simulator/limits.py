"""The rate limits: continuous token buckets. The time comes as an argument. PURE."""

import math
from collections import deque

import msgspec

from batchrun.errors import JobError
from batchrun.simulator.refusal import Refused

BURST_S = 2.0  # what a client may send at once after a pause: small, so that the limit holds within any minute

_HAIR = 1e-6  # of a token: what floating point may lose, so that waiting for Retry-After is always enough


class PlannedChange(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Other limits from `at_s` on; None leaves a limit as it is.

    Raises:
        JobError: it changes nothing, or its time is before the start.
    """

    at_s: float
    """The simulator's age, seconds."""
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.at_s <= 1e6:
            raise JobError(f"limit_changes: at_s = {self.at_s} is not within 0 to 1e+06")
        if self.requests_per_minute is None and self.tokens_per_minute is None:
            raise JobError(f"limit_changes: the one at {self.at_s:g} s changes nothing")


class ServerBucket:
    """A level that refills at `per_minute` up to `burst_s` seconds' worth, full at `now_s`."""

    def __init__(self, per_minute: int, now_s: float, burst_s: float = BURST_S) -> None:
        self._burst_s = burst_s
        self._level = math.inf  # `change` lowers it to the capacity
        self._at_s = now_s
        self._per_s = 0.0
        self.capacity = math.inf
        self.change(per_minute, now_s)

    def change(self, per_minute: int, now_s: float) -> None:
        """Refills at the new rate from `now_s` on. The level stays, up to the new capacity."""
        self.level(now_s)
        self.per_minute = per_minute
        self._per_s = per_minute / 60
        self.capacity = max(1.0, self._per_s * self._burst_s)
        self._level = min(self.capacity, self._level)

    def level(self, now_s: float) -> float:
        """The amount that can be taken now; below 0 after an amount larger than the bucket was taken."""
        self._level = min(self.capacity, self._level + (now_s - self._at_s) * self._per_s)
        self._at_s = now_s
        return self._level

    def wait_s(self, amount: float, now_s: float) -> float:
        """Seconds until `amount` may be taken, 0 for now. An amount larger than the bucket waits for a full one."""
        missing = min(amount, self.capacity) - self.level(now_s)
        return max(0.0, missing / self._per_s) if missing > _HAIR else 0.0

    def take(self, amount: float) -> None:
        """Lowers the level; an amount larger than the bucket leaves a debt."""
        self._level -= amount


class Limits:
    """Requests and tokens a minute; both are taken, or neither."""

    def __init__(
        self,
        requests_per_minute: int | None,
        tokens_per_minute: int | None,
        *,
        headers: bool,
        now_s: float,
        changes: tuple[PlannedChange, ...] = (),
    ) -> None:
        """`changes` are in the order of their time, counted from `now_s`, and only of limits that are set."""
        self._buckets: dict[str, ServerBucket] = {}
        if requests_per_minute is not None:
            self._buckets["requests"] = ServerBucket(requests_per_minute, now_s)
        if tokens_per_minute is not None:
            self._buckets["tokens"] = ServerBucket(tokens_per_minute, now_s)
        self._headers = headers
        self._started_s = now_s
        self._changes = deque(changes)

    def admit(self, tokens: int, now_s: float) -> None:
        """Takes one request and its tokens.

        Raises:
            Refused: 429 with `Retry-After` (whole seconds, rounded up), and `retry-after-ms` if headers are sent;
                nothing was taken.
        """
        self._change(now_s)
        amounts = {"requests": 1, "tokens": tokens}
        waits = {name: bucket.wait_s(amounts[name], now_s) for name, bucket in self._buckets.items()}
        name = max(waits, key=lambda name: waits[name], default=None)
        if name is not None and waits[name] > 0:
            wait_s, limit = waits[name], self._buckets[name].per_minute
            headers = [("Retry-After", str(math.ceil(wait_s)))]
            if self._headers:
                headers.append(("retry-after-ms", str(_milliseconds(wait_s))))
            message = f"Rate limit reached for {name} per minute (limit {limit})."
            raise Refused(
                429,
                f"{message} Please try again in {duration_text(wait_s)}.",
                code="rate_limit_exceeded",
                error_type=name,
                headers=tuple(headers),
            )
        for name, bucket in self._buckets.items():
            bucket.take(amounts[name])

    def headers(self, now_s: float) -> tuple[tuple[str, str], ...]:
        """`x-ratelimit-{limit,remaining,reset}-{requests,tokens}`: the limit a minute, what is left of the burst."""
        if not self._headers:
            return ()
        self._change(now_s)
        return tuple(
            (f"x-ratelimit-{field}-{name}", text)
            for name, bucket in self._buckets.items()
            for field, text in (
                ("limit", str(bucket.per_minute)),
                ("remaining", str(max(0, math.floor(bucket.level(now_s) + _HAIR)))),
                ("reset", duration_text(bucket.wait_s(bucket.capacity, now_s))),  # until it is full
            )
        )

    def _change(self, now_s: float) -> None:
        """Applies the changes that are due, each at its own time."""
        while self._changes and self._started_s + self._changes[0].at_s <= now_s:
            change = self._changes.popleft()
            for name, per_minute in (("requests", change.requests_per_minute), ("tokens", change.tokens_per_minute)):
                if per_minute is not None:
                    self._buckets[name].change(per_minute, self._started_s + change.at_s)


def duration_text(seconds: float) -> str:
    """`250ms`, `1s`, `1.5s`, `6m0s`, `1h0m0s`: the forms of docs/api.md, rounded up to a millisecond."""
    milliseconds = _milliseconds(seconds)
    if milliseconds < 1_000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    seconds_text = f"{rest / 1_000:g}s"
    if minutes == 0:
        return seconds_text
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes}m{seconds_text}" if hours else f"{minutes}m{seconds_text}"


def _milliseconds(seconds: float) -> int:
    """Rounded up, ignoring the last bits of floating point."""
    return max(0, math.ceil(seconds * 1_000 - 1e-6))
