"""The list of prices that the package `genai-prices` holds, as tables of our own. Read once per model and run.

Import it where it is used: it takes 170 ms.

Whose price counts is decided by the host of the endpoint's URL:
- a vendor on the list: that vendor's price, or none. Never another's. The list has none of its own for regions.
- any other host (a gateway, a reseller, localhost): the list price of the model's own vendor, named as such. A model
  that no vendor on the list calls its own, open weights above all, has no price: hosts of it differ up to tenfold.
"""

import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, time
from decimal import Decimal
from importlib.metadata import version
from typing import Any
from urllib.parse import urlsplit

import genai_prices.types as listing
from genai_prices.data import providers as _PROVIDERS

from batchrun import prices
from batchrun.errors import JobError
from batchrun.job.settings import Price as Override

VENDOR_PREFIX = "vtrix-"
"""The project's own vendor resells models under its own prefix and states no price."""

_OTHER_HOSTS = {"api.together.ai": "together"}
"""Addresses of vendors that the list does not know (docs.together.ai, 2026-11)."""

_PREFIXES = {"gemini": "google", "vertex_ai": "google", "xai": "x-ai", "moonshot": "moonshotai", "models": "google"}
"""Vendors by the names that gateways put before a model's, where they differ from the list's."""

_OPEN_WEIGHTS = ("gpt-oss",)
"""Models on their maker's list that the maker does not serve: every host has a price of its own."""

_LOCAL_TAG = re.compile(r":(latest|(e?[\d.]+|\dx\d+)[bm]\b.*)$", re.IGNORECASE)
"""How Ollama names the weights that it runs, by their size: `deepseek-r1:70b`. No vendor sells those."""

_REGION = re.compile(r"(^|[.-])(eu|us|[a-z]{2,}(-[a-z]+)*-(north|south|east|west|central)+[a-z]*-?\d+)([.-]|$)")
"""How hosts name a region: `eu.api.…`, `bedrock-runtime.eu-west-1.…`, `europe-west4-aiplatform.…`."""

_TOKEN_KINDS = ("input_mtok", "cache_read_mtok", "output_mtok", "cache_write_mtok", "cache_write_1h_mtok")

_OUT_OF_REACH = frozenset({"requests_kcount", "output_reasoning_mtok", "output_citation_mtok"})
"""Parts of a price that no usage of a chat completion states: fees by search context, kinds of output with a price of
their own. Such a price is unknown here; the servers that have one state what an answer cost.
"""


def resolve(model: str, overrides: Mapping[str, Override], today: str, url: str) -> prices.PriceTable | None:
    """The price of `model` at the endpoint: the job's own, else the list's; None if unknown."""
    if (own := overrides.get(model)) is not None:
        return prices.stated(model, own, today)
    return listed(model, today, url)


def resolve_for_all(
    model: str, overrides: Mapping[str, Override], today: str, urls: Sequence[str]
) -> prices.PriceTable | None:
    """The price of `model`, which must be the same at every endpoint; None if unknown.

    Raises:
        JobError: it differs, so what a row costs would depend on where it was sent.
    """
    tables = [resolve(model, overrides, today, url) for url in urls]
    if len({None if each is None else each.rates for each in tables}) > 1:
        raise JobError(
            f"{model} has different prices at the job's endpoints; state one price for it in [pricing], or use "
            "a job for each"
        )
    return tables[0]


def listed(model: str, today: str, url: str) -> prices.PriceTable | None:
    """The model's price at that endpoint; None where the list has none for it."""
    now = datetime.combine(datetime.fromisoformat(today), time(12), UTC)
    host = _host(url)
    if host is not None:
        found = _model(host, model) or _model(host, model.partition("/")[2])
        return None if found is None else _table(model, host, found, now, today, None, regional=_is_regional(url))
    plain = model.removeprefix(VENDOR_PREFIX)
    own = _own_vendor(plain)
    return None if own is None else _table(model, *own, now, today, plain.rpartition("/")[2])


def unknown_because(model: str, url: str) -> str:
    """Why a model has no price, in words."""
    host = _host(url)
    if host is not None:
        return f"the list has no full price of {host.name} for it"
    return "the endpoint is not on the price list, and no vendor on it sells the model as its own"


def _host(url: str) -> listing.Provider | None:
    """The vendor whose address it is."""
    parts = urlsplit(url.lower())
    host = (parts.hostname or "").rstrip(".")
    if (known := _OTHER_HOSTS.get(host)) is not None:
        return next(provider for provider in _PROVIDERS if provider.id == known)
    origin = f"{parts.scheme}://{host}"
    return next((provider for provider in _PROVIDERS if _is_at(provider.api_pattern, origin, parts.path)), None)


