"""The price of a model at an endpoint, as a table of our own. Resolved once per model and run.

Whose price counts is decided by the host of the endpoint's URL:
- a vendor on the list: that vendor's price, or none, and never another vendor's. It has no prices for regions.
- any other host (a gateway, a reseller, localhost): the list price of the model's own vendor, named as such. A model
  that no vendor on the list calls its own, open weights above all, has no price: hosts of it differ up to tenfold.
"""

import re
from collections.abc import Mapping
from datetime import date
from urllib.parse import urlsplit

import msgspec

from batchrun import prices
from batchrun.errors import JobError
from batchrun.job.job import Job
from batchrun.job.settings import Price as Override
from batchrun.price_list import newest
from batchrun.price_list.tables import ListedPrice, Model, Vendor

VENDOR_PREFIX = "vtrix-"
"""The project's own vendor resells models under its own prefix and states no price."""

_OTHER_HOSTS = {"api.together.ai": "together"}
"""Addresses of vendors that the list does not know (docs.together.ai, 2026-11)."""

_PREFIXES = {"gemini": "google", "vertex_ai": "google", "xai": "x-ai", "moonshot": "moonshotai", "models": "google"}
"""Vendors by the names that gateways put before a model's, where they differ from the list's."""

_OPEN_WEIGHTS = ("gpt-oss",)
"""Models on their maker's list that the maker does not serve: every host sets its price."""

_SEARCHING = re.compile(r"-search-(preview|api)\b|-deep-research\b|-pro-search\b")
"""Models that search the web for each answer, at a fee that the list leaves out (developers.openai.com, "Pricing")."""

_LOCAL_TAG = re.compile(r":(latest|(e?[\d.]+|\dx\d+)[bm]\b.*)$", re.IGNORECASE)
"""Ollama's names for the weights that it runs, by their size: `deepseek-r1:70b`. No vendor sells those."""

_REGION = re.compile(r"(^|[.-])(eu|us|[a-z]{2,}(-[a-z]+)*-(north|south|east|west|central)+[a-z]*-?\d+)([.-]|$)")
"""Regions in the names of hosts: `eu.api.…`, `bedrock-runtime.eu-west-1.…`, `europe-west4-aiplatform.…`."""

_COMPACT_DATE = re.compile(r"-(20\d{6})(?=[-:]|$)")
"""Dates in a model's name as gateways write them: `gpt-5.2-20251211`, where the list has dashes."""


def resolve(model: str, overrides: Mapping[str, Override], today: str, url: str) -> prices.PriceTable | None:
    """The price of `model` at the endpoint: the job's own, else the list's; None if unknown."""
    if (own := overrides.get(model)) is not None:
        return prices.stated(model, own, today)
    return listed(model, today, url)


def resolve_for_all(model: str, job: Job, today: str) -> prices.PriceTable | None:
    """The price of `model`, which must be the same at every endpoint of the job; None if unknown.

    Raises:
        JobError: it differs, so what a row costs would depend on where it was sent.
    """
    tables = [resolve(model, job.pricing, today, each.url) for each in job.endpoints]
    if len({None if each is None else each.rates for each in tables}) > 1:
        raise JobError(
            f"{model} has different prices at the job's endpoints; state one price for it in [pricing], or use "
            "a job for each"
        )
    return tables[0]


def listed(model: str, day: str, url: str) -> prices.PriceTable | None:
    """The model's price at that endpoint; None where the list has none for it."""
    today, host = date.fromisoformat(day), vendor_at(url)
    if host is not None:
        found = find_model(host, model) or find_model(host, model.partition("/")[2])
        # The list has one price for all regions.
        regional = _REGION.search(urlsplit(url.lower()).hostname or "") is not None
        return None if found is None else table_of(model, host, found, today, None, regional=regional)
    plain = model.removeprefix(VENDOR_PREFIX)
    own = _own_vendor(plain)
    return None if own is None else table_of(model, *own, today, plain.rpartition("/")[2])


def unknown_because(model: str, url: str) -> str:
    """Why a model has no price, in words."""
    host = vendor_at(url)
    if host is not None:
        return f"the list has no full price of {host.name} for it"
    return "the endpoint is not on the price list, and no vendor on it sells the model as its own"


def vendor_at(url: str) -> Vendor | None:
    """The vendor at this address; None if the list has none there."""
    parts = urlsplit(url.lower())
    host = (parts.hostname or "").rstrip(".")
    if (known := _OTHER_HOSTS.get(host)) is not None:
        return newest.price_list().vendor(known)
    origin = f"{parts.scheme}://{host}"
    vendors = newest.price_list().vendors
    return next((vendor for vendor in vendors if _is_at(vendor.address, origin, parts.path)), None)


