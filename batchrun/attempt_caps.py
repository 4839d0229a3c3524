"""What a row has been through: when it is given up, and how long it waits before its next attempt. PURE.

docs/guarantees.md ("What counts against a row") says it for readers; tests/unit/test_policy.py tries the bounds.
"""

import math

import msgspec

from batchrun.job.job import Retry
from batchrun.policy import QUOTA, Judgement, Settlement
from batchrun.records import Verdict

SHARE_OF = 50
"""First attempts that the share of failing ones is taken over."""

WELL_SHARE = 0.03
"""So many failures are usual. Four in a row are then one row in a million."""

MAX_STRETCH = 5.0
"""Of the caps, where half and more fails: twenty 5xx instead of four."""

TAIL_S = 90.0
"""When only rows that failed are left, nobody can tell whether they or the endpoint are at fault. Such a row has all of
its attempts over so long at least: an outage of a minute fails none."""

REFUSED_S = 300.0
"""The same after a 429: limits of a minute and of five are lifted by then."""

LEFT_PER_PATIENCE = 8
"""With so many rows more at stake, one such time more."""

MOST_LEFT = 1_000
"""With more rows than that untried it is no tail, whatever fails."""

REFUSALS = 4
"""Times `retry.max_attempts`: so often a row is refused with a 429 while others are answered, and is given up. With the
usual waits that takes ten minutes; where half of all attempts are refused it is five times as many."""

TOLD_SHORT = 6
"""So often a row waits no longer than a 429 says; then its waits double as after any failure."""

CHANCE_REFUSED = 2
"""So many refusals in a row at the tail are still chance, and the row waits as it was told."""


class History(msgspec.Struct, frozen=True):
    """What a row has been through: attempts made, and those that count against its caps.

    `corrected`: how often it was asked again with what was wrong with its answer. `witnessed`: the counted ones during
    which another row was answered. `refused`: 429s that it got while another row was answered; `refused_alone`: those
    at the tail, in a row, while none was. Neither is counted otherwise.
    """

    attempts: int = 0
    counted: int = 0
    counted_5xx: int = 0
    maybe_billed: int = 0
    corrected: int = 0
    witnessed: int = 0
    refused: int = 0
    refused_alone: int = 0


NEW = History()
ONCE = History(attempts=1)
"""Of nearly all rows: before and after the attempt that is answered."""


def answered(history: History) -> History:
    """`history` with one attempt more, which was answered: it counts against no cap."""
    if history is NEW:
        return ONCE
    return msgspec.structs.replace(history, attempts=history.attempts + 1)


def after(history: History, judgement: Judgement, *, corroborated: bool, at_tail: bool = False) -> History:
    """`history` with one attempt more.

    It counts against the row only if another row succeeded meanwhile (`corroborated`), so that an outage burns no row;
    or where only rows that have failed are left (`at_tail`), since no other row can succeed there any more.
    A wait that a 429 asked for never counts; an overload that only this row meets does.
    """
    status, chargeable = judgement.http_status, judgement.is_chargeable
    counts = (corroborated or at_tail) and chargeable
    server_error = status is not None and status >= 500 and judgement.verdict is not Verdict.SLOW
    return History(
        attempts=history.attempts + 1,
        counted=history.counted + counts,
        counted_5xx=history.counted_5xx + (counts and server_error),
        maybe_billed=history.maybe_billed + (counts and judgement.verdict is Verdict.MAYBE),
        corrected=history.corrected,
        witnessed=history.witnessed + (corroborated and chargeable),
        refused=history.refused,
        refused_alone=history.refused_alone,
    )


def refused(history: History, judgement: Judgement, *, corroborated: bool, at_tail: bool) -> History:
    """`history` with the refusal of its last attempt, if it was one.

    Another row's answer (`corroborated`) shows that a limit lets rows through. Alone at the tail a quota is not
    counted: it may be a month's, and pauses the run.
    """
    if not judgement.is_refusal:
        return history
    if corroborated:
        return msgspec.structs.replace(history, refused=history.refused + 1, refused_alone=0)
    is_quota = judgement.error is not None and judgement.error.kind == QUOTA
    return msgspec.structs.replace(history, refused_alone=history.refused_alone + (at_tail and not is_quota))


def is_refused_for_good(history: History, retry: Retry, share: float) -> bool:
    """Whether the row itself is why it is refused, where this share of rows is refused although they are fine."""
    return history.refused >= REFUSALS * retry.max_attempts * _by_chance(share) or history.refused_alone >= max(
        retry.max_attempts, CHANCE_REFUSED + 1
    )


