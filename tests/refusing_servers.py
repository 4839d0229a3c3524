"""Servers that refuse for different reasons, and the real gate before them, on a clock that jumps.

For each request a server decides whether it accepts it, how long its answer (or refusal) takes, and the Retry-After of
a refusal. A refused row waits and is sent again, as the backlog does it.
"""

import asyncio
import heapq
import math
import random
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Protocol

from batchrun.job.settings import Limits
from batchrun.limits.admission import Demand, Found, Outcome
from batchrun.limits.circuit import Circuit
from batchrun.limits.gate import Gate
from batchrun.limits.in_flight import InFlight
from batchrun.limits.rates import RateLimits
from batchrun.limits.shared_admission import SharedAdmission
from batchrun.records import RowError, Verdict

REFUSAL_S = 0.02
ROUNDING_S = 1e-6
"""Sums of seconds differ by less. A request that is sent at the moment of an answer comes after it."""

RETRY_S, JITTER_S = 0.3, 0.3
"""How long a row waits after a refusal without Retry-After, and what is added to each wait."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A server's reply to one request. `by_chance`: a refusal that no lower rate would have avoided."""

    taken: bool
    takes_s: float
    retry_after_s: float | None = None
    by_chance: bool = False
    http_status: int = 429
    """Of a refusal."""


class RefusingServer(Protocol):
    """Decides when a request arrives."""

    def reply_to(self, now_s: float, in_flight: int, rng: random.Random) -> Reply: ...


def spread(latency_s: float, sigma: float, rng: random.Random) -> float:
    return latency_s * math.exp(rng.gauss(0, sigma))


@dataclass
class Limited:
    """A bucket of `per_s` with two seconds' worth saved up, at least one request; `chance` refuses a share of all
    whatever the pace.

    `changes` are (seconds since the start, name of a field, its new value). A request arrives up to `network_s` late.
    """

    per_s: float = math.inf
    latency_s: float = 0.4
    retry_after_s: float | None = 1.0
    chance: float = 0.0
    refusal_s: float = REFUSAL_S
    changes: tuple[tuple[float, str, float], ...] = ()
    burst_s: float = 2.0
    http_status: int = 429
    network_s: float = 0.0
    latency_sigma: float = 0.25
    _level: float = field(default=math.inf, init=False)
    _at_s: float = field(default=0.0, init=False)

    def reply_to(self, now_s: float, in_flight: int, rng: random.Random) -> Reply:
        if self.network_s:
            now_s = max(self._at_s, now_s + self.network_s * rng.random())
        while self.changes and now_s >= self.changes[0][0]:
            (_, name, value), *rest = self.changes
            self.changes = tuple(rest)
            setattr(self, name, value)
        if self.per_s < math.inf:
            full = max(1.0, self.per_s * self.burst_s)
            self._level = min(full, self._level + (now_s - self._at_s) * self.per_s)
        else:
            self._level = math.inf
        self._at_s = now_s
        chance, empty = rng.random() < self.chance, self._level < 1 - 1e-9
        if chance or empty:
            return Reply(False, self.refusal_s, self.retry_after_s, by_chance=not empty, http_status=self.http_status)
        self._level -= 1
        return Reply(True, spread(self.latency_s, self.latency_sigma, rng))


