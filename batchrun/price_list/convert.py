"""Converts the list of the package `genai-prices` into plain JSON, whose shape `tables` describes.

The build writes it into the package once (hatch_build.py), so that a run needs neither `genai-prices` nor what that
imports. hatch_build.py loads this file by itself: it must import nothing of batchrun.
"""

import json
import os
from datetime import timedelta
from decimal import Decimal
from importlib.metadata import distribution, version
from pathlib import Path
from typing import Any

PACKAGE = "genai-prices"

KINDS = {
    "input": "input_mtok",
    "cached_input": "cache_read_mtok",
    "output": "output_mtok",
    "cache_write": "cache_write_mtok",
    "cache_write_1h": "cache_write_1h_mtok",
}
"""Our names of the kinds of token that the usage of a chat completion counts, and the package's."""

UNCOUNTED = (
    *("requests_kcount", "output_reasoning_mtok", "output_citation_mtok"),
    *("output_audio_mtok", "output_image_mtok", "output_video_mtok"),
)
"""Parts of a price that a plain usage does not count: fees by search context, kinds of output with their own
price. Such a price is unknown here; the servers that have one state what an answer cost.
"""

_LISTS = {
    "ClauseEquals": "equals",
    "ClauseStartsWith": "starts_with",
    "ClauseEndsWith": "ends_with",
    "ClauseContains": "contains",
}
_DAY_S = 86_400


def write(folder: Path) -> None:
    """Writes the installed list to `prices.json` in the folder, and the terms under which it may be passed on."""
    terms = distribution(PACKAGE).read_text("licenses/LICENSE")
    if not terms:
        raise ValueError(f"{PACKAGE} {version(PACKAGE)} comes without its licence")
    folder.mkdir(exist_ok=True)
    (folder / "LICENSE").write_text(terms, encoding="utf-8")
    unfinished = folder / f"prices.json.{os.getpid()}"
    unfinished.write_text(installed(), encoding="utf-8")
    unfinished.replace(folder / "prices.json")  # a run may read it meanwhile


def installed() -> str:
    """The list of the installed package, as JSON.

    Raises:
        ValueError: it holds something that this version of batchrun can't express.
    """
    from genai_prices.data import providers

    vendors = [
        {
            "id": provider.id,
            "name": provider.name,
            "address": provider.api_pattern,
            "makes": _match(provider.model_match) if provider.model_match is not None else {},
            "also_sells": provider.fallback_model_providers or [],
            "listed": [_model(each) for each in provider.models],
        }
        for provider in providers
    ]
    whole = {"source": f"{PACKAGE} {version(PACKAGE)}", "version": version(PACKAGE), "vendors": vendors}
    return json.dumps(whole, separators=(",", ":"))


def _model(model: Any) -> dict[str, object]:
    listed = model.prices if isinstance(model.prices, list) else [model]
    tiers: list[dict[str, object]] = []
    for variant in model.price_variants or ():
        name, when = variant.when.get("service_tier") or variant.when.get("processing"), _when(variant.constraint)
        if name is not None and len(variant.when) == 1 and "hours" not in when:  # else more than the tier decides
            tiers.append(_price(variant.prices) | when | {"tier": name})
    return {
        "match": _match(model.match),
        "prices": [_price(each.prices) | _when(getattr(each, "constraint", None)) for each in listed],
        "tiers": tiers,
    }


def _when(constraint: Any) -> dict[str, object]:
    """From which day on, or at which hours, a price holds; hours are seconds of the day in UTC."""
    match type(constraint).__name__:
        case "NoneType":
            return {}
        case "StartDateConstraint":
            return {"since": constraint.start_date.isoformat()}
        case "TimeOfDateConstraint":
            hours: list[int] = []
            for at in (constraint.start_time, constraint.end_time):
                offset = at.utcoffset() or timedelta()
                seconds = at.hour * 3600 + at.minute * 60 + at.second - int(offset.total_seconds())
                hours.append(seconds % _DAY_S)
            return {"hours": hours}
    raise ValueError(f"a price has an unknown condition: {constraint}")


def _price(price: Any) -> dict[str, object]:
    """By kind of token; a price with a part that is not counted says so."""
    stated = {name: value for name, value in vars(price).items() if value is not None}
    rates: dict[str, object] = {ours: _rate(stated[theirs]) for ours, theirs in KINDS.items() if theirs in stated}
    return rates | ({"uncounted": True} if any(part in stated for part in UNCOUNTED) else {})


def _rate(rate: Any) -> list[object]:
    """USD per million tokens, and [above so many tokens of the prompt, USD] for each higher step."""
    if isinstance(rate, Decimal):
        return [_usd(rate)]
    if any(tier.start <= 0 for tier in rate.tiers):
        raise ValueError(f"a price step has no first token: {rate}")
    return [_usd(rate.base), [[tier.start, _usd(tier.price)] for tier in rate.tiers]]


def _usd(price: Decimal) -> str:
    if not price.is_finite() or price < 0:
        raise ValueError(f"a price is not an amount of money: {price}")
    return str(price)


def _match(clause: Any) -> dict[str, Any]:
    """The clause as lists of texts, one of which must fit. The package compares without case."""
    match name := type(clause).__name__:
        case "ClauseRegex":
            return {"patterns": [clause.regex]}
        case "ClauseAnd":
            return {"all_of": [[_match(each) for each in clause.and_]]}
        case "ClauseOr":
            joined: dict[str, Any] = {}
            for each in clause.or_:
                for kind, texts in _match(each).items():
                    joined.setdefault(kind, []).extend(texts)
            return joined
    if name not in _LISTS:
        raise ValueError(f"a model is matched by an unknown kind of clause: {clause}")
    kind = _LISTS[name]
    return {kind: [getattr(clause, kind).lower()]}