def patience_s(least_s: float, left: int, retry: Retry) -> float:
    """Seconds without any answer after which the rows that are left may be at fault: more where more are at stake, and
    half of the longest outage at most.
    """
    return min(least_s * (1 + left / LEFT_PER_PATIENCE), retry.max_outage_s / 2)


def asked_again(history: History, settled: Settlement, retry: Retry) -> History | None:
    """`history` with an answer set aside, where the job wants another in its place; None where this one stands."""
    if settled.correctable and history.corrected < retry.invalid:
        return msgspec.structs.replace(history, corrected=history.corrected + 1)
    if settled.action != "retry":
        return None
    counted = msgspec.structs.replace(history, counted=history.counted + 1)
    return None if exhausted(counted, retry) else counted


def exhausted(history: History, retry: Retry, stretched: float = 1.0) -> bool:
    """True when the row has used up one of its caps and is settled as `error`.

    `stretched` lengthens the caps on what costs nothing; the one on what may have been billed stays.
    """
    return (
        history.counted >= retry.max_attempts * stretched
        or history.counted_5xx >= retry.max_5xx * stretched
        or history.maybe_billed > retry.max_maybe_billed
    )


def tail_wait_s(history: History, judgement: Judgement, retry: Retry, left: int = 1) -> float:
    """Seconds that a row waits at least before its next attempt at the tail, so that its attempts take `TAIL_S` or half
    of the longest outage; none where another row was answered while it failed. After a 429 it waits as it was told, but
    from the third on so that all take `REFUSED_S`, or more where more rows are `left`.
    """
    if judgement.is_refusal:
        few = history.refused_alone < CHANCE_REFUSED
        spread = max(1, retry.max_attempts - CHANCE_REFUSED)
        return 0.0 if few else patience_s(REFUSED_S, left, retry) / spread
    if history.witnessed or not judgement.is_chargeable:
        return 0.0
    status = judgement.http_status
    attempts = retry.max_attempts
    if judgement.verdict is Verdict.MAYBE:
        attempts = min(attempts, retry.max_maybe_billed + 1)
    elif judgement.verdict is Verdict.FREE and status is not None and status >= 500:
        attempts = min(attempts, retry.max_5xx)
    return min(TAIL_S, retry.max_outage_s / 2) / max(1, attempts - 1)


def failing_share(share: float, history: History, judgement: Judgement) -> float:
    """The share of first attempts that fail although their row may be fine, with one attempt more; over about
    `SHARE_OF` of them. First ones only: a row that fails for ever would show in it again and again.
    """
    return _share_of_first(share, history, judgement.verdict in (Verdict.FREE, Verdict.MAYBE))


def refused_share(share: float, history: History, judgement: Judgement) -> float:
    """The same for first attempts that are refused with a 429."""
    return _share_of_first(share, history, judgement.is_refusal)


def _share_of_first(share: float, history: History, counts: bool) -> float:
    return share if history.attempts > 1 else share + (counts - share) / SHARE_OF


def stretch(share: float) -> float:
    """How much longer a row's caps are while this share of first attempts fails: so long that chance alone uses them
    up no oftener than where the endpoint is well. With 30 % failing, four 5xx in a row are one row in 120.
    """
    return min(MAX_STRETCH, _by_chance(share))


def _by_chance(share: float) -> float:
    """How many times as many in a row are as rare where this share fails by chance as one is where few do."""
    return 1.0 if share <= WELL_SHARE else math.log(WELL_SHARE) / math.log(min(share, 0.999))


LEAST_JITTER_S = 0.1
TOLD_JITTER = 0.25


def backoff_s(history: History, floor_s: float | None, retry: Retry, uniform: float) -> float:
    """Seconds until the next attempt: full jitter below a doubling ceiling; a Retry-After is a floor under it.

    `uniform` is a random number in [0, 1). The ceiling is clamped first and jittered then, so late delays differ too.
    On top of a Retry-After comes a quarter of it at most: the server has said how long, and jitter only spreads rows.
    """
    ceiling_s = min(retry.backoff_cap_s, retry.backoff_base_s * 2.0 ** min(history.attempts - 1, 30))
    if floor_s and history.refused < TOLD_SHORT:
        ceiling_s = min(ceiling_s, max(LEAST_JITTER_S, TOLD_JITTER * floor_s))
    return min(floor_s or 0.0, retry.max_wait_s) + uniform * ceiling_s
