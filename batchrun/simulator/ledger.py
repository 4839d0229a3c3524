"""The ledger: what was served and billed, one JSON line for each exchange. Tests check batchrun's bill against it.

A line is one `os.write` to a file opened to append, made when the work is done and before any byte of the answer
leaves. So a line survives `kill -9` of the client and of the simulator, and every answer that a client got is in it.
"""

import os
from collections import Counter
from hashlib import blake2b
from pathlib import Path
from typing import Any

import msgspec

_LONGEST_LINE = 65_536  # bytes; lines have some hundreds, and a request's id is the only part that a client chooses
_TOKENS = ("prompt_tokens", "cached_tokens", "completion_tokens", "reasoning_tokens")
_NOT_THE_QUESTION = frozenset({"stream", "stream_options", "service_tier", "prompt_cache_key"})


class LedgerLine(msgspec.Struct, frozen=True, kw_only=True):
    """One exchange. Tokens are 0 where nothing was billed."""

    ordinal: int
    """Counted from 1 over the life of one simulator."""
    arrived_s: float
    """Unix time at which the request's headers had arrived."""
    time_s: float
    """Unix time at which the work was done, just before the answer leaves."""
    request_id: str
    """The answer's `x-request-id`."""
    client_request_id: str | None
    """The request's `X-Client-Request-Id`."""
    question: str
    """`question_of` the body, in hexadecimal."""
    status: int | None
    """None: no status line was sent."""
    fault: str | None
    """The kind of fault that applied."""
    service_tier: str | None = None
    """The tier that the answer names: that which is billed."""
    billed: bool
    prompt_tokens: int
    cached_tokens: int
    """Part of `prompt_tokens`."""
    completion_tokens: int
    reasoning_tokens: int
    """Part of `completion_tokens`."""
    connection: int
    """The number of the connection, from 1."""
    connection_request: int
    """The number of the request on that connection, from 1: above 1 it was reused."""


class RequestLedger:
    """Counts exchanges and appends them to a file, if there is one. Call `close` at the end."""

    def __init__(self, path: str | None) -> None:
        self._fd: int | None = None
        if path is not None:
            self._fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            # A kill may have left a torn line at the end: it goes.
            size = os.fstat(self._fd).st_size
            tail = os.pread(self._fd, _LONGEST_LINE, max(0, size - _LONGEST_LINE))
            os.ftruncate(self._fd, size - (len(tail) - (tail.rfind(b"\n") + 1)))
        self._encode = msgspec.json.Encoder().encode
        self._counts: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()

    def write(self, line: LedgerLine) -> None:
        if self._fd is not None:
            os.write(self._fd, self._encode(line) + b"\n")
        self._counts["exchanges"] += 1
        if line.billed:
            self._counts["billed"] += 1
            for name in _TOKENS:
                self._counts[name] += getattr(line, name)
        elif line.status != 200:
            self._refused[str(line.status or "unanswered")] += 1

    def totals(self) -> bytes:
        """`{"exchanges", "billed", "prompt_tokens", …, "refused": {status: count}}` as JSON; tokens are billed ones."""
        counts: dict[str, object] = {name: self._counts[name] for name in ("exchanges", "billed", *_TOKENS)}
        return msgspec.json.encode(counts | {"refused": dict(self._refused)})

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def read_ledger(path: Path | str) -> list[LedgerLine]:
    """The lines in order. A last line without its newline was torn by a kill and is left out."""
    try:
        whole, _, _torn = Path(path).read_bytes().rpartition(b"\n")
    except FileNotFoundError:
        return []
    decode = msgspec.json.Decoder(LedgerLine).decode
    return [decode(line) for line in whole.splitlines()]


def question_of(body: dict[str, Any]) -> bytes:
    """BLAKE2b-128 of the body as JSON with sorted keys, without what only sets how it is served and sent."""
    kept = {name: value for name, value in body.items() if name not in _NOT_THE_QUESTION}
    return blake2b(msgspec.json.encode(kept, order="sorted"), digest_size=16).digest()
