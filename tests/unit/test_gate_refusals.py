"""What many refusals are evidence of: the real gate before servers that limit, refuse by chance, crowd or queue.

Each line says how much of the ideal is reached at least, and how much is refused at most, by the worst of five seeds.
The ideal of a limit is rows / rate - the burst + a latency; that of chance is a client which never slows down and sends
a refused row again after its own wait.
"""

import functools
import math
from collections.abc import Callable
from decimal import Decimal

import pytest

from batchrun.limits.adaptive_rate import AdaptiveRate
from batchrun.limits.admission import Demand, Limit, Outcome
from batchrun.limits.rate_search import RateSearch
from batchrun.limits.rates import Rates
from batchrun.limits.refusal_runs import RefusalRuns
from batchrun.records import RowError, Verdict
from tests import level
from tests.moved_clock import START_S, run_on_moved_clock
from tests.refusing_servers import (
    BlackedOut,
    Crowded,
    InRuns,
    Limited,
    Played,
    Queueing,
    RefusingServer,
    Windowed,
    play,
    play_retry,
)
from tests.unit.test_gate import new_gate, now_s

pytestmark = pytest.mark.campaign

SEEDS = level.amount(sample=1, full=5)


def chance(share: float, **more: object) -> Callable[[], RefusingServer]:
    return functools.partial(Limited, **{"latency_s": 0.1, "chance": share, **more})  # type: ignore[arg-type]


def runs(server: Callable[[], RefusingServer], rows: int, allowed: int, **limits: object) -> list[Played]:
    return [run_on_moved_clock(play(server(), rows, allowed, seed, **limits)) for seed in range(SEEDS)]


def ideal_s(server: Callable[[], RefusingServer], rows: int, allowed: int) -> float:
    """By the client that only retries, the median of five seeds: the last row's wait is a matter of luck."""
    times = sorted(run_on_moved_clock(play_retry(server(), rows, allowed, seed)).took_s for seed in range(5))
    return times[2]


LIMITED_S = 58.4
"""3,000 rows at 50 a second, less two seconds' burst, and one latency."""


@pytest.mark.parametrize(
    ("server", "rows", "allowed", "ideal_s", "percent", "refused_percent"),
    [
        pytest.param(lambda: Limited(50), 3_000, 256, LIMITED_S, 98, 1.5, id="256 allowed"),
        pytest.param(lambda: Limited(50), 3_000, 64, LIMITED_S, 98, 1.3, id="64 allowed"),
        pytest.param(lambda: Limited(50), 3_000, 24, LIMITED_S, 97, 1.4, id="24 allowed"),
        pytest.param(lambda: Limited(50, retry_after_s=None), 3_000, 256, LIMITED_S, 98, 1.5, id="no Retry-After"),
        pytest.param(lambda: Limited(50, refusal_s=0.4), 3_000, 64, LIMITED_S, 98, 3.5, id="slow refusals"),
        pytest.param(lambda: Limited(5, latency_s=8.0), 900, 64, 186.0, 94, 3, id="answers of eight seconds"),
        pytest.param(lambda: Limited(1), 200, 64, 198.0, 96, 9, id="one a second"),
        pytest.param(lambda: Limited(1), 1_800, 64, 1_798.0, 95, 2.8, id="one a second, for half an hour"),
        pytest.param(lambda: Limited(5, latency_s=8.0), 5_000, 64, 1_006.0, 98, 1.9, id="for a quarter of an hour"),
        pytest.param(
            lambda: Limited(50, changes=((40, "per_s", 25), (95, "per_s", 50))), 6_000, 256, 145.4, 96, 1.4, id="moved"
        ),
        pytest.param(lambda: Limited(50, chance=0.01), 3_000, 256, LIMITED_S, 97, 2.8, id="and chance of 1 %"),
        pytest.param(lambda: Limited(50, chance=0.05), 3_000, 256, LIMITED_S, 96, 10, id="and chance of 5 %"),
        pytest.param(lambda: Limited(changes=((5, "per_s", 50),)), 5_000, 64, 89.0, 97, 0.9, id="from five seconds on"),
    ],
)
def test_a_limit_learned_from_refusals_is_kept(
    server: Callable[[], RefusingServer],
    rows: int,
    allowed: int,
    ideal_s: float,
    percent: float,
    refused_percent: float,
) -> None:
    played = runs(server, rows, allowed)
    assert min(100 * ideal_s / run.took_s for run in played) >= percent
    assert max(100 * run.share_refused for run in played) <= refused_percent


