"""How far the answers of each model are billed beyond the bounds of their requests. PURE.

A request is bounded by its bytes for the prompt and by `max_tokens` for the answer. Some servers write reasoning beyond
the one, or add a prompt of their own to the other. Only an answer shows it, so under a cap the first answer of a model
is waited for before more of its requests go out; from then on more is reserved for each.
"""

from collections import Counter
from collections.abc import Mapping
from decimal import ROUND_UP, Decimal

import msgspec

from batchrun.limits.admission import Ask
from batchrun.records import Request, Usage, Verdict

ENTRY = "overruns"
"""The manifest's entry that holds them."""

ROOM = 2
"""So many times the largest overrun so far is reserved: the next answer may reason for longer than the first."""

_PICO = Decimal("1e-12")


class Overrun(msgspec.Struct, frozen=True):
    """The most tokens that an answer was billed for beyond the bounds of its request; zeros where it kept to them."""

    prompt_tokens: int = 0
    output_tokens: int = 0


KEPT = Overrun()


class _Entry(msgspec.Struct, frozen=True):
    """`variant` is the way in which rows were asked: another one may ask for more reasoning."""

    variant: int = 0
    models: dict[str, Overrun] = {}


class Overruns:
    """The largest overrun of each model whose answers are known. One per run."""

    def __init__(self, known: Mapping[str, Overrun] | None = None, *, variant: int = 0, tried: bool = True) -> None:
        """`known` is what earlier starts saw. Not `tried`: that was in another variant, so this one has its trial."""
        self._variant = variant
        self._largest = dict(known or {})
        self._answered = set(self._largest) if tried else set[str]()
        self._failed: Counter[str] = Counter()
        self._new: list[tuple[str, Overrun]] = []

    def taken(self) -> list[tuple[str, Overrun]]:
        """The models that were seen to overrun since the last call."""
        new, self._new = self._new, []
        return new

    def widened(self, ask: Ask) -> Ask:
        """The ask, with bounds that its answer will keep as far as is known now."""
        largest = self._largest.get(ask.model)
        if largest is None or largest == KEPT:
            return ask
        prompt, output = ROOM * largest.prompt_tokens, ROOM * largest.output_tokens
        usd = ask.upper_bound_usd
        if usd is not None:
            more = (prompt * ask.usd_per_million_in + output * ask.usd_per_million_out) / 1_000_000
            usd = (usd + more).quantize(_PICO, ROUND_UP)
        tokens = ask.upper_bound_tokens + prompt + output
        return msgspec.structs.replace(ask, upper_bound_usd=usd, upper_bound_tokens=tokens)

    def most_in_flight(self, model: str) -> int | None:
        """How many requests of the model may be out before its first answer has come; None once it has.

        One, and one more for each that failed: rows that bring no answer must not make all others go one by one.
        """
        return None if model in self._answered else 1 + self._failed[model]

    def ended(self, model: str, verdict: Verdict) -> None:
        """An attempt has ended. An answer without usage ends the trial as well: no other one would show more.

        What was refused or not reached goes again, and says nothing.
        """
        if verdict is Verdict.OK:
            self._answered.add(model)
        elif verdict in (Verdict.ROW, Verdict.MAYBE):
            self._failed[model] += 1

    def learn(self, request: Request, usage: Usage) -> bool:
        """The usage of an answer is known; True where it must be kept for the next start."""
        known = self._largest.get(request.model)
        if known is KEPT and request.model in self._answered and _keeps_to_its_bounds(request, usage):
            return False  # nearly every answer
        before = known or KEPT
        seen = Overrun(
            max(before.prompt_tokens, usage.prompt_tokens - request.max_prompt_tokens),
            max(before.output_tokens, usage.billed_output_tokens - request.max_output_tokens),
        )
        if seen != KEPT and before == KEPT:
            self._new.append((request.model, seen))
        is_news = seen != known or request.model not in self._answered
        self._largest[request.model] = KEPT if seen == KEPT else seen
        self._answered.add(request.model)
        return is_news

    def encode(self) -> str:
        """The manifest's entry."""
        return msgspec.json.encode(_Entry(self._variant, self._largest)).decode()


def _keeps_to_its_bounds(request: Request, usage: Usage) -> bool:
    in_bounds = usage.prompt_tokens <= request.max_prompt_tokens
    return in_bounds and usage.billed_output_tokens <= request.max_output_tokens


def decode(entry: str | None, variant: int) -> Overruns:
    """What the manifest's entry says; nothing where there is none, or one that another version wrote."""
    try:
        kept = msgspec.json.decode(entry or "{}", type=_Entry)
    except msgspec.MsgspecError:
        kept = _Entry()
    return Overruns(kept.models, variant=variant, tried=kept.variant == variant)


def in_words(model: str, overrun: Overrun) -> str:
    """What a person should know of a model that overruns."""
    parts = [
        f"{tokens:,} {kind} tokens beyond {bound}"
        for tokens, kind, bound in (
            (overrun.output_tokens, "output", "max_tokens"),
            (overrun.prompt_tokens, "prompt", "what was sent"),
        )
        if tokens
    ]
    return f"an answer of {model} was billed {' and '.join(parts)}: budgets reserve more for its requests from now on"
