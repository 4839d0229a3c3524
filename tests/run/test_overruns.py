"""A server that bills reasoning beyond `max_tokens` passes a cap by its first answer's surprise at most."""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchrun.limits.admission import Demand, Outcome
from batchrun.limits.budget import BudgetAccount, Cap
from batchrun.limits.gate import GateClosed
from batchrun.limits.overruns import Overrun, Overruns, decode, in_words
from batchrun.records import Request, Usage, Verdict
from tests import level
from tests.cli_process import batchrun, finish, read_summary, start, write_job, write_rows
from tests.fault_server import Exchange, FaultServer, Script, answer, serving
from tests.money import pico
from tests.moved_clock import run_on_moved_clock
from tests.unit.test_gate import new_gate

PROMPT, MAX_TOKENS, REASONING = 5, 20, 150
COST = (PROMPT * Decimal(3) + (MAX_TOKENS + REASONING) * Decimal(15)) / 1_000_000
"""Of one answer of grok-4, at the list price: reasoning is outside the completion there."""

SURPRISE = REASONING * Decimal(15) / 1_000_000
LATENCY_S = 0.05


@dataclass
class Reasoning:
    """Answers that are billed 150 tokens beyond `max_tokens`; `before_first` are requests out at the first answer."""

    reasoning: int = REASONING
    requested: int = 0
    answered: int = 0
    before_first: list[int] = field(default_factory=list)

    def begin(self) -> None:
        """Another start."""
        self.requested = self.answered = 0

    def script(self) -> Script:
        usage = {"prompt_tokens": PROMPT, "completion_tokens": MAX_TOKENS, "total_tokens": 25 + self.reasoning}
        choice = {"message": {"content": "Fine."}, "finish_reason": "stop"}
        body = answer(msgspec.json.encode({"id": "c", "model": "grok-4", "choices": [choice], "usage": usage}))

        async def work(exchange: Exchange) -> None:
            self.requested += 1
            await asyncio.sleep(LATENCY_S)
            if not self.answered:
                self.before_first.append(self.requested)
            self.answered += 1
            await exchange.send(body)

        return work


def played(tmp_path: Path, server: Reasoning, *starts: tuple[str, ...], kill_at: int = 0) -> Iterator[int]:
    """How many requests the server has answered after each start; a start with a `kill_at` dies at that request."""
    job_of = {"rows": write_rows(tmp_path / "in.jsonl", 400)}

    async def main(flags: tuple[str, ...], served: FaultServer) -> None:
        async with serving(server.script(), served=served):
            job = write_job(tmp_path / "job.toml", served.url or "", job_of["rows"])
            process = start("run", job, "-o", tmp_path / "out", *flags)
            while kill_at and process.poll() is None and server.requested < kill_at:
                await asyncio.sleep(0.001)
            if kill_at:
                process.kill()
            await asyncio.to_thread(finish, process)

    served = FaultServer()
    for flags in starts:
        server.begin()
        asyncio.run(main(flags, served))
        yield len(served.exchanges)


MODEL = ("--set", "request.model=grok-4", "--set", f"request.max_tokens={MAX_TOKENS}")


@pytest.mark.heavy
def test_a_cap_is_passed_once_at_most(tmp_path: Path) -> None:
    """By no more than the first answer's surprise, over kills and restarts."""
    server = Reasoning()
    (sent,) = played(tmp_path, server, ("--max-cost", "0.03", *MODEL))
    assert server.before_first == [1]
    assert 8 <= sent <= (Decimal("0.03") + SURPRISE) // COST
    summary = read_summary(tmp_path / "out")
    assert summary["exit_code"] == 4
    assert Decimal(summary["cost_usd"]) == sent * COST
    (killed,) = played(tmp_path, server, ("--max-cost", "0.2", *MODEL), kill_at=sent)
    assert server.before_first[1] > 1  # what the first start saw is known: no trial
    (ended,) = played(tmp_path, server, ("--max-cost", "0.2", *MODEL))
    summary = read_summary(tmp_path / "out")
    assert summary["exit_code"] == 4
    assert (sent + killed + ended) * COST <= Decimal("0.2")
    assert Decimal(summary["cost_usd"]) + Decimal(summary["possibly_billed_usd"]) <= Decimal("0.2")
    assert (sent + killed + ended) * COST <= Decimal(summary["cost_usd"]) + Decimal(summary["possibly_billed_usd"])
    assert batchrun("verify", tmp_path / "out").exit_code == 0


def test_a_token_cap_is_kept_as_well(tmp_path: Path) -> None:
    server = Reasoning()
    (sent,) = played(tmp_path, server, ("--set", "budget.max_tokens=4000", *MODEL))
    assert 4_000 / 2 < sent * 175 <= 4_000
    assert '"event":"overrun"' in (tmp_path / "out" / "run.log").read_text()


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("flags", "reasoning", "waits"), [(("--max-cost", "5"), 0, True), ((), REASONING, False), ((), 0, False)]
)
def test_only_capped_runs_await_the_first_answer(
    tmp_path: Path, flags: tuple[str, ...], reasoning: int, waits: bool
) -> None:
    server = Reasoning(reasoning)
    (sent,) = played(tmp_path, server, (*flags, "--limit", "40", *MODEL))
    assert sent == 40
    assert (server.before_first[0] == 1) is waits


