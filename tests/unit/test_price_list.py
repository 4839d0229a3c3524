"""The built-in price list gives what the package it was made from gives, and says which list it is."""

import tomllib
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from importlib.metadata import version
from pathlib import Path
from typing import Any

import genai_prices
import genai_prices.types as theirs
import pytest
from genai_prices.data import providers

from batchrun.money import to_pico
from batchrun.price_list import convert, newest
from batchrun.price_list.lookup import find_model, table_of
from batchrun.price_list.tables import Model, Vendor
from batchrun.prices import ORDINARY, cost
from batchrun.records import Usage
from tests import level

ROOT = Path(__file__).parents[2]
PRICES = newest.price_list()


def test_the_list_is_that_of_the_pinned_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    pins = [
        pin
        for pin in (*project["build-system"]["requires"], *project["project"]["optional-dependencies"]["test"])
        if pin.startswith("genai-prices")
    ]
    assert pins == [f"genai-prices=={version('genai-prices')}"] * 2
    assert newest.BUILT_IN.read_text() == convert.installed(), "build it again: pip install -e ."
    assert f"genai-prices {version('genai-prices')}" == PRICES.source
    assert "MIT" in newest.BUILT_IN.with_name("LICENSE").read_text()


@pytest.mark.sampled(12)
@pytest.mark.parametrize("provider", providers, ids=lambda provider: provider.id)
def test_each_listed_price_is_the_packages_own(provider: theirs.Provider) -> None:
    """For all models, before and after each day on which a price changes, at the hours at which one does, in all tiers,
    and on both sides of each step."""
    vendor = PRICES.vendor(provider.id)
    assert len(vendor.models) == len(provider.models)
    for model, their_model in zip(vendor.models, provider.models, strict=True):
        for today in days(their_model):
            assert_same(vendor, model, provider, their_model, today)


def assert_same(
    vendor: Vendor, model: Model, provider: theirs.Provider, their_model: theirs.ModelInfo, today: date
) -> None:
    table = table_of("m", vendor, model, today, None)
    for at in hours(their_model, today):
        standard = their_model.get_prices(at)
        assert (table is None) == (not known(standard)), (their_model.id, at)
        if table is None:
            return
        for tier in (None, *tiers(their_model, at)):
            context = {} if tier is None else {tier[0]: tier[1]}
            for usage in usages(their_model.get_prices(at, context)):
                ours = cost(usage, table, tier and tier[1], at.timestamp())
                expected = to_pico(their_cost(usage, provider, their_model, at, context))
                assert ours == expected, (their_model.id, at, tier, usage)


def known(price: theirs.ModelPrice) -> bool:
    """Whether all that a chat completion can cost is in it."""
    return None not in (price.input_mtok, price.output_mtok) and not any(
        getattr(price, part) is not None for part in convert.UNCOUNTED
    )


def their_cost(
    usage: Usage, provider: theirs.Provider, model: theirs.ModelInfo, at: datetime, context: dict[str, str]
) -> Decimal:
    counts = genai_prices.Usage(
        input_tokens=usage.prompt_tokens,
        output_tokens=usage.completion_tokens,
        cache_read_tokens=usage.cached_tokens,
        cache_write_tokens=usage.cache_write_tokens,
        cache_write_1h_tokens=usage.cache_write_1h_tokens,
    )
    return model.calc_price(counts, provider, genai_request_timestamp=at, price_context=context).total_price


def parts(model: theirs.ModelInfo) -> Iterator[theirs.ConditionalPrice]:
    yield from model.prices if isinstance(model.prices, list) else [theirs.ConditionalPrice(prices=model.prices)]


def days(model: theirs.ModelInfo) -> set[date]:
    conditions = [part.constraint for part in (*parts(model), *(model.price_variants or ()))]
    starts = [each.start_date for each in conditions if isinstance(each, theirs.StartDateConstraint)]
    return {date(2026, 11, 22), *starts, *(start - timedelta(1) for start in starts)}


def hours(model: theirs.ModelInfo, today: date) -> Iterator[datetime]:
    """Noon, and a second before, at and after each hour at which a price begins or ends."""
    noon = datetime(today.year, today.month, today.day, 12, tzinfo=UTC)
    yield noon
    for part in parts(model):
        if isinstance(part.constraint, theirs.TimeOfDateConstraint):
            for at in (part.constraint.start_time, part.constraint.end_time):
                for second in (-1, 0, 1):
                    moment = datetime.combine(today, at, at.tzinfo or UTC) + timedelta(seconds=second)
                    yield moment.astimezone(UTC).replace(year=today.year, month=today.month, day=today.day)


def tiers(model: theirs.ModelInfo, at: datetime) -> set[tuple[str, str]]:
    """What answers may state as their tier, as the package's context has it. What is in force, and not by the hour."""
    noon = at.replace(hour=12)
    named = {
        next(iter(variant.when.items()))
        for variant in model.price_variants or ()
        if len(variant.when) == 1 and (variant.constraint is None or variant.constraint.active(noon))
    }
    return {(key, name) for key, name in named if key in ("service_tier", "processing") and name not in ORDINARY}


def usages(price: theirs.ModelPrice) -> Iterator[Usage]:
    steps = {tier.start for kind in convert.KINDS.values() for tier in getattr(getattr(price, kind), "tiers", ())}
    for prompt in (1_000, *steps, *(step + 1 for step in steps)):
        yield Usage(prompt, 100, prompt + 100)
        yield Usage(prompt, 100, prompt + 100, 300)
        yield Usage(prompt, 100, prompt + 100, 300, None, 200)
        yield Usage(prompt, 100, prompt + 100, 300, None, 200, 50)


# -- whose address, and which model a name means


def names(provider: theirs.Provider) -> list[str]:
    """What the vendor's models are matched by, and what is like it."""

    def texts(clause: Any) -> Iterator[str]:
        yield from (text for text in vars(clause).values() if isinstance(text, str))
        for inner in (*getattr(clause, "or_", ()), *getattr(clause, "and_", ())):
            yield from texts(inner)

    plain = sorted({text for model in provider.models for text in (model.id, *texts(model.match))})
    draw = level.seeded(f"names {provider.id}")
    chosen = draw.sample(plain, min(len(plain), level.amount(20, 300)))
    return [spelled for name in chosen for spelled in (name, name.upper(), f"{name}-20261101", f"x{name}", name[:-1])]


@pytest.mark.campaign
@pytest.mark.parametrize("provider", providers, ids=lambda provider: provider.id)
def test_names_mean_the_models_of_the_package(provider: theirs.Provider) -> None:
    vendor = PRICES.vendor(provider.id)
    own = {id(theirs): ours for theirs, ours in zip(provider.models, vendor.models, strict=True)}
    assert vendor.address == provider.api_pattern
    for name in names(provider):
        found = provider.find_model(name, all_providers=providers)
        ours = find_model(vendor, name)
        assert (ours is None) == (found is None), name
        if found is not None and id(found) in own:
            assert ours is own[id(found)], name
        elif found is not None:
            assert ours is not None
            assert not ours.tiers
            assert ours.match.fits(found.id.lower()) == found.is_match(found.id), name


@pytest.mark.campaign
def test_models_have_the_makers_of_the_package() -> None:
    for name in {name.lower() for provider in providers for name in names(provider)}:
        makers = [each.id for each in providers if each.model_match is not None and each.model_match.is_match(name)]
        assert [vendor.id for vendor in PRICES.vendors if vendor.makes.fits(name)] == makers, name
