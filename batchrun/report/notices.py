"""Warnings that a run reports once, about its answers: unknown finish reasons, service tiers without a price, budgets
that are nearly used. PURE.
"""

from batchrun.response.finish_reasons import Meaning, meaning_of
from batchrun.run_summary import BudgetUse


def unknown_reason(reason: str) -> str:
    """The treatment of answers with a finish_reason that batchrun does not know."""
    seen = f"answers ended with the finish_reason {reason!r}, which batchrun does not know"
    match meaning_of(reason):
        case Meaning.OTHER:
            return f"{seen}: finish.other decides on them"
        case Meaning.FAILURE:
            return f"{seen} and takes for a failure by its words: they are retried"
        case meaning:
            return f"{seen} and takes for {meaning.value} by its words: finish.{meaning.value} decides on them"


def nearly_used(use: BudgetUse) -> str:
    """How much of a cap over time is used, and when it opens again."""
    used = use.spent_usd + use.in_doubt_usd
    period = f"{use.period} ({use.budget})" if use.opens_at is not None else "this start"
    opens = f"; it opens again at {use.opens_at:%Y-%m-%d %H:%M %Z}" if use.opens_at is not None else ""
    share = f"{used / use.cap_usd:.0%} of budget.{use.setting} is used"
    return f"{share}: ${used:,.6f} of ${use.cap_usd:,.2f} in {period}{opens}"


def unpriced_tier(tier: str) -> str:
    """The effect on the cost of a service tier without a known price, and advice."""
    return (
        f"answers came from the service tier {tier!r}, whose price is unknown, while the model's plain price is known: "
        'their cost_usd is null; a price in [pricing."MODEL"] applies to every tier'
    )


def unpriced_usage(what: str) -> str:
    """The effect on the cost of answers that used more than text, and advice."""
    return (
        f"answers used {what}, which the price list has no price for: their cost_usd is what the server states, else "
        'null; a price in [pricing."MODEL"] applies to all that the model does'
    )
