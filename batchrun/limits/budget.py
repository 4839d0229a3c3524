"""The budget: hard caps on dollars, tokens and requests, which unlike rates do not refill. PURE."""

from decimal import ROUND_FLOOR, Decimal
from typing import Protocol

from batchrun.limits.admission import Demand
from batchrun.money import in_words, to_pico, to_usd
from batchrun.run_summary import BudgetUse


class Cap:
    """One hard cap: spent + reserved never exceeds `most`.

    `spent` starts at what earlier processes of the run spent, possibly billed attempts at their upper bounds.
    """

    __slots__ = ("most", "reserved", "spent")

    def __init__(self, most: int, spent: int) -> None:
        self.most = most
        self.spent = spent
        self.reserved = 0

    def fits(self, bound: int) -> bool:
        """Whether an attempt with this upper bound can be sent without exceeding the cap."""
        return self.spent + self.reserved + bound <= self.most

    def reserve(self, bound: int) -> None:
        """Sets the upper bound aside until `settle`."""
        self.reserved += bound

    def settle(self, bound: int, spent: int | None) -> None:
        """Replaces the reservation by what was spent; None (unknown) spends all of it."""
        self.reserved -= bound
        self.spent += bound if spent is None else spent


class Settleable(Protocol):
    """Money of a budget over time that is reserved for this process."""

    def settle(self, bound_pico_usd: int, spent_pico_usd: int | None) -> None:
        """Replaces a reservation by what was spent; None (unknown) leaves all of it in doubt."""


class OverTime(Protocol):
    """A budget that several runs share, by day and month. It gets its money in steps, and wakes the gate after each."""

    def fits(self, bound_pico_usd: int) -> bool:
        """Whether so much can be reserved now. If not, more is on its way or `is_used_up`."""

    def reserve(self, bound_pico_usd: int) -> Settleable:
        """Sets the upper bound aside until it is settled with the lease."""

    def is_used_up(self, bound_pico_usd: int) -> bool:
        """Whether so much can't come any more, with nothing of this process in flight."""

    def refusal(self, bound_pico_usd: int) -> str:
        """How much of it is used, when it opens again, and which setting to raise."""

    def tidy(self) -> None:
        """Gives back what this process does not need."""

    def uses(self) -> list[BudgetUse]:
        """How much of each cap is used."""


