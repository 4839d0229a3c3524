"""Usage × price → money. PURE. A price belongs to an endpoint, a model, a service tier and an hour.

Money is exact: integers, per attempt, then added, because tiers apply per request. An unknown price is None, never 0.
"""

import re
from decimal import ROUND_CEILING, Decimal
from functools import cached_property
from typing import NamedTuple

import msgspec

from batchrun.job.settings import Price as Override
from batchrun.job.settings import TierPrice
from batchrun.money import to_pico, to_usd
from batchrun.records import Usage

PER_TOKEN = Decimal(1_000_000)  # prices are per million tokens

DAY_S = 86_400

ORDINARY = frozenset({"", "auto", "default", "standard", "on_demand"})
"""The vendors' names for the tier of the plain list price (OpenAI, Anthropic, Groq)."""

_REQUESTED_TIER = re.compile(rb'"service_tier"\s*:\s*("(?:[^"\\]|\\.)*"|[^",}\s]+)')
"""In a body as this project encodes it: inside a text the quotes are escaped, and don't match."""


class Tier(msgspec.Struct, frozen=True, dict=True):
    """USD per million tokens, for requests of more than `above_prompt_tokens`.

    Tokens written to a cache cost `cache_write`, those kept there for an hour `cache_write_1h`; None: what input costs.
    """

    above_prompt_tokens: int
    input: Decimal
    cached_input: Decimal
    output: Decimal
    cache_write: Decimal | None = None
    cache_write_1h: Decimal | None = None

    @cached_property
    def per_token(self) -> "PerToken":
        """The prices as integers."""
        write = self.input if self.cache_write is None else self.cache_write
        write_1h = write if self.cache_write_1h is None else self.cache_write_1h
        each = self.input, self.cached_input, self.output, write, write_1h
        return PerToken(*(int((usd * 10**18).to_integral_value()) for usd in each))

    def highest_input(self) -> Decimal:
        """The most that a token of the prompt can cost."""
        return max(self.input, self.cached_input, self.cache_write or self.input, self.cache_write_1h or self.input)


Tiers = tuple[Tier, ...]


class PerToken(NamedTuple):
    """Prices of a tier in 10⁻²⁴ USD per token: exact to 18 decimals of a price per million."""

    input: int
    cached_input: int
    output: int
    cache_write: int
    cache_write_1h: int


PER_PICO = 10**12
"""So many of these make 10⁻¹² USD."""


class Hours(msgspec.Struct, frozen=True):
    """Other prices from `start_s` up to `end_s` of the day, seconds in UTC; past midnight if `end_s` is smaller."""

    start_s: int
    end_s: int
    tiers: Tiers

    def hold(self, second: int) -> bool:
        """True at that second of the day."""
        if self.end_s < self.start_s:
            return second >= self.start_s or second < self.end_s
        return self.start_s <= second < self.end_s


class PriceTable(msgspec.Struct, frozen=True):
    """The prices of one model, their source, and the day they were read. `tiers` ascend and the first starts at 0.

    `vendor` sets the price; None: the job states it. `upstream` names the model of the vendor's list whose price
    is used where the endpoint is not the vendor's own. `services` are the prices of service tiers by name, `hours`
    those by the clock, of which the last that holds counts. The job's own price is for every tier but those that it has
    another price for (`every_tier`). `regional`: the endpoint is one of the vendor's regions, which may have another
    price.
    """

    model: str
    tiers: Tiers
    source: str
    as_of: str
    upstream: str | None = None
    vendor: str | None = None
    services: dict[str, Tiers] = {}
    hours: tuple[Hours, ...] = ()
    per_request: Decimal = Decimal(0)
    every_tier: bool = False
    regional: bool = False

    @property
    def rates(self) -> bytes:
        """The prices alone, to compare: without their source, date and vendor."""
        return msgspec.json.encode((self.tiers, sorted(self.services.items()), self.hours, self.per_request))

    def describe(self) -> str:
        """For the run's summary: the first tier; then, behind "; ", whose price it is, the source and its date."""
        tier = self.tiers[0]
        more = f", higher beyond {self.tiers[1].above_prompt_tokens:,} tokens" if len(self.tiers) > 1 else ""
        more += f", ${self.per_request} a request" if self.per_request else ""
        more += ", other prices at some hours" if self.hours else ""
        more += f", other prices for {', '.join(sorted(self.services))}" if self.services else ""
        prices = f"${tier.input} in, ${tier.cached_input} cached, ${tier.output} out per million tokens{more}"
        whose = "the price" if self.vendor is None else f"the price of {self.vendor}"
        if self.regional:
            whose = f"the plain list price of {self.vendor}, not that of the endpoint's region,"
        if self.upstream is not None:
            whose = f"the list price of {self.vendor} for {self.upstream}, not the endpoint's own,"
        return f"{self.model}: {prices}; {whose} by {self.source}, {self.as_of}"


