"""How a request is served: its service tier and its key in the provider's prompt cache. Neither changes the question.

Both are chosen for each attempt and appended to the body as it is sent.
"""

from collections.abc import Callable

import msgspec

from batchrun import attempt_caps, prices
from batchrun.attempt_caps import History
from batchrun.dispatch.backlog import Pending
from batchrun.dispatch.cache_keys import NO_KEY, CacheKeys, Key
from batchrun.errors import ExitCode
from batchrun.job.job import Job
from batchrun.limits.admission import Stop
from batchrun.policy import Judgement
from batchrun.records import OK

LATE = 0.8
"""A deadline is in danger if the rest of the rows takes more than this share of the time that is left: the forecast
is the pace of the last minutes, which a slower tier has not yet shown."""

EARLY = 0.5
"""Below this share rows go back to the first tier."""


class Serving:
    """One per event loop. `shares_no_prefix`: no request has a key in the prompt cache, and no row waits for one.
    `is_plain`: nor does any name a service tier.
    """

    def __init__(self, job: Job, dialect: str, clock: Callable[[], float]) -> None:
        self._tier = job.request.service_tier
        self._fallback = job.tiers.fallback
        self._after_refusals = job.tiers.after_refusals
        self._retry = job.retry
        self._lines_may_differ = dialect == "openai-batch"
        self._sends_keys = "prompt_cache_key" not in job.request.extra
        self._keys = CacheKeys[Pending](clock) if job.request.cache_prefix else None
        self.shares_no_prefix = self._keys is None
        named_by_job = self._tier is not None or self._fallback is not None
        self.is_plain = self.shares_no_prefix and not named_by_job and not self._lines_may_differ
        self._clock = clock
        self._full_since_s: float | None = None
        self._behind_deadline = False

    def choose_tier(self, done_in_s: float | None, left_s: float) -> str | None:
        """The tier that rows go to from now on, if it changes. `done_in_s`: how long the rest takes at the present pace
        (None: no end in sight), `left_s`: until the last request can be sent.
        """
        if self._fallback is None:
            return None
        limit_s = (EARLY if self._behind_deadline else LATE) * left_s
        behind = done_in_s is None or done_in_s > limit_s
        if behind == self._behind_deadline:
            return None
        self._behind_deadline = behind
        return self._fallback if behind else self._tier

    def cache_key(self, pending: Pending, *, may_wait: bool) -> Key | None:
        """The key of the row's next request; None: the row has to wait for the first of its group."""
        return NO_KEY if self._keys is None else self._keys.key_for(pending.request.body, may_wait=may_wait)

    def park(self, pending: Pending) -> bool:
        """The row waits for the first of its group; False: too many rows wait already."""
        return self._keys is not None and self._keys.park(pending.request.body, pending)

    def ended(self, key: Key, *, answered: bool = False) -> list[Pending]:
        """The rows that waited for this request, which has ended or was not sent."""
        return [] if self._keys is None else self._keys.ended(key, answered=answered)

    def tier(self, pending: Pending) -> str | None:
        """The service tier of the row's next request; None: it names none."""
        if self._lines_may_differ and (own := prices.named_tier(pending.request.body)) is not None:
            return own
        if self._fallback is not None and (self._behind_deadline or self._has_given_up(pending.history)):
            return self._fallback
        return self._tier

    def body(self, body: bytes, tier: str | None, key: Key) -> bytes:
        """The body as it is sent."""
        fields = b""
        if self._tier is not None and not (self._lines_may_differ and prices.named_tier(body) is not None):
            fields += b',"service_tier":' + msgspec.json.encode(tier)
        if key.name and self._sends_keys and not (self._lines_may_differ and b'"prompt_cache_key"' in body):
            fields += b',"prompt_cache_key":' + msgspec.json.encode(key.name)
        return body[:-1] + fields + b"}" if fields else body

    def stop_for(self, judgement: Judgement) -> Stop | None:
        """Why the run pauses: the tier has had no capacity for `retry.max_outage_s`, and there is no other tier."""
        if judgement.verdict is OK:
            self._full_since_s = None
            return None
        if not judgement.is_capacity or self._fallback is not None or judgement.error is None:
            return None
        if self._full_since_s is None:
            self._full_since_s = self._clock()
        if self._clock() - self._full_since_s <= self._retry.max_outage_s:
            return None
        way_out = "run again later, set tiers.fallback, or --set request.service_tier=default"
        why = f"the service tier has had no capacity for {self._retry.max_outage_s / 60:.0f} minutes"
        return Stop(ExitCode.PAUSED, f"{why}: {judgement.error.text}; {way_out}")

    def wait_s(self, history: History, judgement: Judgement, uniform: float) -> float:
        """Seconds until a row is sent again that its tier had no capacity for; none before it goes to another tier."""
        if self._fallback is not None and self._has_given_up(history):
            return 0.0
        return attempt_caps.capacity_wait_s(history, judgement.retry_after_s, self._retry, uniform)

    def _has_given_up(self, history: History) -> bool:
        return history.capacity_refusals >= self._after_refusals