class BudgetAccount:
    """The caps of one budget, reserved together or not at all. None: no such cap.

    `is_kept`: there is any cap. `rests_on_bounds`: one relies on the upper bounds of what is in flight.
    """

    __slots__ = ("cost", "is_kept", "name", "over_time", "requests", "rests_on_bounds", "start", "tokens")

    def __init__(
        self,
        *,
        cost: Cap | None = None,
        tokens: Cap | None = None,
        requests: Cap | None = None,
        start: Cap | None = None,
        over_time: OverTime | None = None,
        name: str = "",
    ) -> None:
        """`cost` and `start`, which is this start's alone, are in 10⁻¹² USD; `over_time` is shared with other runs by
        its `name`.
        """
        self.cost = cost
        self.tokens = tokens
        self.requests = requests
        self.start = start
        self.over_time = over_time
        self.name = name
        caps_cost = cost is not None or start is not None or over_time is not None
        self.rests_on_bounds = tokens is not None or caps_cost
        self.is_kept = self.rests_on_bounds or requests is not None

    def fits(self, demand: Demand) -> bool:
        """Whether the attempt can be sent without exceeding a cap.

        Raises:
            ValueError: it has no upper bound, so the cap can't be kept: the caller's bug.
        """
        return self._fits_run(demand) and (self.over_time is None or self.over_time.fits(_bound_pico_usd(demand)))

    def may_come(self, demand: Demand) -> bool:
        """Whether an attempt that does not fit may fit later, though nothing of this process is in flight."""
        over_time = self.over_time
        return over_time is not None and self._fits_run(demand) and not over_time.is_used_up(_bound_pico_usd(demand))

    def _fits_run(self, demand: Demand) -> bool:
        """The same as `fits`, for the caps of this run and start alone."""
        return (
            (self.requests is None or self.requests.fits(1))
            and (self.tokens is None or self.tokens.fits(demand.upper_bound_tokens))
            and (self.cost is None or self.cost.fits(_bound_pico_usd(demand)))
            and (self.start is None or self.start.fits(_bound_pico_usd(demand)))
        )

    def uses(self) -> list[BudgetUse]:
        """How much is used of the caps that hold for a start, a day or a month."""
        found = [] if self.over_time is None else self.over_time.uses()
        if (cap := self.start) is not None:
            amounts = to_usd(cap.most), to_usd(cap.spent), Decimal(0)
            found.append(BudgetUse(self.name, "per_start_usd", "start", *amounts, None))
        return found

    def reserve(self, demand: Demand) -> Settleable | None:
        """Sets the attempt's upper bounds aside until `settle`, which is to be given what this returns."""
        if self.cost is not None:
            self.cost.reserve(_bound_pico_usd(demand))
        if self.start is not None:
            self.start.reserve(_bound_pico_usd(demand))
        if self.tokens is not None:
            self.tokens.reserve(demand.upper_bound_tokens)
        if self.requests is not None:
            self.requests.reserve(1)
        return None if self.over_time is None else self.over_time.reserve(_bound_pico_usd(demand))

    def settle(
        self, demand: Demand, spent_pico_usd: int | None, spent_tokens: int | None, lease: Settleable | None = None
    ) -> None:
        """Replaces the attempt's reservation by what it used; None (unknown) uses all of it."""
        if lease is not None:
            lease.settle(_bound_pico_usd(demand), spent_pico_usd)
        if self.cost is not None:
            self.cost.settle(_bound_pico_usd(demand), spent_pico_usd)
        if self.start is not None:
            self.start.settle(_bound_pico_usd(demand), spent_pico_usd)
        if self.tokens is not None:
            self.tokens.settle(demand.upper_bound_tokens, spent_tokens)
        if self.requests is not None:
            self.requests.settle(1, None)

    def change(self, *, cost_usd: Decimal | None, tokens: int | None, requests: int | None) -> None:
        """Changes caps; None leaves one as it is. What was sent under the old caps stays sent.

        Raises:
            ValueError: the run started without this cap, so its spending was not counted.
        """
        for setting, cap, most in (
            ("max_cost_usd", self.cost, cost_usd),
            ("max_tokens", self.tokens, tokens),
            ("max_requests", self.requests, requests),
        ):
            if most is not None and cap is None:
                raise ValueError(f"this start has no budget.{setting} that could be changed")
        if self.cost is not None and cost_usd is not None:
            self.cost.most = to_pico(cost_usd, ROUND_FLOOR)
        if self.tokens is not None and tokens is not None:
            self.tokens.most = tokens
        if self.requests is not None and requests is not None:
            self.requests.most = requests

    def refusal(self, demand: Demand) -> str:
        """Why the attempt does not fit, and which setting to raise."""
        reasons, cost, tokens, requests = list[str](), self.cost, self.tokens, self.requests
        if cost is not None and not cost.fits(bound := _bound_pico_usd(demand)):
            reasons.append(
                f"{in_words(cost.spent)} of {in_words(cost.most)} spent, and the next request may cost "
                f"{in_words(bound)}; raise budget.max_cost_usd"
            )
        if tokens is not None and not tokens.fits(demand.upper_bound_tokens):
            reasons.append(
                f"{tokens.spent:,} of {tokens.most:,} tokens used, and the next request may use "
                f"{demand.upper_bound_tokens:,}; raise budget.max_tokens"
            )
        if requests is not None and not requests.fits(1):
            reasons.append(f"{requests.spent:,} of {requests.most:,} requests sent; raise budget.max_requests")
        if (start := self.start) is not None and not start.fits(bound := _bound_pico_usd(demand)):
            reasons.append(
                f"{in_words(start.spent)} of {in_words(start.most)} spent in this start, and the next request may cost "
                f"{in_words(bound)}; the same command resumes with as much again; or raise budget.per_start_usd"
            )
        if self.over_time is not None and self.over_time.is_used_up(bound := _bound_pico_usd(demand)):
            reasons.append(self.over_time.refusal(bound))
        return f"the budget is used up: {'; '.join(reasons)} and run again"


def _bound_pico_usd(demand: Demand) -> int:
    if demand.upper_bound_pico_usd is None:
        raise ValueError("there is a cap on cost, but the request came without an upper bound of its cost")
    return demand.upper_bound_pico_usd
