"""How far a model's answers are billed beyond the upper bounds of their requests. PURE.

A request is bounded by its bytes (prompt) and by `max_tokens` (answer). Some servers bill reasoning beyond `max_tokens`
or add a prompt of their own. Only an answer shows it: under a budget, a model's first answer must arrive before more
of its requests are sent, and later ones reserve more.
"""

from collections import Counter
from collections.abc import Mapping

import msgspec

from batchrun.limits.admission import Demand
from batchrun.records import OK, Request, Usage, Verdict

ENTRY = "overruns"
"""The manifest entry of all overruns."""

ROOM = 2
"""The factor on the largest overrun that is reserved: the next answer may reason for longer."""


class Overrun(msgspec.Struct, frozen=True):
    """The most tokens an answer was billed beyond its request's bounds; zeros if it kept to them."""

    prompt_tokens: int = 0
    output_tokens: int = 0


KEPT = Overrun()


class _Entry(msgspec.Struct, frozen=True):
    """`variant` numbers the run's settings: another one may ask for more reasoning."""

    variant: int = 0
    models: dict[str, Overrun] = {}


class Overruns:
    """The largest overrun of each model that has answered. One per run."""

    def __init__(self, known: Mapping[str, Overrun] | None = None, *, variant: int = 0, tried: bool = True) -> None:
        """`known` comes from earlier processes. `tried` is false if that was another variant, which proves nothing."""
        self._variant = variant
        self._largest = dict(known or {})
        self._answered = set(self._largest) if tried else set[str]()
        self._failed: Counter[str] = Counter()
        self._new: list[tuple[str, Overrun]] = []

    def taken(self) -> list[tuple[str, Overrun]]:
        """The models first seen to overrun since the last call."""
        new, self._new = self._new, []
        return new

    def widened(self, demand: Demand) -> Demand:
        """The attempt with its upper bounds raised by the model's overruns."""
        largest = self._largest.get(demand.model)
        if largest is None or largest == KEPT:
            return demand
        prompt, output = ROOM * largest.prompt_tokens, ROOM * largest.output_tokens
        pico_usd = demand.upper_bound_pico_usd
        if pico_usd is not None:
            pico_usd += prompt * demand.pico_usd_per_token_in + output * demand.pico_usd_per_token_out
        tokens = demand.upper_bound_tokens + prompt + output
        return msgspec.structs.replace(demand, upper_bound_pico_usd=pico_usd, upper_bound_tokens=tokens)

    def most_in_flight(self, model: str) -> int | None:
        """How many requests of the model may be in flight before its first answer; None once it has answered.

        One, plus one for each that failed, so that rows without an answer don't force all others to go one by one.
        """
        return None if model in self._answered else 1 + self._failed[model]

    def ended(self, model: str, verdict: Verdict) -> None:
        """Records an attempt's end. An answer without usage also counts as the first answer: no other would show more.

        A refused or unreached attempt says nothing, as it will be sent again.
        """
        if verdict is OK:
            self._answered.add(model)
        elif verdict in (Verdict.ROW, Verdict.MAYBE):
            self._failed[model] += 1

    def learn(self, request: Request, usage: Usage) -> bool:
        """Learns from an answer's usage; True if the entry must be saved."""
        known, prompt_tokens = self._largest.get(request.model), usage.prompt_tokens
        if (
            known is KEPT  # the usual case: no overrun before, and none now
            and prompt_tokens <= request.max_prompt_tokens
            and usage.completion_tokens <= request.max_output_tokens
            and usage.total_tokens - prompt_tokens <= request.max_output_tokens
            and request.model in self._answered
        ):
            return False
        before, output_tokens = known or KEPT, usage.billed_output_tokens
        seen = Overrun(
            max(before.prompt_tokens, prompt_tokens - request.max_prompt_tokens),
            max(before.output_tokens, output_tokens - request.max_output_tokens),
        )
        if seen != KEPT and before == KEPT:
            self._new.append((request.model, seen))
        is_news = seen != known or request.model not in self._answered
        self._largest[request.model] = KEPT if seen == KEPT else seen
        self._answered.add(request.model)
        return is_news

    def encode(self) -> str:
        """The manifest entry."""
        return msgspec.json.encode(_Entry(self._variant, self._largest)).decode()


def decode(entry: str | None, variant: int) -> Overruns:
    """Reads the manifest entry; empty if it is missing or of another version."""
    try:
        kept = msgspec.json.decode(entry or "{}", type=_Entry)
    except msgspec.MsgspecError:
        kept = _Entry()
    return Overruns(kept.models, variant=variant, tried=kept.variant == variant)


def in_words(model: str, overrun: Overrun) -> str:
    """The warning about a model that overruns."""
    parts = [
        f"{tokens:,} {kind} tokens beyond {bound}"
        for tokens, kind, bound in (
            (overrun.output_tokens, "output", "max_tokens"),
            (overrun.prompt_tokens, "prompt", "what was sent"),
        )
        if tokens
    ]
    return f"an answer of {model} was billed {' and '.join(parts)}: budgets reserve more for its requests from now on"
