"""The prices of a run's models, as an entry of its manifest keeps them. PURE."""

from collections.abc import Mapping
from decimal import Decimal

import msgspec

from batchrun import prices
from batchrun.prices import PriceTable
from batchrun.store.manifest import Manifest

ENTRY = "prices"

Tables = dict[str, PriceTable | None]
"""By model; None where no price is known."""


def decode(entries: Mapping[str, str]) -> Tables:
    """The tables in the checkpoint's manifest entries.

    Raises:
        msgspec.DecodeError: they are damaged.
    """
    return msgspec.json.decode(entries.get(ENTRY, "{}"), type=Tables)


def encode(tables: Tables) -> dict[str, str]:
    """The tables as a checkpoint entry."""
    return {ENTRY: msgspec.json.encode(tables).decode()}


def most_usd(manifest: Manifest, tables: Tables, *tiers: str | None) -> Decimal | None:
    """The most that any one request of the run can cost; None if a price is unknown."""
    requests = manifest.max_request.items()
    bounds = [prices.upper_bound(*tokens, tables.get(model), *tiers) for model, tokens in requests]
    return None if None in bounds else max(filter(None, bounds), default=Decimal(0))
