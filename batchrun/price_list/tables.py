"""The price list as `prices.json` has it, which `convert` writes and `lookup` reads. PURE."""

import re
from datetime import date
from decimal import Decimal
from functools import cached_property

import msgspec


class Match(msgspec.Struct, frozen=True):
    """Fits a name if any of these does; `all_of` are groups whose members must all fit. All texts are lower case."""

    equals: tuple[str, ...] = ()
    starts_with: tuple[str, ...] = ()
    ends_with: tuple[str, ...] = ()
    contains: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ()
    all_of: "tuple[tuple[Match, ...], ...]" = ()

    def fits(self, name: str) -> bool:
        """True if it matches that name, which is lower case."""
        return (
            name in self.equals
            or name.startswith(self.starts_with)
            or name.endswith(self.ends_with)
            or any(part in name for part in self.contains)
            or any(re.search(pattern, name) for pattern in self.patterns)
            or any(all(each.fits(name) for each in group) for group in self.all_of)
        )


class Rate(msgspec.Struct, frozen=True, array_like=True):
    """USD per million tokens of one kind. `steps`: the price of whole requests of more than so many prompt tokens."""

    base: Decimal
    steps: tuple[tuple[int, Decimal], ...] = ()

    def above(self, prompt_tokens: int) -> Decimal:
        """The price of requests with more tokens than that."""
        return next((price for start, price in reversed(self.steps) if start <= prompt_tokens), self.base)


class ListedPrice(msgspec.Struct, frozen=True):
    """The price of one model: from the day `since`, or at some `hours` (first and end, seconds of the day in UTC).

    `tier`: for answers that name this service tier; prices that it lacks are those without a tier. `uncounted`:
    a part of it depends on what no usage counts.
    """

    input: Rate | None = None
    cached_input: Rate | None = None
    output: Rate | None = None
    cache_write: Rate | None = None
    cache_write_1h: Rate | None = None
    uncounted: bool = False
    since: date | None = None
    hours: tuple[int, int] | None = None
    tier: str | None = None

    @property
    def rates(self) -> tuple[Rate | None, ...]:
        """Input, cached input, output, cache write, cache write for an hour."""
        return self.input, self.cached_input, self.output, self.cache_write, self.cache_write_1h


class Model(msgspec.Struct, frozen=True):
    """A model under all its names. The last of `prices` that holds counts, if none does the first."""

    match: Match
    prices: tuple[ListedPrice, ...]
    tiers: tuple[ListedPrice, ...] = ()


class Vendor(msgspec.Struct, frozen=True, dict=True):
    """A seller of models, at the addresses that the pattern matches; `makes` are its own models.

    For models that it does not list, the lists of the vendors in `also_sells` count.
    """

    id: str
    name: str
    address: str
    makes: Match
    also_sells: tuple[str, ...]
    listed: msgspec.Raw

    @cached_property
    def models(self) -> tuple[Model, ...]:
        """In the order in which they are tried."""
        return _MODELS.decode(self.listed)  # not with the list: all vendors' take 12 ms, one's less than one

    def find(self, name: str) -> Model | None:
        """The first model that goes by the name, which is lower case."""
        return next((model for model in self.models if model.match.fits(name)), None)


_MODELS = msgspec.json.Decoder(tuple[Model, ...])


class PriceList(msgspec.Struct, frozen=True):
    """All vendors. `source` is the name and version of the package that the list comes from, for people."""

    source: str
    version: str
    vendors: tuple[Vendor, ...]

    def vendor(self, id_: str) -> Vendor:
        return next(vendor for vendor in self.vendors if vendor.id == id_)
