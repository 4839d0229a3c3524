"""A row's history of attempts: when the row is given up, and how long it waits before its next attempt. PURE.

docs/failures.md ("What counts against a row") explains the rules.
"""

import math

import msgspec

from batchrun.job.settings import Retry
from batchrun.policy import QUOTA, Judgement
from batchrun.records import Verdict
from batchrun.row_status import Settlement

SHARE_OF = 50
"""The share of failing first attempts is averaged over about so many."""

USUAL_SHARE = 0.03
"""A usual share of failures. Four in a row then happen to one row in a million."""

MAX_STRETCH = 5.0
"""How much higher the caps get at most, when half of all attempts or more fail: twenty 5xx instead of four."""

END_S = 90.0
"""When only rows that failed are left, nothing shows whether they or the endpoint are at fault. The attempts of such a
row then take at least so long, so that an outage of a minute fails no row."""

REFUSED_S = 300.0
"""The same after a 429: limits of a minute and of five minutes are lifted by then."""

LEFT_PER_PATIENCE = 12
"""The patience grows by its own length for every so many rows left."""

MOST_LEFT = 1_000
"""While more untried rows than this are left, the run is not at its end, no matter how many rows fail."""

REFUSALS = 4
"""A row is given up after so many times `retry.max_attempts` 429s while others are answered. That takes ten minutes
with the usual waits, and five times as many where half of all attempts are refused."""

SHORT_WAITS = 6
"""For so many 429s a row waits only as long as Retry-After says, or without one as after its first failure: the rate is
the gate's to lower. Then its waits double, as if half of these 429s had not come: by chance alone a row may get six,
and all six at once would make it wait for half a minute where the others are answered."""

CHANCE_REFUSED = 2
"""At the end of a run, so many refusals in a row are still chance, and the row waits as long as Retry-After says."""


class History(msgspec.Struct, frozen=True):
    """A row's attempts, and those that count against its caps.

    `corrected`: how often the model was sent what was wrong with its answer. `corroborated`: the counted attempts
    during which another row was answered. `refused`: 429s while other rows were answered; `refused_alone`: consecutive
    429s at the end of the run, while no row was answered. `capacity_refusals`: by a service tier that was full. None
    of these counts against the other caps.
    """

    attempts: int = 0
    counted: int = 0
    counted_5xx: int = 0
    maybe_billed: int = 0
    corrected: int = 0
    corroborated: int = 0
    refused: int = 0
    refused_alone: int = 0
    capacity_refusals: int = 0


NEW = History()
ONCE = History(attempts=1)
"""Nearly all rows have only these two, before and after their answer; shared to save their construction."""


def answered(history: History) -> History:
    """`history` with one more attempt, which was answered and counts against no cap."""
    if history is NEW:
        return ONCE
    return msgspec.structs.replace(history, attempts=history.attempts + 1)


def after(history: History, judgement: Judgement, *, corroborated: bool, at_end: bool = False) -> History:
    """`history` with one more attempt that failed.

    It counts against the row only if another row succeeded meanwhile (`corroborated`), or if only rows that have failed
    are left (`at_end`). A 429 never counts here (`refused`).
    """
    status, chargeable = judgement.http_status, judgement.is_chargeable
    # Alone, a failure may be an outage, which must fail no row. At the end no other row is left to show that.
    counts = (corroborated or at_end) and chargeable
    # A 503 for overload is SLOW: it counts as an attempt, and not as the server's own failure.
    server_error = status is not None and status >= 500 and judgement.verdict is not Verdict.SLOW
    return History(
        attempts=history.attempts + 1,
        counted=history.counted + counts,
        counted_5xx=history.counted_5xx + (counts and server_error),
        maybe_billed=history.maybe_billed + (counts and judgement.verdict is Verdict.MAYBE),
        corrected=history.corrected,
        corroborated=history.corroborated + (corroborated and chargeable),
        refused=history.refused,
        refused_alone=history.refused_alone,
        capacity_refusals=history.capacity_refusals + judgement.is_capacity,
    )


def refused(history: History, judgement: Judgement, *, corroborated: bool, at_end: bool) -> History:
    """`history` with the last attempt's 429 counted, if it was one.

    `corroborated`: another row was answered meanwhile.
    """
    if not judgement.is_refusal:
        return history
    if corroborated:  # the limit lets other rows through
        return msgspec.structs.replace(history, refused=history.refused + 1, refused_alone=0)
    # A quota may be a month's: at the end of the run it pauses the run and fails no row.
    is_quota = judgement.error is not None and judgement.error.kind == QUOTA
    return msgspec.structs.replace(history, refused_alone=history.refused_alone + (at_end and not is_quota))


def wrong_key(history: History) -> History:
    """`history` with one more attempt that was refused for its key, while other rows were answered.

    One key of several may be bad, which is no row's fault. It counts as two 429s do: twelve such refusals of one row
    are no longer chance, where half of all keys are good.
    """
    return msgspec.structs.replace(
        history,
        attempts=history.attempts + 1,
        refused=history.refused + 2,
        corroborated=history.corroborated + 1,
    )


