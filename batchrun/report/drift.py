"""Night over night: which figures jumped beyond the spread of the nights before. PURE.

A figure has jumped if its distance from the mean of the earlier nights exceeds each of these: three standard deviations
between those nights; four standard errors of a share over so many rows, which is what chance does; and a minimum change
(2 percentage points of a share, a quarter of an amount).
"""

import math
import statistics
from collections.abc import Mapping, Sequence

import msgspec

from batchrun.report.latencies import percentile
from batchrun.report.profile import Profile
from batchrun.report.runs import Account

DEVIATIONS = 3.0  # of the earlier runs; docs/cost.md, "Night over night"
ERRORS = 4.0  # standard errors of a share: a few hundred rows vary by chance
LEAST_SHARE = 0.02  # of a share, and
LEAST_CHANGE = 0.25  # of an amount: nights that hardly differ would make any change a jump

MOST_VALUES = 12
"""A field with more values is free text, whose values are not compared one by one."""


class Figure(msgspec.Struct, frozen=True):
    """One night's figure: `share` of `of` rows, or an amount."""

    value: float
    share: bool = False
    of: int = 0


class Jump(msgspec.Struct, frozen=True):
    """A figure, and the mean of the nights before it. A distance above `allowed` is a jump."""

    name: str
    now: float
    before: float
    allowed: float
    nights: int
    share: bool

    @property
    def jumped(self) -> bool:
        """True if the figure is further from the mean than `allowed`."""
        return abs(self.now - self.before) > self.allowed


def figures(account: Account, profile: Profile | None) -> dict[str, Figure]:
    """The figures of one night that are compared."""
    found: dict[str, Figure] = {}
    rows = account.done
    if rows and account.all_priced:
        found["cost per 1,000 rows, $"] = Figure(float(account.cost_usd * 1000 / rows))
    if rows:
        found["attempts per row"] = Figure(account.attempts / rows)
        found["tokens in per row"] = Figure(sum(line.prompt_tokens for line in account.totals) / rows)
        found["tokens out per row"] = Figure(sum(line.completion_tokens for line in account.totals) / rows)
    if profile is None or not profile.rows:
        return found
    for status, count in profile.statuses.items():
        found[f"status {status}"] = Figure(count / profile.rows, share=True, of=profile.rows)
    for name, buckets, unit in (("latency", profile.latencies, "s"), ("answer length", profile.lengths, "characters")):
        for share in (0.5, 0.95):
            if (reached := percentile(buckets, share)) is not None:
                found[f"{name} p{share * 100:.0f}, {unit}"] = Figure(reached)
    for path, field in profile.fields.items():
        if not field.rows:
            continue
        found[f"{path}: null"] = Figure(field.nulls / field.rows, share=True, of=field.rows)
        if 0 < len(field.values) <= MOST_VALUES:
            for value, count in field.values.items():
                found[f"{path} = {value}"] = Figure(count / field.rows, share=True, of=field.rows)
        for share in (0.1, 0.5, 0.9):
            if (number := field.quantile(share)) is not None:
                found[f"{path} p{share * 100:.0f}"] = Figure(number)
    return found


def jumps(now: Mapping[str, Figure], before: Sequence[Mapping[str, Figure]]) -> list[Jump]:
    """Every figure of now or before, those furthest beyond the allowed distance first."""
    found = []
    for name in dict.fromkeys([*now, *(name for night in before for name in night)]):
        known = [night[name] for night in before if name in night]
        kind = (known or [now[name]])[0]
        if kind.share:  # a value that never occurred has a share of 0
            values = [night[name].value if name in night else 0.0 for night in before]
            value = now[name].value if name in now else 0.0
        elif known and name in now:
            values, value = [figure.value for figure in known], now[name].value
        else:
            continue
        if not values:
            continue
        mean = statistics.fmean(values)
        spread = DEVIATIONS * statistics.stdev(values) if len(values) > 1 else 0.0
        if kind.share:
            of = min(figure.of for figure in [*known, *([now[name]] if name in now else [])])
            pooled = (mean + value) / 2
            chance = ERRORS * math.sqrt(pooled * (1 - pooled) / of) if of else 0.0
            allowed = max(spread, chance, LEAST_SHARE)
        else:
            allowed = max(spread, LEAST_CHANGE * abs(mean))
        found.append(Jump(name, value, mean, allowed, len(values), kind.share))
    return sorted(found, key=lambda jump: (not jump.jumped, -abs(jump.now - jump.before) / (jump.allowed or 1)))


def in_words(jump: Jump) -> str:
    """The figure, now and before."""
    if jump.share:
        return f"{jump.name}: {jump.now:.1%}, before {jump.before:.1%} (± {jump.allowed:.1%})"
    return f"{jump.name}: {jump.now:.4g}, before {jump.before:.4g} (± {jump.allowed:.2g})"
