"""The frozen values that go into the gate and come out of it."""

from enum import StrEnum

import msgspec

from batchrun.errors import ExitCode
from batchrun.records import RowError, Verdict


class Demand(msgspec.Struct, frozen=True, gc=False):
    """What one attempt needs from the limits.

    `tokens` estimates prompt and answer together, `output_tokens` is the answer's part. The upper bounds are the most
    it may cost and use; `upper_bound_pico_usd` may be None only without `max_cost_usd`. Prices are the highest that
    may apply. Without a `model`, the bounds are never raised for overruns.
    """

    tokens: int
    upper_bound_pico_usd: int | None = None
    upper_bound_tokens: int = 0
    output_tokens: int = 0
    model: str = ""
    pico_usd_per_token_in: int = 0
    pico_usd_per_token_out: int = 0

    @property
    def input_tokens(self) -> int:
        """The prompt's part of `tokens`."""
        return self.tokens - self.output_tokens


class Found(msgspec.Struct, frozen=True):
    """Rate limits found from headers or refusals; None where none was found."""

    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None


class Stop(msgspec.Struct, frozen=True):
    """Why the run stops admitting attempts, and its exit code."""

    exit_code: ExitCode
    why: str


class Open(msgspec.Struct, frozen=True):
    """Attempts are admitted, as many at once as `InFlight` allows."""


class Cooling(msgspec.Struct, frozen=True):
    """Nothing is admitted before `until_s` on the gate's clock. `because` is the reason in a word or two.

    `probe`: then one row is sent first, and the others once it is answered.
    """

    until_s: float
    why: str
    because: str
    probe: bool = True


class Probing(msgspec.Struct, frozen=True):
    """One row at a time is sent, to find out whether `why` still holds."""

    why: str


class Stopped(msgspec.Struct, frozen=True):
    """Nothing is admitted any more in this process."""

    stop: Stop


Phase = Open | Cooling | Probing | Stopped
OPEN = Open()
"""The only instance, so that the hot path can test `phase is OPEN`."""


class Limit(StrEnum):
    """What the next row waits for, as the progress line names it."""

    REQUESTS = "rpm"
    REQUESTS_PER_SECOND = "rps"
    REQUESTS_PER_DAY = "requests per day"
    TOKENS = "tpm"
    INPUT_TOKENS = "input tpm"
    OUTPUT_TOKENS = "output tpm"
    IN_FLIGHT = "in flight"
    BUDGET = "budget"
    COOLING = "cooling"
    PROBING = "probing"
    STOPPED = "stopped"
    LATENCY = "latency"


class Binding(msgspec.Struct, frozen=True):
    """The limit that blocks the next attempt, and why; `until_s` (gate's clock) if time alone lifts it."""

    limit: Limit
    until_s: float | None = None
    because: str = ""


class Outcome(msgspec.Struct, frozen=True):
    """How one attempt ended, as far as the gate needs to know.

    `says_nothing`: no evidence about the endpoint, because rows like this one fail while others are answered, or only
    rows that failed before are left. The failure counts against the row, whose own backoff limits the rate.
    """

    row: int
    verdict: Verdict
    error: RowError | None = None
    retry_after_s: float | None = None
    says_nothing: bool = False


class Decision(msgspec.Struct, frozen=True):
    """What an outcome means for rows.

    `hold`: the verdict concerns the whole run and is not confirmed: keep this row unsettled, and send it again only
    when no other row is left. `own`: rows held earlier whose verdict proved to be only theirs: settle them by it (with
    `hold`: this row, at once). A row still held when the gate has closed stays pending. `elsewhere`: this row or held
    ones, whose endpoint was set aside: send them again, to another endpoint.
    """

    hold: bool = False
    own: tuple[int, ...] = ()
    elsewhere: tuple[int, ...] = ()
