"""The frozen values the gate is spoken to in, and answers in."""

from decimal import Decimal
from enum import StrEnum

import msgspec

from batchrun.errors import ExitCode
from batchrun.records import RowError, Verdict


class Ask(msgspec.Struct, frozen=True):
    """What one attempt wants: `tokens`, an estimate of prompt and answer together, and the most it may cost and use.

    `output_tokens` is the answer's part of `tokens`. `upper_bound_usd` may be None only where no `max_cost_usd` is set.
    `model` is asked at these dearest prices; without a name, its answers are believed to keep to the bounds.
    """

    tokens: int
    upper_bound_usd: Decimal | None = None
    upper_bound_tokens: int = 0
    output_tokens: int = 0
    model: str = ""
    usd_per_million_in: Decimal = Decimal(0)
    usd_per_million_out: Decimal = Decimal(0)

    @property
    def input_tokens(self) -> int:
        """The prompt's part of `tokens`."""
        return self.tokens - self.output_tokens


class Found(msgspec.Struct, frozen=True):
    """Limits that were found, by headers or refusals; None where none was."""

    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None


class Stop(msgspec.Struct, frozen=True):
    """Why the run admits no more, and the exit code that says so."""

    exit_code: ExitCode
    why: str


class Open(msgspec.Struct, frozen=True):
    """Rows are admitted, as many at once as the ramp allows."""


class Cooling(msgspec.Struct, frozen=True):
    """Nothing is admitted before `until_s` on the machine's clock. `because` is the reason in a word or two.

    `probe`: one row goes first then, and all others when it is answered.
    """

    until_s: float
    why: str
    because: str
    probe: bool = True


class Probing(msgspec.Struct, frozen=True):
    """One row at a time is admitted, to see whether `why` still holds."""

    why: str


class Stopped(msgspec.Struct, frozen=True):
    """Nothing is admitted any more in this process."""

    stop: Stop


Phase = Open | Cooling | Probing | Stopped
OPEN = Open()
"""The one there is: `phase is OPEN` is the hot path's question."""


class Limit(StrEnum):
    """What the next row waits for, in the progress line's words."""

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
    """The limit that binds now, and why; `until_s`, on the gate's clock, where time alone lifts it."""

    limit: Limit
    until_s: float | None = None
    because: str = ""


class Outcome(msgspec.Struct, frozen=True):
    """What one attempt came to, as far as the gate must know: whose, which verdict, why, and the wait asked for.

    `says_nothing` of the endpoint: rows like this one fail while others are answered, or only rows that have failed are
    left, and each failure counts against its row. The row's own waits keep the pace.
    """

    row: int
    verdict: Verdict
    error: RowError | None = None
    retry_after_s: float | None = None
    says_nothing: bool = False


class Ruling(msgspec.Struct, frozen=True):
    """What an outcome means for rows.

    `hold`: the verdict is on the run and not yet corroborated: keep this row unsettled and ask it again only when no
    other row is left to ask. `own`: rows held earlier whose verdict has turned out to be their own: settle them by
    it. A row still held when the gate has closed stays pending.
    """

    hold: bool = False
    own: tuple[int, ...] = ()
