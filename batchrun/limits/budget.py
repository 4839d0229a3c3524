"""The budget: hard caps on dollars, tokens and requests, which unlike rates do not refill. PURE."""

from collections.abc import Iterator
from decimal import Decimal
from typing import Generic, Protocol, TypeVar

from batchrun.limits.admission import Demand
from batchrun.run_summary import BudgetUse

Amount = TypeVar("Amount", int, Decimal)


class Cap(Generic[Amount]):
    """One hard cap: spent + reserved never exceeds `most`.

    `spent` starts at what earlier processes of the run spent, possibly billed attempts at their upper bounds.
    """

    __slots__ = ("most", "reserved", "spent")

    def __init__(self, most: Amount, spent: Amount) -> None:
        self.most: Amount = most
        self.spent: Amount = spent
        self.reserved: Amount = type(spent)(0)

    def fits(self, bound: Amount) -> bool:
        """Whether an attempt with this upper bound can be sent without exceeding the cap."""
        return self.spent + self.reserved + bound <= self.most

    def reserve(self, bound: Amount) -> None:
        """Sets the upper bound aside until `settle`."""
        self.reserved += bound

    def settle(self, bound: Amount, spent: Amount | None) -> None:
        """Replaces the reservation by what was spent; None (unknown) spends all of it."""
        self.reserved -= bound
        self.spent += bound if spent is None else spent


class Settleable(Protocol):
    """Money of a budget over time that is reserved for this process."""

    def settle(self, bound_usd: Decimal, spent_usd: Decimal | None) -> None:
        """Replaces a reservation by what was spent; None (unknown) leaves all of it in doubt."""


class OverTime(Protocol):
    """A budget that several runs share, by day and month. It gets its money in steps, and wakes the gate after each."""

    def fits(self, bound_usd: Decimal) -> bool:
        """Whether so much can be reserved now. If not, more is on its way or `is_used_up`."""

    def reserve(self, bound_usd: Decimal) -> Settleable:
        """Sets the upper bound aside until it is settled with the lease."""

    def is_used_up(self, bound_usd: Decimal) -> bool:
        """Whether so much can't come any more, with nothing of this process in flight."""

    def refusal(self, bound_usd: Decimal) -> str:
        """How much of it is used, when it opens again, and which setting to raise."""

    def tidy(self) -> None:
        """Gives back what this process does not need."""

    def uses(self) -> list[BudgetUse]:
        """How much of each cap is used."""


