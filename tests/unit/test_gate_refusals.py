"""What many refusals are evidence of: the real gate before servers that limit, refuse by chance, crowd or queue.

The table is in tests/refusal_scenarios.py: how much of the ideal is reached at least, and how much is refused at most,
with any of its seeds.
"""

import math
import operator
import re

import pytest

from batchrun.limits.adaptive_rate import AdaptiveRate
from batchrun.limits.admission import Demand, Limit, Outcome
from batchrun.limits.rate_search import RateSearch
from batchrun.limits.rates import Rates
from batchrun.limits.refusal_runs import RefusalRuns
from batchrun.limits.request_spacing import RequestSpacing
from batchrun.records import RowError, Verdict
from tests import level
from tests.moved_clock import START_S, run_on_moved_clock
from tests.refusal_scenarios import HELD_OUT, SCENARIOS, Scenario, line, measure
from tests.refusing_servers import Crowded, Limited, Out, Queueing, RefusingServer, play
from tests.unit.test_gate import new_gate, now_s

NAME = operator.attrgetter("name")


@pytest.mark.sampled(16)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=NAME)
def test_each_server_gets_nearly_what_it_can_take(scenario: Scenario) -> None:
    """Chance costs only its retries, a limit is used and kept, too many at once are not sent.

    The seed of each scenario is drawn: all five that are held out were a third of the work of all tests, and two a
    tenth. Fewer rows would need other bounds.
    """
    seed = level.seeded(scenario.name).choice(range(10**6) if scenario.any_seed else HELD_OUT)
    reached = measure(scenario, [seed])
    assert reached.ideal[0] >= scenario.percent, line(scenario, reached)
    assert scenario.refused is None or reached.refused[-1] <= scenario.refused, line(scenario, reached)


@pytest.mark.parametrize(
    ("server", "allowed", "kind", "words"),
    [
        (Limited(latency_s=0.1, chance=0.05), 32, "chance", r"\d+\.\d% refused by chance"),
        (Limited(per_s=50.0, latency_s=0.1), 64, "limit", "a limit learned from refusals"),
        (Crowded(16), 64, "crowding", "more at once are refused"),
    ],
    ids=["chance", "limit", "crowding"],
)
def test_the_kind_of_refusals_is_named(server: RefusingServer, allowed: int, kind: str, words: str) -> None:
    """To run.log, with the reason, and in the line of progress."""
    played = run_on_moved_clock(play(server, 4_000, allowed, 1))
    assert [what for _, what in played.changes if what.startswith(f"{kind}: ")], played.changes
    assert re.fullmatch(words, played.refusals or ""), played.refusals


@pytest.mark.parametrize("seed", [19, 23, 43])
def test_much_chance_is_no_storm(seed: int) -> None:
    """By seeds that once had one in it, which cost up to a third of the rate."""
    (scenario,) = (each for each in SCENARIOS if each.name == "chance, 20 %, no Retry-After")
    assert measure(scenario, [seed]).ideal[0] >= 95


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


@pytest.mark.parametrize(
    ("length_s", "late_s", "failed"),
    [(5, 8.5, 36), (60, 50.5, 40), (600, 70, 49)],
    ids=["5 s", "a minute", "ten minutes"],
)
@pytest.mark.parametrize(("http_status", "climb_s"), [(500, 0.0), (503, 6.0)], ids=["500", "503"])
def test_the_rate_is_back_soon_after_an_outage(
    length_s: float, late_s: float, failed: int, http_status: int, climb_s: float
) -> None:
    """90 % of it, within a gap between two probes (1.5 × 4, 32 or 45 s) and 2.5 s for the climb. Half of what may be in
    flight fails before the outage is known, and 4, 8 or 17 probes do. A storm of 503 also lowers the rate, to half at
    least, and the rate needs six steps of a second to return.
    """
    server = Out(10.0, length_s, http_status=http_status)
    played = run_on_moved_clock(
        play(server, 1_500, 64, level.seeded("outage").randrange(10**6), requests_per_minute=3_000)
    )
    after_s = [at_s - server.ends_s for at_s in played.answered_s if at_s >= server.ends_s]
    back_s = next(at_s for at_s, two_later in zip(after_s, after_s[89:], strict=False) if two_later - at_s <= 2)
    assert back_s <= late_s + climb_s
    assert server.failed <= failed


@pytest.mark.parametrize("limit_per_s", [0.5, 1.0, 7.0, 50.0, 333.0])
def test_the_spacing_of_requests_is_found(limit_per_s: float) -> None:
    found, per_s, now_s, accepted_s = RequestSpacing(1), 0.25, 0.0, -math.inf
    sent = refused = in_a_try = 0
    while found.is_searching and sent < 60:
        taken = now_s - accepted_s >= 1 / limit_per_s - 1e-9
        found.count(now_s, refused=not taken)
        sent, refused, in_a_try = sent + 1, refused + (not taken), in_a_try + (not taken)
        accepted_s = now_s if taken else accepted_s
        if found.is_tried(per_s):
            found.prove()
            per_s, in_a_try = found.higher(per_s), 0
            found.restart(now_s)
        elif in_a_try >= 2 and (lower := found.lower(per_s)) is not None:
            per_s, in_a_try = lower, 0
            found.restart(now_s)
        now_s += 1 / per_s
    assert 0.9 * limit_per_s <= per_s <= 1.12 * limit_per_s
    assert found.accepted_per_s <= limit_per_s + 1e-6
    assert sent <= 40
    assert refused <= 16
    assert not found.is_contradicted


def test_late_refusals_contradict_the_spacing_found() -> None:
    found = RequestSpacing(1)
    for turn in range(6):
        found.count(turn / 5, refused=False)
    found.prove()
    for turn in range(3):
        assert not found.is_contradicted
        found.count(2.0 + turn, refused=True)
    assert found.is_contradicted


def test_a_better_source_ends_the_even_spacing() -> None:
    """Before it nothing is sent ahead of its time; afterwards a full bucket may be sent at once."""
    rate = AdaptiveRate(Limit.REQUESTS, None, 0.0, lambda *change: None)
    search = RateSearch(rate)
    for place in range(8):
        search.count(0.0, 1, refused=place > 2)
    search.storm(0.0, 0.1)
    assert rate.learned is not None
    assert rate.level(1_000.0) <= 1
    search.forget()
    rate.learn(3_000.0, 1_000.0, "stated")
    assert rate.level(2_000.0) > 1


def test_lasting_refusals_blame_the_rate() -> None:
    found = RefusalRuns()
    for at_s, measured in ((1.0, 50.0), (4.0, 25.0), (9.0, 14.0)):
        found.lowered(at_s, 50.0, measured)
    for at in range(300):
        found.count(9.0 + at / 10, refused=at % 3 > 0)
    assert not found.is_found
    assert not any(found.lowered(40.0 + at_s, 50.0, 50.0 / at_s) for at_s in (1, 2, 4, 8))


def test_fewer_in_flight_deliver_a_queue_sooner() -> None:
    for seed in range(2):
        played = run_on_moved_clock(play(Queueing(16), 3_000, 64, seed))
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
            gate.release(slot, 0)
        slot = await gate.admit(Demand(tokens=1))
        learned = gate.in_force.requests_per_minute
        assert learned is not None
        assert learned < 6_000
        gate.tune(Rates(requests_per_minute=9_000))
        assert gate.in_force.requests_per_minute == 9_000
        before_s = now_s()
        gate.release(slot, 0)
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
            gate.release(slot, 0)
        assert now_s() - START_S <= 60 * 9_000 / 10_000 * 1.08

    run_on_moved_clock(main())