@dataclass
class TokenLimited:
    """A bucket of `tokens_per_s` with two seconds' worth saved up, charged with what requests use: `used` ± `spread` of
    it. A client estimates `estimated` times as much. `requests_per_s` is a second bucket.
    """

    tokens_per_s: float
    used: int = 100
    spread: float = 0.0
    estimated: float = 1.0
    requests_per_s: float = math.inf
    latency_s: float = 0.4
    retry_after_s: float | None = 1.0
    names_tokens: bool = True
    chance: float = 0.0
    _level: float = field(default=math.inf, init=False)
    _at_s: float = field(default=0.0, init=False)
    _requests: Limited = field(init=False)
    size_of_next: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._requests = Limited(self.requests_per_s, self.latency_s, self.retry_after_s)

    def size(self, rng: random.Random) -> tuple[int, int]:
        """Tokens of the next request: the client's estimate, and what it will use."""
        self.size_of_next = max(1, int(self.used * (1 + self.spread * rng.uniform(-1, 1))))
        return max(1, int(self.used * self.estimated)), self.size_of_next

    def refusal(self) -> str:
        return "Rate limit reached for tokens per minute" if self.names_tokens else "refused"

    def reply_to(self, now_s: float, in_flight: int, rng: random.Random) -> Reply:
        full = 2 * self.tokens_per_s
        self._level = min(full, self._level + (now_s - self._at_s) * self.tokens_per_s)
        self._at_s = now_s
        if rng.random() < self.chance:
            return Reply(False, REFUSAL_S, self.retry_after_s, by_chance=True)
        if self._level < min(self.size_of_next, full):  # a request larger than the bucket leaves a debt
            return Reply(False, REFUSAL_S, self.retry_after_s)
        reply = self._requests.reply_to(now_s, in_flight, rng)
        if reply.taken:
            self._level -= self.size_of_next
        return reply


@dataclass
class InRuns:
    """Refuses the last `refused` of each `of` requests whatever the pace, before a bucket that holds `per_s`.

    What is refused in a run takes nothing from the bucket.
    """

    refused: int
    of: int
    per_s: float = math.inf
    latency_s: float = 0.1
    retry_after_s: float | None = None
    _arrived: int = field(default=0, init=False)
    _limit: Limited = field(init=False)

    def __post_init__(self) -> None:
        self._limit = Limited(self.per_s, self.latency_s, self.retry_after_s)

    def reply_to(self, now_s: float, in_flight: int, rng: random.Random) -> Reply:
        self._arrived += 1
        if (self._arrived - 1) % self.of >= self.of - self.refused:
            return Reply(False, REFUSAL_S, self.retry_after_s, by_chance=True)
        return self._limit.reply_to(now_s, in_flight, rng)


@dataclass
class BlackedOut:
    """Refuses everything for the first `dark_s` of each `every_s` seconds, before a bucket that holds `per_s`."""

    dark_s: float
    every_s: float
    per_s: float = math.inf
    latency_s: float = 0.1
    retry_after_s: float | None = None
    _limit: Limited = field(init=False)

    def __post_init__(self) -> None:
        self._limit = Limited(self.per_s, self.latency_s, self.retry_after_s)

    def reply_to(self, now_s: float, in_flight: int, rng: random.Random) -> Reply:
        if now_s % self.every_s < self.dark_s:
            return Reply(False, REFUSAL_S, self.retry_after_s, by_chance=True)
        return self._limit.reply_to(now_s, in_flight, rng)


@dataclass
class Out:
    """Fails with `http_status` for `length_s` from `begins_s` on (counted in `failed`), and answers all else."""

    begins_s: float
    length_s: float
    http_status: int = 500
    latency_s: float = 0.4
    failed: int = field(default=0, init=False)

    @property
    def ends_s(self) -> float:
        return self.begins_s + self.length_s

    def reply_to(self, now_s: float, in_flight: int, rng: random.Random) -> Reply:
        if self.begins_s <= now_s < self.ends_s:
            self.failed += 1
            return Reply(False, REFUSAL_S, by_chance=True, http_status=self.http_status)
        return Reply(True, spread(self.latency_s, 0.25, rng))


@dataclass
class Windowed:
    """Takes `quota` requests in each window of `window_s`, as fast as they come, and refuses all others.

    `says_end`: a refusal has a Retry-After until the window ends.
    """

    quota: int
    window_s: float
    latency_s: float = 0.2
    retry_after_s: float | None = None
    says_end: bool = False
    _window: int = field(default=-1, init=False)
    _taken: int = field(default=0, init=False)

    def reply_to(self, now_s: float, in_flight: int, rng: random.Random) -> Reply:
        if (window := int(now_s / self.window_s)) != self._window:
            self._window, self._taken = window, 0
        if self._taken >= self.quota:
            left_s = self.window_s - now_s % self.window_s
            return Reply(False, REFUSAL_S, left_s if self.says_end else self.retry_after_s)
        self._taken += 1
        return Reply(True, spread(self.latency_s, 0.25, rng))


