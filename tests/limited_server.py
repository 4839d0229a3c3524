"""The real gate against the simulator's own buckets, in one process on a clock that jumps: minutes in milliseconds."""

import asyncio
import heapq
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from batchrun.job import settings
from batchrun.limits.admission import Demand, Found, Limit, Outcome
from batchrun.limits.circuit import Circuit
from batchrun.limits.gate import Gate
from batchrun.limits.in_flight import InFlight
from batchrun.limits.rates import RateLimits
from batchrun.limits.shared_admission import SharedAdmission
from batchrun.records import RowError, Verdict
from batchrun.response.retry_after import retry_after_s
from batchrun.simulator.limits import BURST_S, Limits
from batchrun.simulator.refusal import Refused

LATENCY_S = 0.4
LATENCY_SIGMA = 0.3
NETWORK_S = 0.002


@dataclass(slots=True)
class Exchange:
    """One request as the server saw it."""

    at_s: float
    row: int
    tokens: int
    status: int


class Server:
    """Limits, latency and headers as the simulator has them, on the running loop's clock."""

    def __init__(self, rpm: int | None = None, tpm: int | None = None, *, headers: bool = True, seed: int = 1) -> None:
        self._rng = random.Random(seed)
        self._headers = headers
        self.started_s = asyncio.get_running_loop().time()
        self._broken = False
        self.failing = 0.0
        self.refused_by_chance = frozenset[int]()  # which exchanges, whatever the limits say
        self.exchanges: list[Exchange] = []
        self.limit(rpm, tpm)

    def limit(self, rpm: int | None, tpm: int | None) -> None:
        """Other limits from now on; their buckets are full."""
        self._limits = Limits(rpm, tpm, headers=self._headers, now_s=_now_s())

    def break_down(self, *, broken: bool) -> None:
        """From now on every answer is a 500, or none is."""
        self._broken = broken

    async def answer(self, row: int, tokens: int) -> tuple[int, str, Mapping[str, str]]:
        """Status, message and headers of the answer."""
        await asyncio.sleep(NETWORK_S)
        at_s = _now_s()
        try:
            if self._broken or self._rng.random() < self.failing:
                raise Refused(500, "broken", code="server_error")
            if len(self.exchanges) in self.refused_by_chance:
                raise Refused(429, "slow down", code="rate_limit_exceeded")
            self._limits.admit(tokens, at_s)
        except Refused as refused:
            self.exchanges.append(Exchange(at_s, row, tokens, refused.status))
            await asyncio.sleep(NETWORK_S)
            headers = {name.lower(): value for name, value in (*self._limits.headers(at_s), *refused.headers)}
            return refused.status, refused.message, headers
        self.exchanges.append(Exchange(at_s, row, tokens, 200))
        await asyncio.sleep(LATENCY_S * math.exp(self._rng.gauss(0, LATENCY_SIGMA)))
        return 200, "", dict(self._limits.headers(_now_s()))

    def accepted(self, since_s: float = 0.0, until_s: float = math.inf) -> list[Exchange]:
        """What was accepted between two moments, in seconds since the start."""
        since_s, until_s = since_s + self.started_s, until_s + self.started_s
        return [e for e in self.exchanges if e.status == 200 and since_s <= e.at_s < until_s]

    def refused(self) -> float:
        """The share of refusals."""
        return sum(e.status == 429 for e in self.exchanges) / len(self.exchanges)


@dataclass(slots=True)
class Run:
    """How a run through the gate went."""

    server: Server
    took_s: float = 0.0
    done: list[int] = field(default_factory=list)
    sent: list[int] = field(default_factory=list)
    changes: list[tuple[float, str]] = field(default_factory=list)


def new_gate(
    run: Run,
    *,
    max_in_flight: int = 64,
    first_in_flight: int = 8,
    found: Found = Found(),  # noqa: B008  (frozen)
    **limits: Any,
) -> Gate:
    """A gate that records its changes in the run."""

    def log(what: Limit, before: float | None, after: float | None, why: str) -> None:
        run.changes.append((_now_s() - run.server.started_s, f"{what}: {before} -> {after}: {why}"))

    state = Circuit(
        in_flight=InFlight(max_in_flight, first_in_flight),
        max_outage_s=7_200.0,
        resumed=False,
        uniform=random.Random(7).random,
        on_change=lambda before, after: run.changes.append((_now_s() - run.server.started_s, f"{before} -> {after}")),
    )
    loop = asyncio.get_running_loop()
    rates = RateLimits(settings.Limits(**limits), loop.time(), found=found, on_rate_change=log)
    return Gate(state, SharedAdmission(loop, state), rates)


async def send_all(
    run: Run,
    gate: Gate,
    sizes: Sequence[int],
    *,
    estimate: Callable[[int], int] = lambda tokens: tokens,
    learn: Callable[[int, int], None] = lambda row, tokens: None,
    workers: int = 64,
) -> None:
    """Every row is answered. A refused row waits and is sent again, before new ones."""
    started_s = _now_s()
    rows = list(enumerate(sizes))[::-1]
    waiting: list[tuple[float, int, int]] = []

    async def worker() -> None:
        while rows or waiting:
            if waiting and (not rows or waiting[0][0] <= _now_s()):
                due_s, row, tokens = heapq.heappop(waiting)
                await asyncio.sleep(max(0.0, due_s - _now_s()))
            else:
                row, tokens = rows.pop()
            demand = Demand(estimate(row), 0)
            slot = await gate.admit(demand)
            run.sent.append(row)
            status, message, headers = await run.server.answer(row, tokens)
            if status == 200:
                learn(row, tokens)
                gate.settle(slot, tokens)
            gate.read_headers(slot, headers)
            gate.observe(slot, outcome(row, status, message, headers))
            gate.release(slot, 0)
            if status == 200:
                run.done.append(row)
            elif status == 429:
                heapq.heappush(waiting, (_now_s() + (retry_after_s(headers, 0.0) or 1.0), row, tokens))
            else:
                rows.insert(0, (row, tokens))

    await asyncio.gather(*(worker() for _ in range(workers)))
    run.took_s = _now_s() - started_s


def outcome(row: int, status: int, message: str, headers: Mapping[str, str]) -> Outcome:
    """The policy's outcome for such an answer."""
    if status == 200:
        return Outcome(row, Verdict.OK)
    error = RowError("refused", status, None, message)
    return Outcome(row, Verdict.SLOW if status == 429 else Verdict.FREE, error, retry_after_s(headers, 0.0))


def ideal_s(rows: int, tokens: int, rpm: int | None, tpm: int | None) -> float:
    """The least time: what the limits give, less the server's burst, and one median latency."""
    needed = max(rows / rpm if rpm else 0.0, tokens / tpm if tpm else 0.0)
    return needed * 60 - BURST_S + LATENCY_S


def during(seconds: float, then: Callable[[], None]) -> None:
    """Calls `then` after this many seconds."""
    asyncio.get_running_loop().call_later(seconds, then)


def _now_s() -> float:
    return asyncio.get_running_loop().time()
