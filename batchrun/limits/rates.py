"""Every rate that a job can limit: requests per second, minute and day; tokens, input and output tokens per minute.

The only importer of aiolimiter. It enforces the configured request limits, whatever headers state or refusals teach:
our own bucket follows those.
"""

import contextlib

import msgspec
from aiolimiter import AsyncLimiter

from batchrun.job.settings import Limits
from batchrun.limits.adaptive_rate import AdaptiveRate, RateChange
from batchrun.limits.admission import Binding, Demand, Found, Limit
from batchrun.limits.daily import DailyCount
from batchrun.limits.token_bucket import BURST_S

GUARD_BURST_S = 2.0
"""A configured request limit never bursts for longer, whatever the server's headers allow."""

_GUARDED = {Limit.REQUESTS: GUARD_BURST_S, Limit.REQUESTS_PER_SECOND: BURST_S}
_TOKENS = {
    Limit.TOKENS: "tokens_per_minute",
    Limit.INPUT_TOKENS: "input_tokens_per_minute",
    Limit.OUTPUT_TOKENS: "output_tokens_per_minute",
}


class Rates(msgspec.Struct, frozen=True, kw_only=True):
    """New rates; None leaves one as it is. `daily` has counted today's requests."""

    requests_per_second: float | None = None
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    input_tokens_per_minute: float | None = None
    output_tokens_per_minute: float | None = None
    daily: DailyCount | None = None


class RateLimits:
    """What all rates together allow. `requests` and `tokens` may also be stated or learned, the others only configured.

    A rate without a limit costs next to nothing per call.
    """

    def __init__(
        self,
        limits: Limits,
        now_s: float,
        *,
        daily: DailyCount | None = None,
        found: Found = Found(),  # noqa: B008  (frozen)
        on_rate_change: RateChange = lambda limit, before, after, why: None,
    ) -> None:
        """`found` holds the limits that an earlier process found. `on_rate_change` is called for each change."""
        self._on_rate_change = on_rate_change
        self._sent_at_s = now_s
        self._guards: dict[Limit, AsyncLimiter] = {}
        self.requests = AdaptiveRate(
            Limit.REQUESTS, limits.requests_per_minute, now_s, on_rate_change, learned=found.requests_per_minute
        )
        self.tokens = AdaptiveRate(
            Limit.TOKENS, limits.tokens_per_minute, now_s, on_rate_change, learned=found.tokens_per_minute
        )
        self._apart: dict[Limit, AdaptiveRate] = {}  # input and output tokens, if limited
        for limit in (Limit.INPUT_TOKENS, Limit.OUTPUT_TOKENS):
            if (configured := getattr(limits, _TOKENS[limit])) is not None:
                self._apart[limit] = AdaptiveRate(limit, configured, now_s, on_rate_change)
        self.daily = daily
        self._guard(Limit.REQUESTS, limits.requests_per_minute)
        self._guard(Limit.REQUESTS_PER_SECOND, limits.requests_per_second)
        self.requests_per_second = limits.requests_per_second

    def token_limit(self, limit: Limit) -> float | None:
        """The limit on input or output tokens, per minute."""
        rate = self._apart.get(limit)
        return None if rate is None else rate.per_minute

    @property
    def limit_tokens(self) -> bool:
        """False if any number of tokens may be sent."""
        return self.tokens.per_minute is not None or bool(self._apart)

    def tune(self, rates: Rates, now_s: float) -> None:
        """Changes rates, without a burst."""
        if rates.requests_per_minute is not None:
            self._guard(Limit.REQUESTS, rates.requests_per_minute)
            self.requests.configure(rates.requests_per_minute, now_s)
        if rates.requests_per_second is not None:
            self._guard(Limit.REQUESTS_PER_SECOND, rates.requests_per_second)
            self.requests_per_second = rates.requests_per_second
        self.daily = rates.daily or self.daily
        for limit, setting in _TOKENS.items():
            if (configured := getattr(rates, setting)) is None:
                continue
            rate = self.tokens if limit is Limit.TOKENS else self._apart.get(limit)
            if rate is None:
                rate = self._apart[limit] = AdaptiveRate(limit, None, now_s, self._on_rate_change)
            was_free = rate.per_minute is None
            rate.configure(configured, now_s)
            if was_free:
                rate.stand_at(0.0, now_s)

    def blocked_by(self, demand: Demand, now_s: float) -> Binding | None:
        """What blocks this attempt, and until when; None when nothing does. Takes nothing."""
        if self.daily is not None and self.daily.is_spent(now_s):
            return Binding(Limit.REQUESTS_PER_DAY, self.daily.ends_s)
        tokens, requests = self.tokens, self.requests
        if tokens.per_minute is not None and (wait_s := tokens.ready_in_s(demand.tokens, now_s)) > 0:
            return Binding(Limit.TOKENS, now_s + wait_s)
        if requests.per_minute is not None and (wait_s := requests.ready_in_s(1, now_s)) > 0:
            return Binding(Limit.REQUESTS, now_s + wait_s)
        if self._apart:  # most jobs have neither: even an empty loop would cost a little for each row
            for limit, rate in self._apart.items():
                if (wait_s := rate.ready_in_s(_part(limit, demand), now_s)) > 0:
                    return Binding(limit, now_s + wait_s)
        if not self._guards:  # a job without a configured request limit saves 2.3 µs a row (measured)
            return None
        for limit, guard in self._guards.items():
            # no attempt ever waits inside a limiter: that of 1.3.0 wakes the smallest first (measured), our queue none
            if not guard.has_capacity():
                # at the latest then; what has leaked by that time beyond one request is left for the next one
                return Binding(limit, self._sent_at_s + guard.time_period / guard.max_rate)
        return None

    def take(self, demand: Demand, now_s: float) -> None:
        """Counts the attempt in all limits, right after `blocked_by` returned None."""
        self._sent_at_s = now_s
        if self._guards:
            for guard in self._guards.values():
                # the limiter has room, so its coroutine ends at once: at its first step
                with contextlib.suppress(StopIteration):
                    guard.acquire().send(None)
                    raise AssertionError("a limiter with room made a request wait")
        self.requests.take(1, now_s)
        self.tokens.take(demand.tokens, now_s)
        if self._apart:
            for limit, rate in self._apart.items():
                rate.take(_part(limit, demand), now_s)
        if self.daily is not None:
            self.daily.take()

    def correct(self, demand: Demand, tokens: int, output_tokens: int) -> None:
        """Replaces the estimate by the actual usage."""
        self.tokens.settle(tokens - demand.tokens)
        if self._apart:
            for limit, rate in self._apart.items():
                actual = output_tokens if limit is Limit.OUTPUT_TOKENS else tokens - output_tokens
                rate.settle(actual - _part(limit, demand))

    def _guard(self, limit: Limit, rate: float | None) -> None:
        """Limits requests to `rate`: per second for `REQUESTS_PER_SECOND`, else per minute."""
        if rate is not None:
            per_s = rate if limit is Limit.REQUESTS_PER_SECOND else rate / 60
            # measured with 1.3.0: a limiter starts with its whole burst, so bursts are small; and a changed `max_rate`
            # does not change its leak, so a new limit gets a new limiter
            burst = max(1.0, per_s * _GUARDED[limit])
            self._guards[limit] = AsyncLimiter(burst, burst / per_s)


def _part(limit: Limit, demand: Demand) -> int:
    """The part of the attempt's tokens that this limit counts."""
    return demand.output_tokens if limit is Limit.OUTPUT_TOKENS else demand.input_tokens
