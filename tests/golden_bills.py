"""The golden bills (tests/golden/bills.jsonl) through the product: `python -m tests.golden_bills` writes the table of
docs/golden_bills.md.

Each line has an answer's usage in a vendor's own words, and its bill by hand: `parts` are tokens × USD per million.
"""

from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec

from batchrun.dispatch.attempt_result import cost_of, reported
from batchrun.job.settings import Retry
from batchrun.money import to_usd
from batchrun.policy import judge
from batchrun.price_list.lookup import resolve
from batchrun.records import Attempt
from batchrun.response.answer import parse

TODAY, DAY_S = "2026-11-22", 86_400 * 20_000


class Bill(msgspec.Struct, frozen=True):
    """One answer with its right bill; `usd` None: unknown."""

    vendor: str
    url: str
    model: str
    what: str
    parts: list[tuple[int, Decimal]]
    usd: Decimal | None
    source: str
    body: dict[str, Any] = {}
    events: list[dict[str, Any]] = []
    hour: float = 12.0
    headers: dict[str, str] = {}


def bills() -> list[Bill]:
    lines = (Path(__file__).parent / "golden" / "bills.jsonl").read_bytes().splitlines()
    return [msgspec.json.decode(line, type=Bill) for line in lines]


def answered(bill: Bill) -> Attempt:
    """The attempt that got this answer, whole or streamed."""
    message = {"index": 0, "message": {"content": "Fine."}, "finish_reason": "stop"}
    encode = msgspec.json.encode
    body = encode({"id": "c", "model": bill.model, "choices": [message], **bill.body})
    if bill.events:
        text = {"choices": [{"index": 0, "delta": {"content": "Fine."}, "finish_reason": "stop"}]}
        body = b"".join(b"data: " + encode(event) + b"\n\n" for event in (text, *bill.events)) + b"data: [DONE]\n\n"
    return Attempt(DAY_S + bill.hour * 3600, 0.5, 200, bill.headers, body, streamed=bool(bill.events))


def billed(bill: Bill) -> Decimal | None:
    """What the product makes of it."""
    attempt = answered(bill)
    answer = parse(attempt.body)
    judgement = judge(attempt, answer, Retry())
    cost = cost_of(attempt, answer, judgement, resolve(bill.model, {}, TODAY, bill.url), reported(attempt, answer))
    return None if cost is None else to_usd(cost)


def table() -> Iterator[str]:
    yield "| vendor | model | the answer's usage | tokens × USD per million | USD | source |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for bill in bills():
        parts = " + ".join(f"{tokens:,} × {price}" for tokens, price in bill.parts) or "as stated"
        usd = "unknown" if bill.usd is None else f"{bill.usd.normalize():f}"
        parts = parts if bill.usd is not None else "none"
        yield f"| {bill.vendor} | {bill.model} | {bill.what} | {parts} | {usd} | {bill.source} |"


if __name__ == "__main__":
    print("\n".join(table()))