@pytest.mark.parametrize(
    ("server", "rows", "allowed", "percent"),
    [
        pytest.param(chance(0.005), 6_000, 32, 94, id="0.5 %"),
        pytest.param(chance(0.01), 6_000, 32, 97, id="1 %"),
        pytest.param(chance(0.05), 6_000, 32, 93, id="5 %"),
        pytest.param(chance(0.20), 6_000, 32, 94, id="20 %"),
        pytest.param(chance(0.40), 3_000, 32, 50, id="40 %"),
        pytest.param(chance(0.05, retry_after_s=None), 6_000, 32, 96, id="5 %, no Retry-After"),
        pytest.param(chance(0.05, refusal_s=0.1), 6_000, 32, 96, id="5 %, slow refusals"),
        pytest.param(chance(0.05, latency_s=8.0), 1_500, 64, 94, id="5 %, answers of eight seconds"),
        pytest.param(
            chance(0.0, changes=((5, "chance", 0.05), (15, "chance", 0.0))), 8_000, 32, 98, id="5 % for ten seconds"
        ),
        pytest.param(
            chance(0.0, changes=((5, "chance", 0.2), (15, "chance", 0.0))), 8_000, 32, 97, id="20 % for ten seconds"
        ),
    ],
)
def test_random_refusals_cost_only_their_retries(
    server: Callable[[], RefusingServer], rows: int, allowed: int, percent: float
) -> None:
    ideal = ideal_s(server, rows, allowed)
    assert min(100 * ideal / run.took_s for run in runs(server, rows, allowed)) >= percent


@pytest.mark.parametrize(
    ("server", "percent"),
    [
        pytest.param(lambda: InRuns(5, 50), 95, id="5 of 50"),
        pytest.param(lambda: InRuns(7, 50), 70, id="7 of 50"),
        pytest.param(lambda: InRuns(9, 50), 75, id="9 of 50"),
        pytest.param(lambda: InRuns(12, 50), 50, id="12 of 50"),
        pytest.param(lambda: InRuns(7, 100), 70, id="7 of 100"),
        pytest.param(lambda: InRuns(9, 200), 70, id="9 of 200"),
        pytest.param(lambda: InRuns(12, 200), 70, id="12 of 200"),
        pytest.param(lambda: InRuns(9, 50, retry_after_s=1.0), 95, id="9 of 50, with Retry-After"),
        pytest.param(lambda: InRuns(12, 50, retry_after_s=1.0), 75, id="12 of 50, with Retry-After"),
        pytest.param(lambda: InRuns(12, 100, retry_after_s=1.0), 70, id="12 of 100, with Retry-After"),
        pytest.param(lambda: BlackedOut(3, 10), 75, id="3 s of each 10"),
        pytest.param(lambda: BlackedOut(3, 10, retry_after_s=1.0), 75, id="3 s of each 10, with Retry-After"),
        pytest.param(lambda: BlackedOut(1, 10), 80, id="1 s of each 10"),
    ],
)
def test_refusals_in_runs_lower_the_rate_briefly(server: Callable[[], RefusingServer], percent: float) -> None:
    ideal = ideal_s(server, 10_000, 32)
    assert min(100 * ideal / run.took_s for run in runs(server, 10_000, 32)) >= percent


DARK_S = 3_000 / 50 / 0.7 - 2
"""3,000 rows at 50 a second in seven of each ten seconds, less two seconds' burst."""


@pytest.mark.parametrize(
    ("server", "rows", "ideal_s", "percent"),
    [
        pytest.param(lambda: InRuns(9, 50, 50.0, 0.4), 3_000, LIMITED_S, 65, id="9 of 50"),
        pytest.param(lambda: InRuns(7, 100, 50.0, 0.4), 3_000, LIMITED_S, 75, id="7 of 100"),
        pytest.param(lambda: InRuns(12, 200, 50.0, 0.4, 1.0), 3_000, LIMITED_S, 60, id="12 of 200, with Retry-After"),
        pytest.param(lambda: BlackedOut(3, 10, 50.0, 0.4), 3_000, DARK_S, 75, id="3 s of each 10"),
        pytest.param(lambda: BlackedOut(3, 10, 50.0, 0.4, 1.0), 3_000, DARK_S, 75, id="3 s of each 10, Retry-After"),
        pytest.param(lambda: Windowed(500, 10.0), 3_000, 50.0, 80, id="500 in ten seconds, then none"),
    ],
)
def test_a_limit_beside_runs_of_refusals_is_used(
    server: Callable[[], RefusingServer], rows: int, ideal_s: float, percent: float
) -> None:
    assert min(100 * ideal_s / run.took_s for run in runs(server, rows, 64)) >= percent


def test_a_limit_falls_once_chance_keeps_falling() -> None:
    fell, falls = RefusalRuns(), RefusalRuns()
    assert [fell.lowered(at_s, 50.0, measured) for at_s, measured in ((1, 50.0), (4, 25.0), (9, 24.8), (15, 25.1))] == [
        False
    ] * 4
    assert [falls.lowered(at_s, 50.0, measured) for at_s, measured in ((1, 50.0), (4, 25.0), (9, 14.0))] == [
        False,
        False,
        True,
    ]
    assert falls.before == 50.0


def test_lasting_refusals_blame_the_rate() -> None:
    found = RefusalRuns()
    for at_s, measured in ((1.0, 50.0), (4.0, 25.0), (9.0, 14.0)):
        found.lowered(at_s, 50.0, measured)
    for at in range(300):
        found.count(9.0 + at / 10, refused=at % 3 > 0)
    assert not found.is_found
    assert not any(found.lowered(40.0 + at_s, 50.0, 50.0 / at_s) for at_s in (1, 2, 4, 8))