def is_refused_for_good(history: History, retry: Retry, share: float) -> bool:
    """Whether the row is refused for itself. `share`: the share of good rows that are refused by chance."""
    return history.refused >= REFUSALS * retry.max_attempts * _by_chance(share) or history.refused_alone >= max(
        retry.max_attempts, CHANCE_REFUSED + 1
    )


def patience_s(least_s: float, left: int, retry: Retry) -> float:
    """Seconds without any answer after which the `left` rows may be at fault: longer for more rows, at most half of the
    longest outage.
    """
    return min(least_s * (1 + left / LEFT_PER_PATIENCE), retry.max_outage_s / 2)


def after_unwanted_answer(history: History, settled: Settlement, retry: Retry) -> History | None:
    """`history` after an answer that is set aside for a retry; None if the row keeps this answer."""
    if settled.correctable and history.corrected < retry.invalid:
        return msgspec.structs.replace(history, corrected=history.corrected + 1)
    if settled.action != "retry":
        return None
    counted = msgspec.structs.replace(history, counted=history.counted + 1)
    return None if exhausted(counted, retry) else counted


def exhausted(history: History, retry: Retry, stretched: float = 1.0) -> bool:
    """True if the row has reached one of its caps and is settled as `error`. `stretched` raises two of them."""
    return (
        history.counted >= retry.max_attempts * stretched
        or history.counted_5xx >= retry.max_5xx * stretched
        or history.maybe_billed > retry.max_maybe_billed  # never stretched: each of these may be paid for
    )


def end_wait_s(history: History, judgement: Judgement, retry: Retry, left: int = 1) -> float:
    """The least wait in seconds before the next attempt at the end of a run, so that a row's attempts take `END_S` or
    half of the longest outage. 0 if another row was answered while this one failed.

    After a 429 Retry-After alone counts; from the third on the attempts are spread over `REFUSED_S`, or longer if more
    rows are `left`.
    """
    if judgement.is_refusal:
        few = history.refused_alone < CHANCE_REFUSED
        spread = max(1, retry.max_attempts - CHANCE_REFUSED)
        return 0.0 if few else patience_s(REFUSED_S, left, retry) / spread
    if history.corroborated or not judgement.is_chargeable:
        return 0.0
    status = judgement.http_status
    attempts = retry.max_attempts
    if judgement.verdict is Verdict.MAYBE:
        attempts = min(attempts, retry.max_maybe_billed + 1)
    elif judgement.verdict is Verdict.FREE and status is not None and status >= 500:
        attempts = min(attempts, retry.max_5xx)
    return min(END_S, retry.max_outage_s / 2) / max(1, attempts - 1)


def share_of_first(share: float, history: History, *, counts: bool) -> float:
    """The share of first attempts that ended in some way (`counts`), with one more attempt.

    Later attempts change nothing: a row that always fails would count again and again.
    """
    return share if history.attempts > 1 else share + (counts - share) / SHARE_OF


def stretch(share: float) -> float:
    """How much higher a row's caps are while this share of first attempts fails: chance alone must reach them no more
    often than on a healthy endpoint. With 30 % failing, four 5xx in a row would hit one row in 120.
    """
    return min(MAX_STRETCH, _by_chance(share))


def _by_chance(share: float) -> float:
    """How many failures in a row are as unlikely at this share as one is at the usual share."""
    return 1.0 if share <= USUAL_SHARE else math.log(USUAL_SHARE) / math.log(min(share, 0.999))


# rows that were refused together must not come back together, however short the wait
LEAST_JITTER_S = 0.1
RETRY_AFTER_JITTER = 0.25  # of the wait: enough to spread them, and the wait is hardly longer


def backoff_s(history: History, floor_s: float | None, retry: Retry, uniform: float) -> float:
    """Seconds until the next attempt: full jitter below a doubling ceiling, on top of a Retry-After (`floor_s`).

    `uniform` is a random number in [0, 1).
    """
    few_refused = history.refused < SHORT_WAITS
    doublings = history.attempts - 1 - (history.refused if few_refused else SHORT_WAITS // 2)
    # clamped first, jittered then: else all late delays would be equal
    ceiling_s = min(retry.backoff_cap_s, retry.backoff_base_s * 2.0 ** max(0, min(doublings, 30)))
    if floor_s and few_refused:
        # the server has said how long; jitter only spreads the rows
        ceiling_s = min(ceiling_s, max(LEAST_JITTER_S, RETRY_AFTER_JITTER * floor_s))
    return min(floor_s or 0.0, retry.max_wait_s) + uniform * ceiling_s


def capacity_wait_s(history: History, floor_s: float | None, retry: Retry, uniform: float) -> float:
    """Seconds until a row is sent again to a service tier that was full: as `backoff_s`, but up to `retry.max_wait_s`,
    since rows that wait for capacity slow nothing down and would otherwise be sent each minute for hours.
    """
    ceiling_s = min(retry.max_wait_s, retry.backoff_base_s * 2.0 ** min(history.capacity_refusals - 1, 30))
    return min(floor_s or 0.0, retry.max_wait_s) + uniform * ceiling_s
