"""The findings of `verify`, as values and as the lines that it prints."""

from collections.abc import Iterable, Iterator

import msgspec

from batchrun.report.wording import plural

Span = tuple[int, int]
"""Rows: the first, and one past the last."""

MAX_SPANS = 10
"""Spans of rows named for each damage; lost.csv of a salvaged run has them all."""

SALVAGE = "keep a copy of the directory; --salvage copies what is intact into a new one"


class Damage(msgspec.Struct, frozen=True):
    """One damaged file: the damage, the rows that it may affect, and advice."""

    file: str
    what: str
    rows: tuple[Span, ...] = ()
    then: str = SALVAGE


class Findings(msgspec.Struct, frozen=True):
    """The intact files, in words, and the damages.

    `bill_usd` is the known cost of the whole run, `cost_usd` the part of it that no intact row accounts for. None:
    unknown, because answers were replaced or have no known price.
    """

    sound: tuple[str, ...]
    damages: tuple[Damage, ...]
    bill_usd: str
    cost_usd: str | None


def merged(spans: Iterable[Span]) -> tuple[Span, ...]:
    """The same rows in as few spans as possible, in order."""
    found: list[Span] = []
    for first, end in sorted(spans):
        if found and first <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((first, end))
    return tuple(found)


def in_words(findings: Findings) -> Iterator[str]:
    """A line for each intact thing; for each damage what, which rows, and what to do; the sum last."""
    for line in findings.sound:
        yield f"intact   {line}"
    for damage in findings.damages:
        yield f"damaged  {damage.file}: {damage.what}"
        if damage.rows:
            spans = [f"{first:,}" if end == first + 1 else f"{first:,} to {end - 1:,}" for first, end in damage.rows]
            more = f" and {len(spans) - MAX_SPANS:,} more spans" if len(spans) > MAX_SPANS else ""
            yield f"         rows {', '.join(spans[:MAX_SPANS])}{more}"
        yield f"         {damage.then}"
    if not findings.damages:
        yield "nothing is damaged"
        return
    cost = "an unknown part" if findings.cost_usd is None else f"${findings.cost_usd}"
    rows = sum(end - first for first, end in merged(span for damage in findings.damages for span in damage.rows))
    lost = f"{plural(rows, 'row')} and {cost} of ${findings.bill_usd}"
    yield f"{plural(len(findings.damages), 'damage')}: {lost} can't be read"