class BudgetAccount:
    """The caps of one budget, reserved together or not at all. None: no such cap.

    `is_kept`: there is any cap. `rests_on_bounds`: one relies on the upper bounds of what is in flight.
    """

    __slots__ = ("cost_usd", "is_kept", "name", "over_time", "requests", "rests_on_bounds", "start_usd", "tokens")

    def __init__(
        self,
        *,
        cost_usd: Cap[Decimal] | None = None,
        tokens: Cap[int] | None = None,
        requests: Cap[int] | None = None,
        start_usd: Cap[Decimal] | None = None,
        over_time: OverTime | None = None,
        name: str = "",
    ) -> None:
        """`start_usd` is this start's alone, `over_time` is shared with other runs by its `name`."""
        self.cost_usd = cost_usd
        self.tokens = tokens
        self.requests = requests
        self.start_usd = start_usd
        self.over_time = over_time
        self.name = name
        caps_cost = cost_usd is not None or start_usd is not None or over_time is not None
        self.rests_on_bounds = tokens is not None or caps_cost
        self.is_kept = self.rests_on_bounds or requests is not None

    def fits(self, demand: Demand) -> bool:
        """Whether the attempt can be sent without exceeding a cap.

        Raises:
            ValueError: it has no upper bound, so the cap can't be kept: the caller's bug.
        """
        return self._fits_run(demand) and (self.over_time is None or self.over_time.fits(_bound_usd(demand)))

    def may_come(self, demand: Demand) -> bool:
        """Whether an attempt that does not fit may fit later, though nothing of this process is in flight."""
        over_time = self.over_time
        return over_time is not None and self._fits_run(demand) and not over_time.is_used_up(_bound_usd(demand))

    def _fits_run(self, demand: Demand) -> bool:
        """The same as `fits`, for the caps of this run and start alone."""
        return (
            (self.requests is None or self.requests.fits(1))
            and (self.tokens is None or self.tokens.fits(demand.upper_bound_tokens))
            and (self.cost_usd is None or self.cost_usd.fits(_bound_usd(demand)))
            and (self.start_usd is None or self.start_usd.fits(_bound_usd(demand)))
        )

    def uses(self) -> list[BudgetUse]:
        """How much is used of the caps that hold for a start, a day or a month."""
        found = [] if self.over_time is None else self.over_time.uses()
        if (cap := self.start_usd) is not None:
            spent = BudgetUse(self.name, "per_start_usd", "start", cap.most, cap.spent, Decimal(0), None)
            found.append(spent)
        return found

    def reserve(self, demand: Demand) -> Settleable | None:
        """Sets the attempt's upper bounds aside until `settle`, which is to be given what this returns."""
        if self.cost_usd is not None:
            self.cost_usd.reserve(_bound_usd(demand))
        if self.start_usd is not None:
            self.start_usd.reserve(_bound_usd(demand))
        if self.tokens is not None:
            self.tokens.reserve(demand.upper_bound_tokens)
        if self.requests is not None:
            self.requests.reserve(1)
        return None if self.over_time is None else self.over_time.reserve(_bound_usd(demand))

    def settle(
        self, demand: Demand, spent_usd: Decimal | None, spent_tokens: int | None, lease: Settleable | None = None
    ) -> None:
        """Replaces the attempt's reservation by what it used; None (unknown) uses all of it."""
        if lease is not None:
            lease.settle(_bound_usd(demand), spent_usd)
        if self.cost_usd is not None:
            self.cost_usd.settle(_bound_usd(demand), spent_usd)
        if self.start_usd is not None:
            self.start_usd.settle(_bound_usd(demand), spent_usd)
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
            ("max_cost_usd", self.cost_usd, cost_usd),
            ("max_tokens", self.tokens, tokens),
            ("max_requests", self.requests, requests),
        ):
            if most is not None and cap is None:
                raise ValueError(f"this start has no budget.{setting} that could be changed")
        if self.cost_usd is not None and cost_usd is not None:
            self.cost_usd.most = cost_usd
        if self.tokens is not None and tokens is not None:
            self.tokens.most = tokens
        if self.requests is not None and requests is not None:
            self.requests.most = requests

    def refusal(self, demand: Demand) -> str:
        """Why the attempt does not fit, and which setting to raise."""
        return f"the budget is used up: {'; '.join(self._refusals(demand))} and run again"

    def _refusals(self, demand: Demand) -> Iterator[str]:
        cost, tokens, requests = self.cost_usd, self.tokens, self.requests
        if cost is not None and not cost.fits(bound := _bound_usd(demand)):
            yield (
                f"{in_usd(cost.spent)} of {in_usd(cost.most)} spent, and the next request may cost "
                f"{in_usd(bound)}; "
                "raise budget.max_cost_usd"
            )
        if tokens is not None and not tokens.fits(demand.upper_bound_tokens):
            yield (
                f"{tokens.spent:,} of {tokens.most:,} tokens used, and the next request may use "
                f"{demand.upper_bound_tokens:,}; raise budget.max_tokens"
            )
        if requests is not None and not requests.fits(1):
            yield f"{requests.spent:,} of {requests.most:,} requests sent; raise budget.max_requests"
        if (start := self.start_usd) is not None and not start.fits(bound := _bound_usd(demand)):
            yield (
                f"{in_usd(start.spent)} of {in_usd(start.most)} spent in this start, and the next request may cost "
                f"{in_usd(bound)}; the same command resumes with as much again; or raise budget.per_start_usd"
            )
        if self.over_time is not None and self.over_time.is_used_up(bound := _bound_usd(demand)):
            yield self.over_time.refusal(bound)


def in_usd(amount: Decimal) -> str:
    """ "$0.20", "$0.194642": all significant digits, at least two decimals."""
    whole, _, part = f"{amount:,f}".partition(".")
    return f"${whole}.{part.rstrip('0').ljust(2, '0')}"


def _bound_usd(demand: Demand) -> Decimal:
    if demand.upper_bound_usd is None:
        raise ValueError("there is a cap on cost, but the request came without an upper bound of its cost")
    return demand.upper_bound_usd