@pytest.mark.parametrize(
    ("server", "rows", "allowed", "ideal_s", "percent"),
    [
        pytest.param(lambda: Crowded(16), 3_000, 64, 38.6, 90, id="16 of 64"),
        pytest.param(lambda: Crowded(16, network_s=0.01), 3_000, 64, 41.5, 97, id="16 of 64 across a network"),
        pytest.param(lambda: Crowded(4, network_s=0.01), 1_000, 64, 55.0, 97, id="4 of 64"),
        pytest.param(lambda: Crowded(100, latency_s=1.0), 6_000, 256, 62.0, 92, id="100 of 256"),
        pytest.param(lambda: Crowded(16, network_s=0.01, chance=0.01), 3_000, 64, 41.5, 86, id="and chance of 1 %"),
    ],
)
def test_crowding_lowers_concurrency_and_not_rate(
    server: Callable[[], RefusingServer], rows: int, allowed: int, ideal_s: float, percent: float
) -> None:
    played = runs(server, rows, allowed)
    assert min(100 * ideal_s / run.took_s for run in played) >= percent
    assert max(100 * run.share_refused for run in played) <= 2


def test_fewer_in_flight_deliver_a_queue_sooner() -> None:
    for played in runs(lambda: Queueing(16), 3_000, 64):
        assert 37.5 / played.took_s >= 0.97
        assert played.median_latency_s <= 2.5 * 0.2
        settled = sorted(played.in_flight[len(played.in_flight) // 2 :])
        assert settled[-1] <= 2.5 * 16


def test_longer_answers_cost_one_trial_only() -> None:
    longer = Limited(latency_s=0.2, changes=((5, "latency_s", 0.8),))
    played = run_on_moved_clock(play(longer, 9_000, 64, 1))
    assert played.took_s <= 1.1 * (5 + (9_000 - 5 * 320) / 77.5)


def test_limits_are_remembered_and_chance_is_not() -> None:
    async def found(server: RefusingServer, rows: int) -> float | None:
        return (await play(server, rows, 32, 1)).found.requests_per_minute

    assert run_on_moved_clock(found(Limited(latency_s=0.1, chance=0.05), 4_000)) is None
    limit = run_on_moved_clock(found(Limited(50), 3_000))
    assert limit == pytest.approx(3_000, rel=0.1)


def test_a_stated_limit_replaces_the_learned_one() -> None:
    async def main() -> None:
        gate = new_gate(max_in_flight=32, requests_per_minute=6_000)
        refused = RowError("rate_limit", 429, None, "HTTP 429")
        for row in range(12):
            slot = await gate.admit(Demand(tokens=1))
            verdict = Verdict.OK if row < 4 else Verdict.SLOW
            gate.observe(slot, Outcome(row, verdict, None if row < 4 else refused, 1.0))
            gate.release(slot, Decimal(0))
        slot = await gate.admit(Demand(tokens=1))
        learned = gate.in_force.requests_per_minute
        assert learned is not None
        assert learned < 6_000
        gate.tune(Rates(requests_per_minute=9_000))
        assert gate.in_force.requests_per_minute == 9_000
        before_s = now_s()
        gate.release(slot, Decimal(0))
        await gate.admit(Demand(tokens=1))
        assert now_s() - before_s < 0.5

    run_on_moved_clock(main())


def test_rates_of_emptied_buckets_are_exact() -> None:
    """Whatever pauses lie between two moments at which the bucket is empty."""
    pace = AdaptiveRate(Limit.REQUESTS, None, 0.0, lambda *change: None)
    search = RateSearch(pace)
    for at in range(200):
        search.count(at / 100, 1, refused=False)
    search.storm(2.0, 2.0)
    for at in range(100):
        search.count(4 + at / 50, 1, refused=False)
    search.storm(7.0, 7.0)
    assert pace.learned is not None
    assert pace.learned == pytest.approx(0.98 * 60 * 100 / 5)
    assert math.isfinite(pace.level(8.0))


def test_a_lone_refusal_lowers_no_rate() -> None:
    async def main() -> None:
        gate = new_gate(max_in_flight=32, requests_per_minute=3_000, tokens_per_minute=600_000)
        refused = RowError("rate_limit", 429, None, "Rate limit reached for tokens per minute")
        for row in range(60):
            slot = await gate.admit(Demand(tokens=9_000))
            if row == 30:
                said = {"x-ratelimit-limit-tokens": "600000", "x-ratelimit-remaining-tokens": "10", "retry-after": "1"}
                gate.read_headers(slot, {**said, "x-ratelimit-reset-tokens": "900ms"})
                gate.observe(slot, Outcome(row, Verdict.SLOW, refused, 1.0))
            else:
                gate.settle(slot, 9_000)
                gate.observe(slot, Outcome(row, Verdict.OK))
            gate.release(slot, Decimal(0))
        assert now_s() - START_S <= 60 * 9_000 / 10_000 * 1.08

    run_on_moved_clock(main())
