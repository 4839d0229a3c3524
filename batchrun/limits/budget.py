"""The budget: hard caps on dollars, tokens and requests, which unlike rates do not refill. PURE."""

from collections.abc import Iterator
from decimal import Decimal
from typing import Generic, TypeVar

from batchrun.limits.admission import Ask

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


class BudgetAccount:
    """The caps of one budget, reserved together or not at all. None: no such cap."""

    __slots__ = ("cost_usd", "requests", "tokens")

    def __init__(
        self,
        *,
        cost_usd: Cap[Decimal] | None = None,
        tokens: Cap[int] | None = None,
        requests: Cap[int] | None = None,
    ) -> None:
        self.cost_usd = cost_usd
        self.tokens = tokens
        self.requests = requests

    @property
    def is_kept(self) -> bool:
        """True if there is any cap."""
        return self.rests_on_bounds or self.requests is not None

    @property
    def rests_on_bounds(self) -> bool:
        """True if a cap relies on the upper bounds of what is in flight."""
        return self.cost_usd is not None or self.tokens is not None

    def fits(self, ask: Ask) -> bool:
        """Whether the attempt can be sent without exceeding a cap.

        Raises:
            ValueError: it has no upper bound, so the cap can't be kept: the caller's bug.
        """
        return (
            (self.requests is None or self.requests.fits(1))
            and (self.tokens is None or self.tokens.fits(ask.upper_bound_tokens))
            and (self.cost_usd is None or self.cost_usd.fits(_bound_usd(ask)))
        )

    def reserve(self, ask: Ask) -> None:
        """Sets the attempt's upper bounds aside until `settle`."""
        if self.cost_usd is not None:
            self.cost_usd.reserve(_bound_usd(ask))
        if self.tokens is not None:
            self.tokens.reserve(ask.upper_bound_tokens)
        if self.requests is not None:
            self.requests.reserve(1)

    def settle(self, ask: Ask, spent_usd: Decimal | None, spent_tokens: int | None) -> None:
        """Replaces the attempt's reservation by what it used; None (unknown) uses all of it."""
        if self.cost_usd is not None:
            self.cost_usd.settle(_bound_usd(ask), spent_usd)
        if self.tokens is not None:
            self.tokens.settle(ask.upper_bound_tokens, spent_tokens)
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

    def refusal(self, ask: Ask) -> str:
        """Why the attempt does not fit, and which setting to raise."""
        return f"the budget is used up: {'; '.join(self._refusals(ask))} and run again"

    def _refusals(self, ask: Ask) -> Iterator[str]:
        cost, tokens, requests = self.cost_usd, self.tokens, self.requests
        if cost is not None and not cost.fits(bound := _bound_usd(ask)):
            yield (
                f"{_in_usd(cost.spent)} of {_in_usd(cost.most)} spent, and the next request may cost "
                f"{_in_usd(bound)}; "
                "raise budget.max_cost_usd"
            )
        if tokens is not None and not tokens.fits(ask.upper_bound_tokens):
            yield (
                f"{tokens.spent:,} of {tokens.most:,} tokens used, and the next request may use "
                f"{ask.upper_bound_tokens:,}; raise budget.max_tokens"
            )
        if requests is not None and not requests.fits(1):
            yield f"{requests.spent:,} of {requests.most:,} requests sent; raise budget.max_requests"


def _in_usd(amount: Decimal) -> str:
    """ "$0.20", "$0.194642": all significant digits, at least two decimals."""
    whole, _, part = f"{amount:,f}".partition(".")
    return f"${whole}.{part.rstrip('0').ljust(2, '0')}"


def _bound_usd(ask: Ask) -> Decimal:
    if ask.upper_bound_usd is None:
        raise ValueError("max_cost_usd is set, but the request came without an upper bound of its cost")
    return ask.upper_bound_usd
