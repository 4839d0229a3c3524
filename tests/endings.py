"""Endings of attempts as the pipeline makes them, one by one or any number at random."""

from decimal import Decimal

import msgspec
from hypothesis import strategies as st

from batchrun.records import Completion, Discarded, Ending, OfflineCount, RowError, SetAside, Status, Usage, Verdict

MODEL = "vtrix-gpt-5.3-codex"


def answer_body(content: str = "fine", **changes: object) -> bytes:
    """A chat completion as the wire has it."""
    body = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1_795_000_000,
        "model": MODEL,
        "choices": [{"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12},
    }
    return msgspec.json.encode(body | changes)


def completion(row: int, **changes: object) -> Completion:
    """A row answered at its first attempt, except for `changes`."""
    whole = Completion(
        row=row,
        key=row.to_bytes(16, "big"),
        status=Status.OK,
        attempts=1,
        http_status=200,
        error=None,
        request_id=f"req-{row}",
        finished_at=1_795_000_000.25,
        latency_s=0.5,
        time_to_first_token_s=None,
        model=MODEL,
        answered_model=MODEL,
        usage=Usage(10, 2, 12, 4, 1),
        cost_usd=Decimal("0.000045500000"),
        last_cost_usd=Decimal("0.000045500000"),
        maybe_billed=False,
        possibly_billed_usd=None,
        raw=answer_body(),
    )
    return msgspec.structs.replace(whole, **changes)


def discarded(row: int, n: int = 1, **changes: object) -> Discarded:
    """An attempt that came to a 500, except for `changes`."""
    whole = Discarded(
        row=row,
        n=n,
        verdict=Verdict.FREE,
        counted=True,
        http_status=500,
        error_kind="server_error",
        message="HTTP 500",
        request_id=f"req-{row}-{n}",
        at=1_795_000_000.0,
        model=MODEL,
        usage=None,
        cost_usd=Decimal(0),
        maybe_billed=False,
        possibly_billed_usd=None,
        key=row.to_bytes(16, "big"),
    )
    return msgspec.structs.replace(whole, **changes)


def stored_attempt(ending: Discarded) -> Discarded:
    """What the checkpoint keeps of a discarded attempt."""
    return msgspec.structs.replace(
        ending, maybe_billed=False, possibly_billed_usd=None, possibly_billed_tokens=0, key=b"", offline=None
    )


COUNTS = st.integers(0, 10**9)
SECONDS = st.floats(0, 1e10)
TEXTS = st.text(max_size=20)
USD = st.decimals(0, 10**6, places=12)
OFFLINE = st.none() | st.builds(OfflineCount, COUNTS, COUNTS)
USAGES = st.builds(Usage, COUNTS, COUNTS, COUNTS, st.none() | COUNTS, st.none() | COUNTS)
MODELS = st.sampled_from([MODEL, "another", "модель"])
ERRORS = st.builds(RowError, TEXTS, st.none() | st.integers(100, 599), st.none() | TEXTS, st.none() | TEXTS)
KEYS = st.binary(min_size=16, max_size=16)

SET_ASIDE = st.builds(SetAside, st.integers(1, 50), TEXTS, st.none() | TEXTS, TEXTS)

COMPLETIONS = st.builds(
    Completion,
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
    cost_usd=st.none() | USD,
    last_cost_usd=st.none() | USD,
    maybe_billed=st.booleans(),
    possibly_billed_usd=st.none() | USD,
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
    cost_usd=st.none() | USD,
    maybe_billed=st.booleans(),
    possibly_billed_usd=st.none() | USD,
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
