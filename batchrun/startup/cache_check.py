"""How much of a job's requests a prompt cache can serve, and how much money that saves, in words. PURE."""

from collections.abc import Iterator, Mapping
from decimal import Decimal

from batchrun import prices
from batchrun.job.job import Job
from batchrun.prices import PriceTable
from batchrun.report.wording import plural
from batchrun.request.shared_prefix import CACHED_FROM_TOKENS, SharedText

_TOKENS_PER_BYTE = 0.25  # as prose has, roughly (startup.estimate): the line says "about"
_QUOTED = 40  # characters of the shared text that a warning quotes


def in_words(shared: SharedText, job: Job, tables: Mapping[str, PriceTable | None]) -> Iterator[str]:
    """One line on the text that rows share at their beginning, and one on text that they share behind row data."""
    if not shared.rows:
        return
    groups = [group for group in shared.groups if group.tokens]
    if groups:
        rows = sum(group.rows for group in groups)
        held = sum(group.rows * group.tokens for group in groups)
        share = min(1.0, held / max(1.0, shared.body_bytes * _TOKENS_PER_BYTE))
        size = sum(len(group.common) * group.rows for group in groups) // rows
        saved = [_saved(group.tokens * (group.rows - 1), tables.get(group.model), job) for group in groups]
        known = [usd for usd in saved if usd is not None]
        saving = f"; cached, they cost ${sum(known):,.4f} less" if len(known) == len(saved) else ""
        yield (
            f"prompt cache {rows:,} of {plural(shared.rows, 'row')} begin alike in {plural(len(groups), 'group')}: "
            f"{size:,} bytes, about {held // rows:,} tokens each, {share:.0%} of all prompts{saving}"
        )
        if not job.request.cache_prefix:
            yield "             request.cache_prefix = true sends one row of each group first, and the others behind it"
    elif job.request.cache_prefix and not shared.behind_bytes:
        yield f"prompt cache no gain by request.cache_prefix: no rows share {CACHED_FROM_TOKENS:,} first tokens"
    if shared.behind_bytes:
        tokens = int(shared.behind_bytes * _TOKENS_PER_BYTE)
        quoted = shared.behind if len(shared.behind) <= _QUOTED else shared.behind[: _QUOTED - 1] + "…"
        less = None
        if len(tables) == 1:
            less = _saved(tokens * (shared.rows - 1), next(iter(tables.values())), job)
        saving = "" if less is None else f", and all rows cost up to ${less:,.4f} less"
        yield (
            f"warning: row data comes before about {tokens:,} tokens that all rows share (from {quoted!r} on), "
            f"where no prompt cache finds them; put row data last{saving}"
        )


def _saved(tokens: int, table: PriceTable | None, job: Job) -> Decimal | None:
    """What the cache saves on these tokens, in USD; None where the price is unknown."""
    if table is None:
        return None
    tier = prices.plain_tier(table, job.request.service_tier)
    return (tokens * (tier.input - tier.cached_input) / prices.PER_TOKEN).quantize(Decimal("0.0001"))
