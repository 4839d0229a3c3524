"""Endings of attempts as the pipeline makes them."""

import msgspec

from batchrun.records import CompletionRecord, Discarded, Status, Usage, Verdict

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


def completion(row: int, **changes: object) -> CompletionRecord:
    """A row answered at its first attempt, except for `changes`."""
    whole = CompletionRecord(
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
        cost_pico_usd=45_500_000,
        last_cost_pico_usd=45_500_000,
        maybe_billed=False,
        possibly_billed_pico_usd=None,
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
        cost_pico_usd=0,
        maybe_billed=False,
        possibly_billed_pico_usd=None,
        key=row.to_bytes(16, "big"),
    )
    return msgspec.structs.replace(whole, **changes)


def stored_attempt(ending: Discarded) -> Discarded:
    """What the checkpoint keeps of a discarded attempt."""
    return msgspec.structs.replace(
        ending, maybe_billed=False, possibly_billed_pico_usd=None, possibly_billed_tokens=0, key=b"", offline=None
    )
