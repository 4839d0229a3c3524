"""The totals of a run: what its attempts used and cost. PURE. `booking` adds attempts to them.

Their lines are the bill. Requests that may have been billed without an answer are counted apart.
"""

from decimal import Decimal
from typing import Any

import msgspec

from batchrun.records import PossiblyBilled
from batchrun.run_summary import LineKey, TotalsLine

DISCARDED = "discarded"
"""The status of attempts whose answers are not in the output."""

_KEYS = frozenset({"invocation", "model", "status", "day", "service_tier"})
FIGURES = tuple(name for name in TotalsLine.__struct_fields__ if name not in _KEYS)
"""The fields of a line that are added up."""

LOST = "lost"
"""The status of attempts without an ending: they were in flight when the process died or was stopped at once."""

SEVERAL = "several models"
"""The model of a lost attempt in a run with more than one model."""


class Unstated(msgspec.Struct, frozen=True):
    """The upper bounds, added up, of answers without usage or price that are not listed as possibly billed.

    They are in no bill, but a budget cap counts them, even one that only a later start sets.
    """

    usd: Decimal = Decimal(0)
    tokens: int = 0


UNSTATED = "unstated"
"""The manifest entry that holds it."""


class Totals(msgspec.Struct, frozen=True):
    """The durable totals. A new object after each commit, so any thread may read it.

    `booked` has the attempts by invocation, and its figures only grow; `replaced` has the changes, negative ones too,
    by answers that were replaced later. `standing` counts the rows that have a completion, by status, without rows that
    are being sent again; `answered_as` counts rows by the model that their answer names. `possibly_billed` lists the
    first of them, the counts have all. `lost` counts the lost attempts by invocation.
    """

    booked: dict[LineKey, TotalsLine] = {}
    replaced: dict[LineKey, TotalsLine] = {}
    standing: dict[str, int] = {}
    answered_as: dict[str, int] = {}
    possibly_billed: tuple[PossiblyBilled, ...] = ()
    possibly_billed_count: int = 0
    possibly_billed_usd: Decimal = Decimal(0)
    possibly_billed_tokens: int = 0
    lost: dict[int, int] = {}
    unstated: Unstated = Unstated()

    def settled(self) -> int:
        """Rows that have their completion."""
        return sum(self.standing.values())

    def lines(self) -> list[TotalsLine]:
        """The bill of the present output: its rows add up to the output's; other attempts are discarded or lost."""
        lines = dict(self.booked)
        for key, change in self.replaced.items():
            lines[key] = plus(lines.get(key) or TotalsLine(*key), change)
        lines_with_figures = [line for line in lines.values() if any(getattr(line, name) for name in FIGURES)]
        # a slot on disk stores neither the model of its request nor the time: the day is the last one on which another
        # attempt of the invocation ended
        models, days = {line.model for line in self.booked.values()}, dict[int, str]()
        for line in self.booked.values():
            days[line.invocation] = max(line.day, days.get(line.invocation, ""))
        model = models.pop() if len(models) == 1 else SEVERAL
        lost = [
            TotalsLine(invocation, model, LOST, days.get(invocation, ""), attempts=attempts)
            for invocation, attempts in self.lost.items()
        ]
        return [*lines_with_figures, *lost]

    def wasted_usd(self) -> Decimal:
        """The certain cost of answers that are not in the output."""
        return sum((line.cost_usd for line in self.lines() if line.status == DISCARDED), Decimal(0))

    def cost_usd(self) -> Decimal:
        """The certain cost."""
        return sum((line.cost_usd for line in self.booked.values()), Decimal(0))

    def mean_cost_usd(self) -> Decimal | None:
        """The mean cost of a sent row that cost something, discarded attempts included; None without a known price."""
        rows = sum(line.rows - line.reused for line in self.booked.values() if line.cost_usd)
        return self.cost_usd() / rows if rows else None

    def tokens(self) -> int:
        """The most tokens that attempts can have used so far: their usage, and bounds for those without."""
        lines = self.booked.values()
        stated = sum(max(line.total_tokens, line.prompt_tokens + line.completion_tokens) for line in lines)
        return stated + self.possibly_billed_tokens + self.unstated.tokens

    def most_usd(self) -> Decimal:
        """The most that attempts can have cost so far: the certain cost, and bounds for the rest."""
        return self.cost_usd() + self.possibly_billed_usd + self.unstated.usd

    def requests(self) -> int:
        """Attempts so far, lost ones included."""
        return sum(line.attempts for line in self.lines())


def plus(one: TotalsLine, other: TotalsLine) -> TotalsLine:
    """The line `one` with the figures of `other` added; a figure that only one of them has is taken as it is."""
    figures: dict[str, Any] = {}
    for name in FIGURES:
        a, b = getattr(one, name), getattr(other, name)
        figures[name] = a if b is None else b if a is None else a + b
    for name in ("cost_usd", "reported_cost_usd", "saved_usd"):
        figures[name] = figures[name] or Decimal(0)  # and no 0E-12
    return msgspec.structs.replace(one, **figures)


def negative(line: TotalsLine) -> TotalsLine:
    """The change that takes the line away."""
    figures = {name: -figure for name in FIGURES if (figure := getattr(line, name)) is not None}
    return msgspec.structs.replace(line, **figures)
