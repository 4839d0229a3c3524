"""The whole limit is used without a storm of refusals: the gate and the simulator's buckets, on a moved clock."""

import asyncio
import random

import pytest

from batchrun.limits.admission import Found
from batchrun.limits.token_estimates import Estimates, Sizes
from batchrun.records import Request, Usage
from tests.limited_server import Run, Server, during, ideal_s, new_gate, send_all
from tests.moved_clock import run_on_moved_clock

RPM, TPM = 3_000, 600_000
SIZES = [150] * 3_000


def share_of_ideal(run: Run, sizes: list[int], rpm: int | None, tpm: int | None) -> float:
    return ideal_s(len(sizes), sum(sizes), rpm, tpm) / run.took_s


def test_known_limits_are_used_without_429() -> None:
    """To the last half per cent."""

    async def main() -> None:
        run = Run(Server(RPM, TPM))
        gate = new_gate(run, requests_per_minute=RPM, tokens_per_minute=TPM, first_in_flight=50)
        await send_all(run, gate, SIZES)
        assert share_of_ideal(run, SIZES, RPM, TPM) >= 0.995
        assert run.server.refused() == 0
        assert run.sent == list(range(3_000))

    run_on_moved_clock(main())


def test_unknown_limits_are_taken_from_the_headers() -> None:
    async def main() -> None:
        run = Run(Server(RPM, TPM))
        await send_all(run, new_gate(run), SIZES)
        assert share_of_ideal(run, SIZES, RPM, TPM) >= 0.985
        assert run.server.refused() <= 0.001

    run_on_moved_clock(main())


@pytest.mark.parametrize("rpm", [60, 600, 3_000])
def test_an_unknown_rate_is_learned_from_refusals(rpm: int) -> None:
    async def main() -> None:
        run = Run(Server(rpm, None, headers=False))
        await send_all(run, new_gate(run), sizes := [150] * rpm)
        assert share_of_ideal(run, sizes, rpm, None) >= (0.92 if rpm > 60 else 0.85)
        assert run.server.refused() <= (0.02 if rpm > 600 else 0.035 if rpm > 60 else 0.25)

    run_on_moved_clock(main())


@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
def test_token_limits_waste_nothing_on_large_prompts(known: bool) -> None:
    """The largest prompts are sent in their turn."""
    rng = random.Random(5)
    sizes = [int(50 * 400 ** rng.random()) for _ in range(300)]

    async def main() -> None:
        run = Run(Server(None, TPM))
        gate = new_gate(run, tokens_per_minute=TPM if known else None)
        await send_all(run, gate, sizes, estimate=lambda row: sizes[row])
        assert share_of_ideal(run, sizes, None, TPM) >= 0.985
        assert run.server.refused() <= (0 if known else 0.01)
        if known:
            assert run.sent == list(range(len(sizes)))

    run_on_moved_clock(main())