def cost(
    usage: Usage | None, table: PriceTable | None, service_tier: str | None = None, at_s: float = 0.0
) -> int | None:
    """10⁻¹² USD of one attempt; None where the usage, the price or the tier's price is unknown. `at_s`: when it ended.

    (prompt − cached − written) · in + cached · cached_in + written · write + output · out, and the fee of a request.
    The output is what was billed as such (`Usage.billed_output_tokens`), reasoning outside the completion included.
    """
    if usage is None or table is None or (tiers := _tiers_for(table, service_tier, at_s)) is None:
        return None
    tier = tiers[0] if len(tiers) == 1 else _tier(tiers, usage.prompt_tokens)
    cached = min(usage.cached_tokens, usage.prompt_tokens) if usage.cached_tokens else 0
    each = tier.per_token
    exact = (usage.prompt_tokens - cached) * each.input + usage.billed_output_tokens * each.output
    if cached:
        exact += cached * each.cached_input
    if usage.cache_write_tokens:
        # they were counted at the price of other input above: only the difference is added
        written = min(usage.cache_write_tokens, usage.prompt_tokens - cached)
        for_an_hour = min(usage.cache_write_1h_tokens or 0, written)
        exact += (written - for_an_hour) * each.cache_write + for_an_hour * each.cache_write_1h - written * each.input
    if table.per_request:
        exact += int(table.per_request * 10**24)
    pico_usd, rest = divmod(exact, PER_PICO)
    if rest and (2 * rest > PER_PICO or (2 * rest == PER_PICO and pico_usd % 2)):  # half to even
        pico_usd += 1
    return pico_usd


def upper_bound(
    max_prompt_tokens: int, max_output_tokens: int, table: PriceTable | None, *requested_tiers: str | None
) -> Decimal | None:
    """The most one attempt can cost, USD: at the highest price of any hour and service tier that
    `requested_tiers` allow.

    A request that names no tier, or `auto`, gets the one that the account is set to, which is unknown here.
    None where the price is unknown.
    """
    if table is None:
        return None
    return to_usd(highest_prices(table, *requested_tiers).bound(max_prompt_tokens, max_output_tokens))


class HighestPrices(msgspec.Struct, frozen=True):
    """The most that a token of the prompt, one of the output, and a request itself can cost: 10⁻¹² USD, rounded up."""

    prompt: int
    output: int
    per_request: int

    def bound(self, max_prompt_tokens: int, max_output_tokens: int) -> int:
        """10⁻¹² USD: the most that one attempt of this size can cost."""
        return max_prompt_tokens * self.prompt + max_output_tokens * self.output + self.per_request


def highest_prices(table: PriceTable, *requested_tiers: str | None) -> HighestPrices:
    """The highest prices of any hour and service tier that `requested_tiers` allow; without any, that None allows."""
    every = [tier for requested in requested_tiers or (None,) for tiers in _allowed(table, requested) for tier in tiers]
    prompt, output = max(tier.highest_input() for tier in every), max(tier.output for tier in every)
    usd_each = prompt / PER_TOKEN, output / PER_TOKEN, table.per_request
    return HighestPrices(*(to_pico(usd, ROUND_CEILING) for usd in usd_each))


def requested_tier(table: PriceTable | None, body: bytes) -> str | None:
    """The service tier that an encoded body names; None: it names none, or it is uncertain."""
    if table is None or not table.services:
        return None
    if body.find(b'"service_tier"') < 0:
        return None
    found = _REQUESTED_TIER.findall(body)
    return found[0].strip(b'"').decode("utf-8", "replace") if len(found) == 1 else None


def named_tier(body: bytes) -> str | None:
    """The service tier that an encoded body names first; None: it names none."""
    found = _REQUESTED_TIER.search(body)
    return None if found is None else found[1].strip(b'"').decode("utf-8", "replace")


def stated(model: str, own: Override, today: str) -> PriceTable:
    """The price that the job states for the model."""
    return PriceTable(
        model,
        (_tier_of(own),),
        "pricing table of the job",
        today,
        services={name: (_tier_of(each),) for name, each in own.tiers.items()},
        per_request=own.per_request or Decimal(0),
        every_tier=True,
    )


def _tier_of(own: Override | TierPrice) -> Tier:
    """The price as one tier for prompts of any length."""
    cached = own.input if own.cached_input is None else own.cached_input
    return Tier(0, own.input, cached, own.output, own.cache_write)


def plain_tier(table: PriceTable, service_tier: str | None) -> Tier:
    """The price of a short prompt in that service tier; the ordinary one where the tier has no other."""
    return table.services.get(service_tier or "", table.tiers)[0]


def lacks_tier(table: PriceTable, service_tier: str | None) -> bool:
    """True where the model's price is known, but not that of the tier which the answer names."""
    return _tiers_for(table, service_tier, 0.0) is None


def _tiers_for(table: PriceTable, service_tier: str | None, at_s: float) -> Tiers | None:
    """The prices that hold for the tier that the answer names, at that time; None: the tier's price is not known."""
    if service_tier is not None:
        if (tiers := table.services.get(service_tier)) is not None:
            return tiers
        if service_tier not in ORDINARY and not table.every_tier:
            return None
    if table.hours:
        for hours in reversed(table.hours):
            if hours.hold(int(at_s) % DAY_S):
                return hours.tiers
    return table.tiers


def _allowed(table: PriceTable, requested: str | None) -> list[Tiers]:
    """All prices that a request for the tier may get."""
    ordinary = [table.tiers, *(hours.tiers for hours in table.hours)]
    if requested in ORDINARY - {"", "auto"}:
        return ordinary
    if requested in table.services:  # the server may fall back to the ordinary one
        return [*ordinary, table.services[requested]]
    return [*ordinary, *table.services.values()]


def _tier(tiers: Tiers, prompt_tokens: int) -> Tier:
    """The tier of a prompt of that length: the last one that begins below it."""
    chosen = tiers[0]
    for tier in tiers[1:]:
        if prompt_tokens > tier.above_prompt_tokens:
            chosen = tier
    return chosen