def _is_at(pattern: str, origin: str, path: str) -> bool:
    """Whether the list's pattern stands for this address. The patterns have no end: `https://api\\.openai\\.com` also
    matches the beginning of a name that is somebody else's. So one must match the whole host, with or without a path.
    """
    if (found := re.match(pattern, origin)) is not None:
        rest = origin[found.end() :]
        return not rest or (pattern.endswith(r"\.") and rest.isalpha())  # `api\.moonshot\.`, whatever its country
    if "/" not in pattern.replace("(https?://)?", "").removeprefix("https://"):
        return False  # it names no path, and its wildcards must not find the host in one
    found = re.match(pattern, address := origin + path)
    return found is not None and address[found.end() :][:1] in ("", "/")


def _is_regional(url: str) -> bool:
    """True for an address that names a region. The list has one price for all of them."""
    return _REGION.search(urlsplit(url.lower()).hostname or "") is not None


def _model(vendor: listing.Provider, name: str) -> listing.ModelInfo | None:
    return vendor.find_model(name, all_providers=_PROVIDERS) if name else None


def _own_vendor(model: str) -> tuple[listing.Provider, listing.ModelInfo] | None:
    """The vendor that made the model, or that a prefix like `openai/` names, and the model on its list."""
    prefix, _, name = model.rpartition("/")
    if name.startswith(_OPEN_WEIGHTS) and prefix in ("", "openai"):
        return None
    if _LOCAL_TAG.search(name):
        return None
    for vendor in _PROVIDERS:
        if prefix:
            own = vendor.id == _PREFIXES.get(prefix, prefix)
        else:
            own = vendor.model_match is not None and vendor.model_match.is_match(name.lower())
        if own and (found := _model(vendor, name)) is not None:
            return vendor, found
    return None


def _table(
    model: str,
    vendor: listing.Provider,
    found: listing.ModelInfo,
    now: datetime,
    today: str,
    upstream: str | None,
    *,
    regional: bool = False,
) -> prices.PriceTable | None:
    standard, clock = _standard(found, now)
    if not _complete(standard):
        return None
    services = _services(found, standard, now) if any(found is each for each in vendor.models) else {}
    return prices.PriceTable(
        model,
        _tiers(standard),
        f"genai-prices {version('genai-prices')}",
        today,
        upstream,
        vendor.name,
        services,
        tuple(clock),
        regional=regional,
    )


def _complete(price: Any) -> bool:
    return price.input_mtok is not None and price.output_mtok is not None and not _OUT_OF_REACH & price.__dict__.keys()


def _standard(found: listing.ModelInfo, now: datetime) -> tuple[Any, list[prices.Hours]]:
    """The price of today for all hours, and those that hold instead at some hours of the day."""
    if isinstance(found.prices, listing.ModelPrice):
        return found.prices, []
    standard, clock = found.prices[0].prices, []
    for conditional in found.prices:
        when = conditional.constraint
        if isinstance(when, listing.TimeOfDateConstraint):
            if _complete(conditional.prices):
                clock.append(prices.Hours(_second(when.start_time), _second(when.end_time), _tiers(conditional.prices)))
        elif when is None or when.active(now):
            standard, clock = conditional.prices, []  # what comes later on the list counts
    return standard, clock


def _second(at: time) -> int:
    """The second of the day, in UTC."""
    offset = at.utcoffset()
    return (at.hour * 3600 + at.minute * 60 + at.second - int(offset.total_seconds() if offset else 0)) % prices.DAY_S


def _services(found: listing.ModelInfo, standard: Any, now: datetime) -> dict[str, prices.Tiers]:
    """The prices of the tiers that an answer can name in `service_tier`; `batch` is one."""
    services = {}
    for variant in found.price_variants or ():
        name = variant.when.get("service_tier") or variant.when.get("processing")
        if len(variant.when) != 1 or not name or name in services or name in prices.ORDINARY:
            continue
        if variant.constraint is None or variant.constraint.active(now):
            changed = {key: value for key, value in variant.prices.__dict__.items() if value is not None}
            services[name] = _tiers(listing.ModelPrice(**{**standard.__dict__, **changed}))
    return services


def _tiers(price: Any) -> prices.Tiers:
    """A price of the list, which has its steps by kind of token, as steps of all kinds."""
    kinds = [getattr(price, kind) for kind in _TOKEN_KINDS]
    starts = {0} | {tier.start for kind in kinds for tier in getattr(kind, "tiers", ())}
    return tuple(_step(kinds, start) for start in sorted(starts))


def _step(kinds: list[Any], start: int) -> prices.Tier:
    read, cached, output, write, write_1h = (None if kind is None else _at(kind, start) for kind in kinds)
    assert read is not None  # `_complete`
    assert output is not None
    return prices.Tier(start, read, read if cached is None else cached, output, write, write_1h)


def _at(kind: object, start: int) -> Decimal:
    """One of the list's prices for requests larger than `start` tokens: a plain Decimal, or base and tiers."""
    price = getattr(kind, "base", kind)
    for tier in getattr(kind, "tiers", ()):
        if tier.start <= start and start > 0:
            price = tier.price
    assert isinstance(price, Decimal)
    return price