@pytest.mark.sampled(2)
@pytest.mark.parametrize("headers", [True, False])
@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
def test_a_changed_limit_is_followed_in_seconds(known: bool, headers: bool) -> None:
    """Halved and restored, within half a minute."""
    rpm = 1_200

    async def main() -> None:
        run = Run(Server(rpm, None, headers=headers))
        during(40, lambda: run.server.limit(rpm // 2, None))
        during(100, lambda: run.server.limit(rpm, None))
        await send_all(run, new_gate(run, requests_per_minute=rpm if known else None), [150] * 2_800)
        halved, restored = (len(run.server.accepted(at, at + 30)) * 2 for at in (70, 130))
        assert halved == pytest.approx(rpm / 2, rel=0.1)
        assert restored == pytest.approx(rpm, rel=0.1)
        assert run.server.refused() <= 0.02

    run_on_moved_clock(main())


@pytest.mark.sampled(2)
@pytest.mark.parametrize("headers", [True, False])
@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
def test_a_second_client_gets_its_half(known: bool, headers: bool) -> None:
    async def main() -> None:
        run = Run(Server(RPM, None, headers=headers))
        theirs: list[int] = []

        async def other() -> None:
            while len(run.done) < 1_500:
                await asyncio.sleep(120 / RPM)
                sending.append(asyncio.create_task(send_one()))

        async def send_one() -> None:
            theirs.append((await run.server.answer(-1, 150))[0])

        sending = [asyncio.create_task(other())]
        await send_all(run, new_gate(run, requests_per_minute=RPM if known else None), [150] * 1_500)
        while sending:
            await sending.pop()
        assert run.server.refused() <= 0.01
        assert theirs.count(429) <= 0.01 * len(theirs)
        assert run.took_s <= 66

    run_on_moved_clock(main())


@pytest.mark.parametrize("at_s", [0.0, 20.0])
def test_a_ten_minute_outage_needs_few_requests(at_s: float) -> None:
    """Fewer than thirty, and every row is answered after it."""

    async def main() -> None:
        run = Run(Server(RPM, None))
        during(at_s, lambda: run.server.break_down(broken=True))
        during(at_s + 600, lambda: run.server.break_down(broken=False))
        await send_all(run, new_gate(run), [150] * 2_000)
        assert sum(exchange.status == 500 for exchange in run.server.exchanges) < 30
        assert sorted(run.done) == list(range(2_000))

    run_on_moved_clock(main())


def test_random_failures_are_no_outage() -> None:
    async def main() -> None:
        run = Run(Server(RPM, None))
        run.server.failing = 0.3
        await send_all(run, new_gate(run), [150] * 3_000)
        coolings = sum("Cooling" in what.partition("->")[2] for _, what in run.changes)
        assert coolings <= 3
        assert sorted(run.done) == list(range(3_000))

    run_on_moved_clock(main())


@pytest.mark.parametrize("wrong", [0.25, 4.0])
def test_wrong_estimates_stop_costing_in_two_minutes(wrong: float) -> None:
    rng = random.Random(3)
    rows = [
        (Request(row, b"", b"x" * rng.randint(400, 4_000), "m", 10_000, 4_000), rng.randint(50, 600))
        for row in range(1_000)
    ]
    usages = [Usage(len(r.body) // 4, answer, len(r.body) // 4 + answer) for r, answer in rows]
    sizes = [usage.total_tokens for usage in usages]
    estimates = Estimates({"m": Sizes(0.25 * wrong, 1.0, 500 * wrong)})

    async def main() -> None:
        run = Run(Server(None, 200_000, headers=False))
        await send_all(
            run,
            new_gate(run, tokens_per_minute=200_000),
            sizes,
            estimate=lambda row: sum(estimates.of(rows[row][0])),
            learn=lambda row, _: estimates.learn(rows[row][0], usages[row]),
        )
        for minute in (2, 3):
            accepted = sum(exchange.tokens for exchange in run.server.accepted(minute * 60 - 60, minute * 60))
            assert accepted == pytest.approx(200_000, rel=0.05)
        assert run.server.refused() <= 0.01

    run_on_moved_clock(main())


def test_an_early_random_refusal_costs_seconds() -> None:
    """The next start doesn't take it for a limit."""

    async def took_s(chance: frozenset[int], rows: int) -> tuple[float, Found]:
        run = Run(Server(headers=False))
        run.server.refused_by_chance = chance
        await send_all(run, gate := new_gate(run), [150] * rows)
        return run.took_s, gate.found

    async def main() -> None:
        undisturbed_s, _ = await took_s(frozenset(), 3_000)
        disturbed_s, _ = await took_s(frozenset({3}), 3_000)
        assert disturbed_s - undisturbed_s < 5
        _, handed_on = await took_s(frozenset({3}), 20)
        assert handed_on == Found()

    run_on_moved_clock(main())


def test_an_unconfirmed_limit_is_not_passed_on() -> None:
    """A storm by chance lowers the rate. Until it proves to be a limit, the next start hears nothing of it."""

    async def main() -> None:
        run = Run(Server(headers=False))
        run.server.refused_by_chance = frozenset(range(8, 30))
        await send_all(run, gate := new_gate(run), [150] * 60)
        assert gate.in_force.requests_per_minute is not None
        assert gate.found == Found()

    run_on_moved_clock(main())


def test_known_limits_start_without_a_refusal() -> None:
    async def main() -> None:
        run = Run(Server(RPM, None, headers=False))
        await send_all(run, first := new_gate(run), [150] * 1_500)
        assert first.found.requests_per_minute == pytest.approx(RPM, rel=0.1)
        known = Found(requests_per_minute=RPM * 0.98)
        again = Run(Server(RPM, None, headers=False))
        await send_all(again, new_gate(again, found=known, first_in_flight=32), [150] * 500)
        assert again.server.refused() == 0
        assert share_of_ideal(again, [150] * 500, RPM, None) >= 0.8

    run_on_moved_clock(main())


def test_headers_overrule_what_was_learned() -> None:
    async def main() -> None:
        run = Run(Server(RPM, None))
        await send_all(run, gate := new_gate(run, found=Found(requests_per_minute=RPM / 4)), [150] * 1_500)
        assert gate.found == Found(requests_per_minute=RPM)
        assert share_of_ideal(run, [150] * 1_500, RPM, None) >= 0.97

    run_on_moved_clock(main())