def _is_at(pattern: str, origin: str, path: str) -> bool:
    """Whether the list's pattern matches this address. Patterns have no end: `https://api\\.openai\\.com` also matches
    the beginning of another owner's host. So a pattern must match the whole host, with or without a path.
    """
    if (found := re.match(pattern, origin)) is not None:
        rest = origin[found.end() :]
        return not rest or (pattern.endswith(r"\.") and rest.isalpha())  # `api\.moonshot\.`, in any country
    if "/" not in pattern.replace("(https?://)?", "").removeprefix("https://"):
        return False  # it names no path, and its wildcards must not find the host in one
    found = re.match(pattern, address := origin + path)
    return found is not None and address[found.end() :][:1] in ("", "/")


def find_model(vendor: Vendor, name: str) -> Model | None:
    """The model of that name on the vendor's list, or on the list of another vendor whose models it also sells. The
    other vendor's prices by tier are left out: they hold only there.
    """
    name = name.lower()
    for spelling in dict.fromkeys((name, _COMPACT_DATE.sub(_with_dashes, name))) if name else ():
        if (found := vendor.find(spelling)) is not None:
            return found
        for other in vendor.also_sells:
            if (found := newest.price_list().vendor(other).find(spelling)) is not None:
                return msgspec.structs.replace(found, tiers=())
    return None


def _with_dashes(compact: re.Match[str]) -> str:
    try:
        return f"-{date.fromisoformat(compact[1])}"
    except ValueError:
        return compact[0]


def _own_vendor(model: str) -> tuple[Vendor, Model] | None:
    """The vendor that made the model, or that a prefix like `openai/` names, and the model on its list."""
    prefix, _, name = model.rpartition("/")
    if name.startswith(_OPEN_WEIGHTS) and prefix in ("", "openai"):
        return None
    if _LOCAL_TAG.search(name):
        return None
    for vendor in newest.price_list().vendors:
        own = vendor.id == _PREFIXES.get(prefix, prefix) if prefix else vendor.makes.fits(name.lower())
        if own and (found := find_model(vendor, name)) is not None:
            return vendor, found
    return None


def table_of(
    model: str, vendor: Vendor, found: Model, today: date, upstream: str | None, *, regional: bool = False
) -> prices.PriceTable | None:
    """The vendor's list price of the model today; None where a part of it is missing."""
    standard, clock = _standard(found, today)
    if not _complete(standard) or _SEARCHING.search(model.lower()):
        return None
    services = dict[str, prices.Tiers]()  # by the tiers that an answer can name in `service_tier`; `batch` is one
    for price in found.tiers:
        name = price.tier or ""
        if name not in services and name not in prices.ORDINARY and (price.since is None or price.since <= today):
            services[name] = _steps(price, standard)
    return prices.PriceTable(
        model,
        _steps(standard),
        newest.price_list().source,
        today.isoformat(),
        upstream,
        vendor.name,
        services,
        tuple(clock),
        regional=regional,
    )


def _complete(price: ListedPrice) -> bool:
    return price.input is not None and price.output is not None and not price.uncounted


def _standard(found: Model, today: date) -> tuple[ListedPrice, list[prices.Hours]]:
    """Today's price, and the prices that replace it at some hours of the day."""
    standard, clock = found.prices[0], list[prices.Hours]()
    for price in found.prices:
        if price.hours is not None:
            if _complete(price):
                clock.append(prices.Hours(*price.hours, _steps(price)))
        elif price.since is None or price.since <= today:
            standard, clock = price, []  # what comes later on the list counts
    return standard, clock


def _steps(price: ListedPrice, instead: ListedPrice | None = None) -> prices.Tiers:
    """A price of the list, which has its steps by kind of token, as steps of all kinds. Missing prices are taken
    from the other.
    """
    kinds = [mine or other for mine, other in zip(price.rates, (instead or price).rates, strict=True)]
    starts = {0} | {start for kind in kinds if kind is not None for start, _ in kind.steps}
    tiers: list[prices.Tier] = []
    for start in sorted(starts):
        read, cached, output, write, write_1h = (None if kind is None else kind.above(start) for kind in kinds)
        assert read is not None  # `_complete`
        assert output is not None
        tiers.append(prices.Tier(start, read, read if cached is None else cached, output, write, write_1h))
    return tuple(tiers)