@dataclass
class Crowded:
    """Refuses while it works on `most`; its answers take `network_s` to arrive, so a client counts a few more."""

    most: int
    latency_s: float = 0.2
    network_s: float = 0.0
    retry_after_s: float | None = None
    chance: float = 0.0
    _ends: list[float] = field(default_factory=list, init=False)

    def reply_to(self, now_s: float, in_flight: int, rng: random.Random) -> Reply:
        arrives_s = now_s + self.network_s * rng.random()
        while self._ends and self._ends[0] <= arrives_s + ROUNDING_S:
            heapq.heappop(self._ends)
        full = len(self._ends) >= self.most
        if full or rng.random() < self.chance:
            return Reply(False, REFUSAL_S, self.retry_after_s, by_chance=not full)
        works_s = spread(self.latency_s, 0.25, rng)
        heapq.heappush(self._ends, arrives_s + works_s)
        return Reply(True, arrives_s - now_s + works_s + self.network_s)


@dataclass
class Queueing:
    """Works on `most` at a time and refuses nothing: more in flight only wait longer."""

    most: int
    latency_s: float = 0.2
    _free_s: list[float] = field(default_factory=list, init=False)

    def reply_to(self, now_s: float, in_flight: int, rng: random.Random) -> Reply:
        if not self._free_s:
            self._free_s = [now_s] * self.most
        ends_s = max(now_s, heapq.heappop(self._free_s)) + spread(self.latency_s, 0.1, rng)
        heapq.heappush(self._free_s, ends_s)
        return Reply(True, ends_s - now_s)


