"""Counts, ages, rates and tables as people read them. PURE."""

from collections.abc import Collection, Sequence
from decimal import Decimal


def plural(count: int, noun: str) -> str:
    """ "1 file", "2 files"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def are(count: int) -> str:
    """The verb after `plural`."""
    return "is" if count == 1 else "are"


def were(count: int) -> str:
    """The verb after `plural`, in the past."""
    return "was" if count == 1 else "were"


def age_in_words(age_s: float) -> str:
    """An age in the largest unit of which it has at least one."""
    for unit, size_s in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if age_s >= size_s:
            return f"{age_s // size_s:.0f} {unit}"
    return f"{max(0, int(age_s))} s"


def aligned(rows: Sequence[Sequence[str]], left: Collection[int]) -> list[str]:
    """A line for each row, with columns two spaces apart: those in `left` to the left, the others to the right."""
    # a table library would replace these lines by a dependency (docs/decisions.md)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def rounded(limit: float | Decimal) -> float | Decimal:
    """A rate as a whole number; a rate below 10 keeps three decimals, since rounding would change it too much."""
    if not isinstance(limit, float):
        return limit
    return round(limit) if limit >= 10 or limit.is_integer() else round(limit, 3)