# ── pure ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


REQUEST = Request(0, b"", b"x" * 100, "m", 100, 20)


def usage(prompt: int, output: int) -> Usage:
    return Usage(prompt, output, prompt + output)


@settings(max_examples=level.amount(16, 100), deadline=None)
@given(st.integers(0, 400), st.integers(500, 20_000), st.integers(1, 60), st.integers(0, 3))
def test_spending_exceeds_a_cap_by_one_surprise(output: int, cap: int, in_flight: int, fails: int) -> None:
    """Rows of two models with the same overrun; the first few attempts fail without an answer."""

    async def main() -> None:
        spent = attempts = 0
        overruns = Overruns()
        gate = new_gate(max_in_flight=in_flight, budget=BudgetAccount(tokens=Cap(cap, 0)), overruns=overruns)

        async def worker(number: int) -> None:
            nonlocal spent, attempts
            request = msgspec.structs.replace(REQUEST, model="ab"[number % 2])
            for row in range(50):
                slot = await gate.admit(Demand(1, None, request.upper_bound_tokens, model=request.model))
                attempts += 1
                fate = Verdict.ROW if attempts <= fails else Verdict.OK
                await asyncio.sleep(0.1)
                tokens = 0 if fate is Verdict.ROW else 50 + output
                if tokens:
                    overruns.learn(request, usage(50, output))
                gate.observe(slot, Outcome(50 * number + row, fate))
                gate.release(slot, None, tokens)
                spent += tokens

        await asyncio.gather(*(worker(number) for number in range(in_flight)), return_exceptions=True)
        surprises = 2 + fails
        assert spent <= cap + surprises * max(0, output - 20 - 50)

    run_on_moved_clock(main())


def test_waiting_rows_reserve_by_the_first_answer() -> None:
    async def main() -> None:
        overruns = Overruns()
        gate = new_gate(budget=BudgetAccount(cost=Cap(pico(1), 0)), overruns=overruns)
        ask = Demand(1, pico("0.10"), 120, 20, "m", 100_000_000, 1_000_000_000)
        slot = await gate.admit(ask)
        assert gate.bound(slot) == (pico("0.10"), 120)
        waiting = asyncio.create_task(gate.admit(ask))
        await asyncio.sleep(0)
        assert not waiting.done()
        assert overruns.learn(REQUEST, usage(150, 220))
        gate.settle(slot, 370)
        gate.observe(slot, Outcome(0, Verdict.OK))
        gate.release(slot, pico("0.235"), 370)
        assert gate.bound(await waiting) == (pico("0.51"), 620)  # 2 x 50 in, 2 x 200 out
        gate.release(waiting.result(), pico("0.30"), 370)
        with pytest.raises(GateClosed, match=r"the next request may cost \$0.51"):
            await gate.admit(ask)

    run_on_moved_clock(main())


def test_each_model_has_one_trial_at_once() -> None:
    overruns = Overruns()
    assert overruns.most_in_flight("m") == 1
    overruns.ended("m", Verdict.SLOW)
    assert overruns.most_in_flight("m") == 1
    overruns.ended("m", Verdict.ROW)
    assert overruns.most_in_flight("m") == 2
    overruns.ended("m", Verdict.OK)
    assert overruns.most_in_flight("m") is None
    assert overruns.most_in_flight("other") == 1


def test_the_next_start_knows_the_overrun() -> None:
    """Another variant has a trial of its own."""
    overruns = Overruns()
    assert overruns.learn(REQUEST, usage(100, 20))  # that a model keeps to its bounds is learned, too
    assert not overruns.learn(REQUEST, usage(10, 10))
    assert overruns.taken() == []
    assert overruns.learn(REQUEST, usage(100, 170))
    assert overruns.taken() == [("m", Overrun(0, 150))]
    again, other, none = (decode(entry, 0) for entry in (overruns.encode(), None, '{"models": 3}'))
    assert again.most_in_flight("m") is None
    assert not again.learn(REQUEST, usage(100, 170))
    assert other.most_in_flight("m") == none.most_in_flight("m") == 1
    varied = decode(overruns.encode(), 1)
    assert varied.most_in_flight("m") == 1
    assert varied.widened(Demand(1, None, 120, 20, "m")).upper_bound_tokens == 420


def test_an_overrun_is_reported_in_plain_words() -> None:
    assert in_words("grok-4", Overrun(3, 1_500)) == (
        "an answer of grok-4 was billed 1,500 output tokens beyond max_tokens and 3 prompt tokens beyond what was "
        "sent: budgets reserve more for its requests from now on"
    )
