"""Usage × price → Decimal. PURE, but for the price list that `resolve` reads once per model.

Money is exact: `Decimal`, per attempt, then added, because tiers apply per request. An unknown price is None, never 0.
"""

from collections.abc import Mapping
from decimal import Decimal
from importlib.metadata import version

import msgspec

from batchrun.job.job import Price as Override
from batchrun.records import Usage

PER_TOKEN = Decimal(1_000_000)
PICO = Decimal("1e-12")  # the scale of decimal128(20, 12); prices per million with six decimals stay exact

VENDOR_PREFIX = "vtrix-"
"""The vendor resells models under its own prefix and states no price; the upstream list price stands in, marked."""


class Tier(msgspec.Struct, frozen=True):
    """USD per million tokens, for requests of more than `above_prompt_tokens`."""

    above_prompt_tokens: int
    input: Decimal
    cached_input: Decimal
    output: Decimal


class PriceTable(msgspec.Struct, frozen=True):
    """What one model costs, from which source, read on which day: `tiers` ascend and the first begins at 0.

    `upstream` names the model whose list price stands in where the vendor states none.
    """

    model: str
    tiers: tuple[Tier, ...]
    source: str
    as_of: str
    upstream: str | None = None

    def describe(self) -> str:
        """For the run's summary: the first tier; then, behind "; ", the source and its date."""
        tier = self.tiers[0]
        more = f", dearer beyond {self.tiers[1].above_prompt_tokens:,} tokens" if len(self.tiers) > 1 else ""
        prices = f"${tier.input} in, ${tier.cached_input} cached, ${tier.output} out per million tokens{more}"
        whose = f"the list price of {self.upstream}" if self.upstream else "the price"
        return f"{self.model}: {prices}; {whose} by {self.source}, {self.as_of}"


def cost(usage: Usage | None, table: PriceTable | None) -> Decimal | None:
    """USD of one attempt; None where the usage or the price is unknown.

    (prompt − cached) · in + cached · cached_in + completion · out. Reasoning tokens are part of the completion.
    """
    if usage is None or table is None:
        return None
    tier = _tier(table, usage.prompt_tokens)
    cached = min(usage.cached_tokens or 0, usage.prompt_tokens)
    micro = (
        (usage.prompt_tokens - cached) * tier.input + cached * tier.cached_input + usage.completion_tokens * tier.output
    )
    return (micro / PER_TOKEN).quantize(PICO)


def upper_bound(max_prompt_tokens: int, max_output_tokens: int, table: PriceTable | None) -> Decimal | None:
    """The most one attempt can cost, USD, at the dearest tier; None where the price is unknown."""
    if table is None:
        return None
    dearest_input = max(max(tier.input, tier.cached_input) for tier in table.tiers)
    dearest_output = max(tier.output for tier in table.tiers)
    return ((max_prompt_tokens * dearest_input + max_output_tokens * dearest_output) / PER_TOKEN).quantize(PICO)


def resolve(model: str, overrides: Mapping[str, Override], today: str) -> PriceTable | None:
    """The price of `model`: the job's own, else the price list's, else that of the upstream model; None if unknown."""
    if (own := overrides.get(model)) is not None:
        cached = own.input if own.cached_input is None else own.cached_input
        return PriceTable(model, (Tier(0, own.input, cached, own.output),), "pricing table of the job", today)
    if (table := _listed(model, today)) is not None:
        return table
    upstream = model.removeprefix(VENDOR_PREFIX)
    if upstream != model and (table := _listed(upstream, today)) is not None:
        return msgspec.structs.replace(table, model=model, upstream=upstream)
    return None


def _tier(table: PriceTable, prompt_tokens: int) -> Tier:
    chosen = table.tiers[0]
    for tier in table.tiers[1:]:
        if prompt_tokens > tier.above_prompt_tokens:
            chosen = tier
    return chosen


def _listed(model: str, today: str) -> PriceTable | None:
    """The model's entry in genai-prices as a table of our own; imported here because it takes 170 ms."""
    import genai_prices
    from genai_prices.types import TieredPrices

    usage = genai_prices.Usage(input_tokens=1, output_tokens=1)
    try:
        found = genai_prices.calc_price(usage, model_ref=model)
    except LookupError:
        return None
    price = found.model_price
    if price.input_mtok is None or price.output_mtok is None:
        return None
    cached = price.input_mtok if price.cache_read_mtok is None else price.cache_read_mtok
    kinds = (price.input_mtok, cached, price.output_mtok)
    starts = {0}
    for kind in kinds:
        if isinstance(kind, TieredPrices):
            starts.update(tier.start for tier in kind.tiers)
    tiers = tuple(Tier(start, *(_at(kind, start) for kind in kinds)) for start in sorted(starts))
    return PriceTable(model, tiers, f"genai-prices {version('genai-prices')}", today)


def _at(kind: object, start: int) -> Decimal:
    """One of the list's prices for requests larger than `start` tokens: a plain Decimal, or base and tiers."""
    price = getattr(kind, "base", kind)
    for tier in getattr(kind, "tiers", ()):
        if tier.start <= start and start > 0:
            price = tier.price
    assert isinstance(price, Decimal)
    return price
