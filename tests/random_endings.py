"""Any number of endings of attempts, at random."""

import msgspec
from hypothesis import strategies as st

from batchrun.records import (
    CompletionRecord,
    Discarded,
    Ending,
    OfflineCount,
    RowError,
    SetAside,
    Status,
    Usage,
    Verdict,
)
from tests.endings import MODEL

COUNTS = st.integers(0, 10**9)
SECONDS = st.floats(0, 1e10)
TEXTS = st.text(max_size=20)
PICO_USD = st.integers(0, 10**18)
OFFLINE = st.none() | st.builds(OfflineCount, COUNTS, COUNTS)
USAGES = st.builds(Usage, COUNTS, COUNTS, COUNTS, st.none() | COUNTS, st.none() | COUNTS)
MODELS = st.sampled_from([MODEL, "another", "модель"])
ERRORS = st.builds(RowError, TEXTS, st.none() | st.integers(100, 599), st.none() | TEXTS, st.none() | TEXTS)
KEYS = st.binary(min_size=16, max_size=16)

SET_ASIDE = st.builds(SetAside, st.integers(1, 50), TEXTS, st.none() | TEXTS, TEXTS)

COMPLETIONS = st.builds(
    CompletionRecord,
    row=st.just(0),
    key=KEYS,
    status=st.sampled_from(Status),
    attempts=st.integers(1, 50),
    http_status=st.none() | st.integers(100, 599),
    error=st.none() | ERRORS,
    request_id=st.none() | TEXTS,
    finished_at=SECONDS,
    latency_s=SECONDS,
    time_to_first_token_s=st.none() | SECONDS,
    model=MODELS,
    answered_model=st.none() | MODELS,
    usage=st.none() | USAGES,
    cost_pico_usd=st.none() | PICO_USD,
    last_cost_pico_usd=st.none() | PICO_USD,
    maybe_billed=st.booleans(),
    possibly_billed_pico_usd=st.none() | PICO_USD,
    possibly_billed_tokens=COUNTS,
    raw=st.binary(max_size=50),
    offline=OFFLINE,
    variant=st.integers(0, 3),
    set_aside=st.lists(SET_ASIDE, max_size=2).map(tuple),
)
DISCARDED = st.builds(
    Discarded,
    row=st.just(0),
    n=st.just(1),
    verdict=st.sampled_from(Verdict),
    counted=st.booleans(),
    http_status=st.none() | st.integers(100, 599),
    error_kind=st.none() | TEXTS,
    message=st.none() | TEXTS,
    request_id=st.none() | TEXTS,
    at=SECONDS,
    model=MODELS,
    usage=st.none() | USAGES,
    cost_pico_usd=st.none() | PICO_USD,
    maybe_billed=st.booleans(),
    possibly_billed_pico_usd=st.none() | PICO_USD,
    possibly_billed_tokens=COUNTS,
    key=KEYS,
    offline=OFFLINE,
    said=st.none() | TEXTS,
)


def at_its_row(place: int, ending: Ending) -> Ending:
    return msgspec.structs.replace(ending, row=place)


ENDINGS = st.lists(COMPLETIONS | DISCARDED, max_size=30).map(
    lambda endings: [at_its_row(place, ending) for place, ending in enumerate(endings)]
)
"""Endings of different rows, all fields anything they may be."""