@dataclass(slots=True)
class Played:
    """How a run went: seconds until the last answer, refusals and those not by chance, latencies, most in flight."""

    took_s: float = 0.0
    sent: int = 0
    refused: int = 0
    refused_for_cause: int = 0
    latencies_s: list[float] = field(default_factory=list)
    in_flight: list[int] = field(default_factory=list)
    answered_s: list[float] = field(default_factory=list)
    changes: list[tuple[float, str]] = field(default_factory=list)
    refusals: str | None = None
    found: Found = Found()  # noqa: RUF009  (frozen)

    @property
    def share_refused(self) -> float:
        return self.refused / self.sent

    @property
    def median_latency_s(self) -> float:
        return sorted(self.latencies_s)[len(self.latencies_s) // 2]


class _Rows:
    """Rows still to be sent: due retries first."""

    def __init__(self, rows: int) -> None:
        self._fresh = deque(range(rows))
        self._waiting: list[tuple[float, int]] = []
        self._left = rows
        self._changed = asyncio.Event()

    async def next(self) -> int | None:
        loop = asyncio.get_running_loop()
        while self._left:
            if self._waiting and self._waiting[0][0] <= loop.time():
                return heapq.heappop(self._waiting)[1]
            if self._fresh:
                return self._fresh.popleft()
            self._changed.clear()
            until_s = self._waiting[0][0] - loop.time() if self._waiting else None
            try:
                async with asyncio.timeout(until_s):
                    await self._changed.wait()
            except TimeoutError:
                pass
        return None

    def again(self, row: int, due_s: float) -> None:
        heapq.heappush(self._waiting, (due_s, row))
        self._changed.set()

    def done(self) -> None:
        self._left -= 1
        if not self._left:
            self._changed.set()


async def play(server: RefusingServer, rows: int, max_in_flight: int, seed: int, **limits: Any) -> Played:
    """All rows are answered."""
    loop, rng, played = asyncio.get_running_loop(), random.Random(seed), Played()
    started_s, waiting = loop.time(), _Rows(rows)
    in_flight = 0

    def log(what: str) -> None:
        played.changes.append((loop.time() - started_s, what))

    state = Circuit(
        in_flight=InFlight(max_in_flight),
        max_outage_s=7_200.0,
        resumed=False,
        uniform=random.Random(seed).random,
        on_change=lambda before, after: log(f"{before} -> {after}"),
    )
    rates = RateLimits(
        Limits(max_in_flight=max_in_flight, **limits),
        loop.time(),
        on_rate_change=lambda limit, before, after, why: log(f"{limit}: {before} -> {after}: {why}"),
    )
    gate = Gate(
        state,
        SharedAdmission(loop, state),
        rates,
        on_cause=lambda kind, why: log(f"{kind}: {why}"),
    )

    async def work() -> None:
        nonlocal in_flight
        while (row := await waiting.next()) is not None:
            estimate, used = server.size(rng) if isinstance(server, TokenLimited) else (100, 100)
            slot = await gate.admit(Demand(estimate, 0))
            sent_s = loop.time()
            if isinstance(server, TokenLimited):
                server.size_of_next = used
            reply = server.reply_to(sent_s - started_s, in_flight, rng)
            in_flight += 1
            played.sent += 1
            played.in_flight.append(in_flight)
            await asyncio.sleep(reply.takes_s)
            in_flight -= 1
            if reply.taken:
                gate.settle(slot, used)
                gate.observe(slot, Outcome(row, Verdict.OK))
                played.latencies_s.append(loop.time() - sent_s)
                played.answered_s.append(loop.time() - started_s)
                waiting.done()
            else:
                message = server.refusal() if isinstance(server, TokenLimited) else "refused"
                kind = {429: "rate_limit", 503: "overloaded"}.get(reply.http_status, "server_error")
                verdict = Verdict.FREE if kind == "server_error" else Verdict.SLOW
                error = RowError(kind, reply.http_status, None, message)
                gate.observe(slot, Outcome(row, verdict, error, reply.retry_after_s))
                played.refused += 1
                played.refused_for_cause += not reply.by_chance
                wait_s = RETRY_S if reply.retry_after_s is None else reply.retry_after_s
                waiting.again(row, loop.time() + wait_s + rng.random() * JITTER_S)
            gate.release(slot, 0)

    await asyncio.gather(*(work() for _ in range(max_in_flight)))
    played.took_s = max(played.answered_s)
    played.found = gate.found
    played.refusals = gate.refusals
    return played


def answered_by_retry(server: RefusingServer, rows: int, max_in_flight: int, seed: int) -> list[float]:
    """When the simplest client has each answer: it never slows down, and sends a refused row again after its own wait.

    It is the yardstick of half the scenarios, and five runs of it cost more than the run that is measured. So it is
    a list of events, without tasks.
    """
    rng = random.Random(seed)
    answered_s: list[float] = []
    waiting: list[float] = []  # until when
    in_flight: list[tuple[float, int, Reply]] = []  # until when; the request's number, as replies can't be compared
    now_s, sent, fresh = 0.0, 0, rows
    while len(answered_s) < rows:
        while len(in_flight) < max_in_flight and (fresh or (waiting and waiting[0] <= now_s)):
            if waiting and waiting[0] <= now_s:
                heapq.heappop(waiting)
            else:
                fresh -= 1
            reply = server.reply_to(now_s, 0, rng)
            sent += 1
            heapq.heappush(in_flight, (now_s + reply.takes_s, sent, reply))
        if waiting and len(in_flight) < max_in_flight and (not in_flight or waiting[0] < in_flight[0][0]):
            now_s = waiting[0]
            continue
        now_s, _, reply = heapq.heappop(in_flight)
        if reply.taken:
            answered_s.append(now_s)
        else:
            wait_s = RETRY_S if reply.retry_after_s is None else reply.retry_after_s
            heapq.heappush(waiting, now_s + wait_s + rng.random() * JITTER_S)
    return answered_s
