"""What a run reports once about the answers it gets: unknown finish reasons, service tiers without a price. PURE."""

from batchrun.response.finish_reasons import Meaning, meaning_of


def unknown_reason(reason: str) -> str:
    """What happens to answers that end with a finish_reason that batchrun does not know."""
    seen = f"answers ended with the finish_reason {reason!r}, which batchrun does not know"
    match meaning_of(reason):
        case Meaning.OTHER:
            return f"{seen}: finish.other decides on them"
        case Meaning.FAILURE:
            return f"{seen} and takes for a failure by its words: they are retried"
        case meaning:
            return f"{seen} and takes for {meaning.value} by its words: finish.{meaning.value} decides on them"


def unpriced_tier(tier: str) -> str:
    """What it means for the cost that a service tier has no known price, and what to do."""
    return (
        f"answers came from the service tier {tier!r}, whose price is unknown, while the model's plain price is known: "
        'their cost_usd is null; a price in [pricing."MODEL"] applies to every tier'
    )
