"""The table of servers that refuse, queue or crowd, each with its ideal and with what the gate has to reach before it.

    python -m tests.refusal_scenarios                           # the whole table over five seeds: worst and median
    python -m tests.refusal_scenarios --seeds 20 --first 200    # over seeds 200 to 219
    python -m tests.refusal_scenarios --only "chance|one a"     # scenarios whose name matches
    python -m tests.refusal_scenarios --only "limit, 64" --log  # and what the gate changed when, with the first seed

`ideal` is the time of the best client over the time taken, in per cent. `refused` is the share of all that was sent
which was refused because of the limit or the crowd; what a server refuses by chance is not the client's to avoid.
"""

import argparse
import functools
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

from tests.moved_clock import run_on_moved_clock
from tests.refusing_servers import (
    BlackedOut,
    Crowded,
    InRuns,
    Limited,
    Played,
    Queueing,
    RefusingServer,
    TokenLimited,
    Windowed,
    answered_by_retry,
    play,
)

TUNED_ON = range(100, 120)
"""The seeds by which thresholds of batchrun/limits/ were chosen. Tests use others."""

HELD_OUT = range(7_000, 7_005)
"""The seeds of the tests: no threshold was chosen by them."""


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """`ideal_s` None: the time of a client that only retries. `percent` of it, and at most `refused` per cent."""

    name: str
    server: Callable[[], RefusingServer]
    rows: int
    allowed: int
    ideal_s: float | None = None
    percent: float
    refused: float | None = None
    configured: int | None = None
    """Requests per minute in the job."""
    tokens: int | None = None
    """Tokens per minute in the job."""
    any_seed: bool = False
    """The bound holds with room to spare over twenty seeds, so the tests draw theirs."""

    def play(self, seed: int) -> Played:
        limits = {"requests_per_minute": self.configured, "tokens_per_minute": self.tokens}
        return run_on_moved_clock(play(self.server(), self.rows, self.allowed, seed, **limits))

    def took_s(self, answered_s: Sequence[float]) -> float:
        """Until the last answer; beside the client that only retries, until 99 rows in a hundred are answered.

        How often the last refused rows are refused again is luck, and worth up to 7 % in either direction.
        """
        return sorted(answered_s)[-1 if self.ideal_s is not None else -1 - self.rows // 100]

    def ideal(self) -> float:
        """Seconds. By the client that only retries, it is the median of five runs."""
        if self.ideal_s is not None:
            return self.ideal_s
        runs = [answered_by_retry(self.server(), self.rows, self.allowed, seed) for seed in range(5)]
        return sorted(map(self.took_s, runs))[2]


LIMITED_S = 58.4
"""3,000 rows at 50 a second, less two seconds' burst, and one latency."""

DARK_S = 3_000 / 50 / 0.7 - 2
"""3,000 rows at 50 a second in seven of each ten seconds, less two seconds' burst."""


def limit(
    name: str,
    server: Callable[[], RefusingServer],
    rows: int,
    allowed: int,
    ideal_s: float,
    percent: float,
    refused: float,
    configured: int | None = None,
    any_seed: bool = False,
    *,
    kind: str = "limit",
) -> Scenario:
    return Scenario(
        name=f"{kind}, {name}",
        server=server,
        rows=rows,
        allowed=allowed,
        ideal_s=ideal_s,
        percent=percent,
        refused=refused,
        configured=configured,
        any_seed=any_seed,
    )


def spaced(
    name: str, rows: int, per_s: float, percent: float, refused: float, *, latency_s: float = 0.4, **more: Any
) -> Scenario:
    """A bucket of one request, as nginx's `limit_req` without `burst`, and no Retry-After unless it is given."""
    server = functools.partial(Limited, per_s, latency_s=latency_s, burst_s=0.0, **{"retry_after_s": None, **more})
    allowed, ideal_s = 64 if per_s < 100 else 256, (rows - 1) / per_s + latency_s
    return limit(f"evenly spaced, {name}", server, rows, allowed, ideal_s, percent, refused)


def small_bucket(
    holds: int, per_s: float, percent: float, refused: float, *, latency_s: float = 0.4, **more: Any
) -> Scenario:
    """Two minutes of a bucket of a few requests, as nginx's `limit_req` with a `burst`; no Retry-After unless given."""
    kept: dict[str, Any] = {"retry_after_s": None, **more}
    server = functools.partial(Limited, per_s, latency_s=latency_s, burst_s=holds / per_s, **kept)
    says = "" if kept["retry_after_s"] is None else ", Retry-After"
    says += ", equal answers" if not more.get("latency_sigma", 1) else ""
    name = f"bucket of {holds}, {per_s:g} a second{says}{f', {status}' if (status := more.get('http_status')) else ''}"
    rows = int(120 * per_s)
    return limit(name, server, rows, 64, (rows - holds) / per_s + latency_s, percent, refused)


def window(name: str, quota: int, window_s: float, rows: int, percent: float, refused: float, **more: Any) -> Scenario:
    server = functools.partial(Windowed, quota, window_s, **more)
    allowed, ideal_s = 64 if quota < 100 else 256, (rows / quota - 1) * window_s + 0.2
    return limit(f"window, {name}", server, rows, allowed, ideal_s, percent, refused)


def chance(
    name: str, share: float, percent: float, *, rows: int = 6_000, allowed: int = 32, **more: object
) -> Scenario:
    server = functools.partial(Limited, **{"latency_s": 0.1, "chance": share, **more})  # type: ignore[arg-type]
    return Scenario(name=f"chance, {name}", server=server, rows=rows, allowed=allowed, percent=percent)


def in_runs(name: str, server: Callable[[], RefusingServer], percent: float) -> Scenario:
    return Scenario(name=f"runs, {name}", server=server, rows=10_000, allowed=32, percent=percent)


def limited_in_runs(
    name: str, server: Callable[[], RefusingServer], percent: float, *, ideal_s: float = LIMITED_S
) -> Scenario:
    return Scenario(
        name=f"limit and runs, {name}", server=server, rows=3_000, allowed=64, ideal_s=ideal_s, percent=percent
    )


def tokens(
    name: str, server: Callable[[], RefusingServer], percent: float, refused: float, tokens: int | None = 30_000
) -> Scenario:
    """1,800 requests of 100 tokens at 500 a second, less two seconds' burst, and one latency."""
    return Scenario(
        name=f"tokens, {name}",
        server=server,
        rows=1_800,
        allowed=64,
        ideal_s=358.4,
        percent=percent,
        refused=refused,
        tokens=tokens,
    )


def crowd(
    name: str,
    server: Callable[[], RefusingServer],
    percent: float,
    *,
    rows: int = 3_000,
    allowed: int = 64,
    ideal_s: float,
) -> Scenario:
    return limit(name, server, rows, allowed, ideal_s, percent, 2, kind="crowd")


LIMITS = [
    limit("256 allowed", lambda: Limited(50), 3_000, 256, LIMITED_S, 98, 1.5),
    limit("64 allowed", lambda: Limited(50), 3_000, 64, LIMITED_S, 98, 1.3, any_seed=True),
    limit("24 allowed", lambda: Limited(50), 3_000, 24, LIMITED_S, 97, 1.4),
    limit("no Retry-After", lambda: Limited(50, retry_after_s=None), 3_000, 256, LIMITED_S, 98, 1.5),
    limit("slow refusals", lambda: Limited(50, refusal_s=0.4), 3_000, 64, LIMITED_S, 98, 3.5),
    limit("answers of 8 s", lambda: Limited(5, latency_s=8.0), 900, 64, 186.0, 94, 3),
    limit("one a second", lambda: Limited(1), 200, 64, 198.0, 96, 9),
    limit("one a second, half an hour", lambda: Limited(1), 1_800, 64, 1_798.0, 95, 2.8),
    limit("answers of 8 s, a quarter of an hour", lambda: Limited(5, latency_s=8.0), 5_000, 64, 1_006.0, 98, 1.9),
    limit("600 in a minute, says when it ends", lambda: Windowed(600, 60.0, says_end=True), 3_000, 64, 240.2, 95, 3),
    limit("moved", lambda: Limited(50, changes=((40, "per_s", 25), (95, "per_s", 50))), 6_000, 256, 145.4, 95, 2),
    limit("and chance of 1 %", lambda: Limited(50, chance=0.01), 3_000, 256, LIMITED_S, 97, 2),
    limit(
        "and chance of 1 %, 64 allowed", lambda: Limited(50, chance=0.01), 3_000, 64, LIMITED_S, 95, 5, any_seed=True
    ),
    limit("and chance of 5 %", lambda: Limited(50, chance=0.05), 3_000, 256, LIMITED_S, 96, 2),
    limit(
        "configured, and chance of 1 %",
        lambda: Limited(50, chance=0.01),
        3_000,
        64,
        LIMITED_S,
        95,
        0.5,
        3_000,
        any_seed=True,
    ),
    limit(
        "from five seconds on", lambda: Limited(changes=((5, "per_s", 50),)), 5_000, 64, 89.0, 97, 0.9, any_seed=True
    ),
]
CHANCE = [
    chance("0.5 %", 0.005, 97),
    chance("1 %", 0.01, 98),
    chance("5 %", 0.05, 97),
    chance("20 %", 0.20, 96),
    chance("40 %", 0.40, 25, rows=3_000),
    chance("0.5 %, no Retry-After", 0.005, 97, retry_after_s=None),
    chance("1 %, no Retry-After", 0.01, 97, retry_after_s=None),
    chance("5 %, no Retry-After", 0.05, 97, retry_after_s=None),
    chance("20 %, no Retry-After", 0.20, 96, retry_after_s=None),
    chance("5 %, no Retry-After, few rows", 0.05, 95, rows=3_000, retry_after_s=None),
    chance("5 %, slow refusals", 0.05, 97, refusal_s=0.1),
    chance("5 %, answers of 8 s", 0.05, 94, rows=1_500, allowed=64, latency_s=8.0),
    chance("5 % for ten seconds", 0.0, 98, rows=8_000, changes=((5, "chance", 0.05), (15, "chance", 0.0))),
    chance("20 % for ten seconds", 0.0, 98, rows=8_000, changes=((5, "chance", 0.2), (15, "chance", 0.0))),
]
RUNS = [
    in_runs("5 of 50", lambda: InRuns(5, 50), 98),
    in_runs("7 of 50", lambda: InRuns(7, 50), 70),
    in_runs("9 of 50", lambda: InRuns(9, 50), 75),
    in_runs("12 of 50", lambda: InRuns(12, 50), 80),
    in_runs("7 of 100", lambda: InRuns(7, 100), 70),
    in_runs("9 of 200", lambda: InRuns(9, 200), 70),
    in_runs("12 of 200", lambda: InRuns(12, 200), 70),
    in_runs("9 of 50, Retry-After", lambda: InRuns(9, 50, retry_after_s=1.0), 98),
    in_runs("12 of 50, Retry-After", lambda: InRuns(12, 50, retry_after_s=1.0), 75),
    in_runs("12 of 100, Retry-After", lambda: InRuns(12, 100, retry_after_s=1.0), 70),
    in_runs("3 s of each 10", lambda: BlackedOut(3, 10), 75),
    in_runs("3 s of each 10, Retry-After", lambda: BlackedOut(3, 10, retry_after_s=1.0), 75),
    in_runs("1 s of each 10", lambda: BlackedOut(1, 10), 80),
]
LIMITED_RUNS = [
    limited_in_runs("9 of 50", lambda: InRuns(9, 50, 50.0, 0.4), 80),
    limited_in_runs("7 of 100", lambda: InRuns(7, 100, 50.0, 0.4), 85),
    limited_in_runs("12 of 200, Retry-After", lambda: InRuns(12, 200, 50.0, 0.4, 1.0), 85),
    limited_in_runs("3 s of each 10", lambda: BlackedOut(3, 10, 50.0, 0.4), 75, ideal_s=DARK_S),
    limited_in_runs("3 s of each 10, Retry-After", lambda: BlackedOut(3, 10, 50.0, 0.4, 1.0), 75, ideal_s=DARK_S),
    limited_in_runs("500 in ten seconds, then none", lambda: Windowed(500, 10.0), 80, ideal_s=50.0),
]
TOKENS = [
    tokens("configured", lambda: TokenLimited(500), 99, 0),
    tokens("of 50 to 150", lambda: TokenLimited(500, spread=0.5), 98, 0.5),
    tokens("estimated at half", lambda: TokenLimited(500, estimated=0.5), 98, 1),
    tokens("estimated at twice", lambda: TokenLimited(500, estimated=2), 98, 0),
    tokens("estimated at half, answers of 4 s", lambda: TokenLimited(500, estimated=0.5, latency_s=4.0), 88, 7),
    tokens("estimated at twice, answers of 4 s", lambda: TokenLimited(500, estimated=2, latency_s=4.0), 95, 0),
    tokens("and chance of 5 %", lambda: TokenLimited(500, chance=0.05), 98, 0.5),
    tokens("not configured", lambda: TokenLimited(500), 98, 2.5, None),
]
CROWDS = [
    crowd("16 of 64", lambda: Crowded(16), 95, ideal_s=38.6),
    crowd("16 of 64, across a network", lambda: Crowded(16, network_s=0.01), 97, ideal_s=41.5),
    crowd("4 of 64", lambda: Crowded(4, network_s=0.01), 97, rows=1_000, ideal_s=55.0),
    crowd("100 of 256", lambda: Crowded(100, latency_s=1.0), 92, rows=6_000, allowed=256, ideal_s=62.0),
    crowd("and chance of 1 %", lambda: Crowded(16, network_s=0.01, chance=0.01), 85, ideal_s=41.5),
]
QUEUES = [
    Scenario(name="queue, 16 at a time", server=lambda: Queueing(16), rows=3_000, allowed=64, ideal_s=37.5, percent=97)
]
SPACED = [
    spaced("1 a second", 900, 1, 95, 6),
    spaced("2 a second, Retry-After", 900, 2, 95, 4.5, retry_after_s=1.0),
    spaced("10 a second, 503", 2_400, 10, 95, 2.5, http_status=503),
    spaced("10 a second, answers of 5 s", 2_400, 10, 90, 2.5, latency_s=5.0),
    spaced("30 a second, across a network", 3_600, 30, 85, 3, network_s=0.003),
    spaced("50 a second", 6_000, 50, 94, 1.5),
    spaced("50 a second, Retry-After", 6_000, 50, 94, 1.5, retry_after_s=1.0),
    spaced("200 a second, 503", 12_000, 200, 86, 1, http_status=503),
]
SMALL_BUCKETS = [
    small_bucket(2, 10, 70, 3),
    small_bucket(2, 50, 90, 1.5),
    small_bucket(3, 50, 80, 1.5, http_status=503),
    small_bucket(3, 10, 90, 3, latency_s=2.0),
    small_bucket(4, 50, 88, 2.2, retry_after_s=1.0),
    small_bucket(5, 10, 85, 9),
    small_bucket(10, 50, 90, 2),
    small_bucket(5, 50, 90, 1.5, latency_sigma=0.0, network_s=0.002, http_status=503),
    small_bucket(5, 10, 90, 7, latency_s=2.0, latency_sigma=0.0),
]
WINDOWS = [
    window("50 in a second", 50, 1.0, 3_000, 80, 3),
    window("10 in a second", 10, 1.0, 1_800, 87, 4),
    window("200 in a second, Retry-After", 200, 1.0, 12_000, 65, 1.5, retry_after_s=1.0),
    window("50 in a second, says when it ends", 50, 1.0, 3_000, 87, 2, says_end=True),
    window("100 in 2 s", 100, 2.0, 3_000, 75, 3),
]
SCENARIOS = LIMITS + SPACED + SMALL_BUCKETS + WINDOWS + CHANCE + RUNS + LIMITED_RUNS + TOKENS + CROWDS + QUEUES


@dataclass(frozen=True)
class Reached:
    """What a scenario reached over some seeds, in per cent, sorted."""

    ideal: list[float]
    refused: list[float]


def measure(scenario: Scenario, seeds: Iterable[int]) -> Reached:
    """Plays the scenario once a seed."""
    ideal_s = scenario.ideal()
    played = [scenario.play(seed) for seed in seeds]
    return Reached(
        sorted(100 * ideal_s / scenario.took_s(run.answered_s) for run in played),
        sorted(100 * run.refused_for_cause / run.sent for run in played),
    )


def line(scenario: Scenario, reached: Reached) -> str:
    """The scenario's line of the table."""
    worst, most = reached.ideal[0], reached.refused[-1]
    missed = worst < scenario.percent or (scenario.refused is not None and most > scenario.refused)
    bound = f"≥ {scenario.percent:g}" + ("" if scenario.refused is None else f", ≤ {scenario.refused:g}")
    half = len(reached.ideal) // 2
    figures = f"{worst:6.1f} {reached.ideal[half]:6.1f} {most:7.2f} {reached.refused[half]:6.2f}"
    return f"{scenario.name:44} {figures}   {bound}{'  MISSED' if missed else ''}"


def _measure(place: int, seeds: Iterable[int]) -> Reached:
    return measure(SCENARIOS[place], seeds)


def log(scenario: Scenario, seed: int) -> str:
    """What the gate changed, a line each with its second, and what came of it."""
    played = scenario.play(seed)
    lines = [f"{at_s:7.1f}  {what}" for at_s, what in played.changes]
    ended = f"{played.took_s:7.1f}  {scenario.rows:,} rows, {played.refused:,} of {played.sent:,} requests refused"
    return "\n".join([*lines, ended])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=TUNED_ON.start, help="the first seed")
    parser.add_argument("--only", default="", help="a regular expression for the names of scenarios")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--log", action="store_true", help="print what the gate did with the first seed")
    options = parser.parse_args()
    chosen = [place for place, scenario in enumerate(SCENARIOS) if re.search(options.only, scenario.name)]
    seeds = range(options.first, options.first + options.seeds)
    title = f"per cent, seeds {seeds[0]} to {seeds[-1]}"
    print(f"{title:44} {'ideal':>6} {'median':>6} {'refused':>7} {'median':>6}")
    with ProcessPoolExecutor(options.jobs) as pool:
        for place, reached in zip(chosen, pool.map(_measure, chosen, [seeds] * len(chosen)), strict=True):
            print(line(SCENARIOS[place], reached), flush=True)
            if options.log:
                print(log(SCENARIOS[place], seeds[0]))


if __name__ == "__main__":
    main()
