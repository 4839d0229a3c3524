"""Budgets of a start, a day and a month, by real runs against the simulator's ledger."""

import asyncio
import json
import random
import re
import signal
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest

from batchrun.dispatch import shared_budget
from batchrun.dispatch.shared_budget import SharedBudget, opens_at
from batchrun.errors import DiskError
from batchrun.simulator import LedgerLine, SimulatorConfig
from batchrun.store.budget_file import BudgetFile, Caps, Drawn
from batchrun.store.budget_lease import Lease
from tests.cli_process import DEADLINE_S, batchrun, read_summary, start, write_job, write_rows
from tests.jobs import job_over
from tests.money import pico
from tests.simulator_process import RunningSimulator, running_simulator
from tests.timing import zone_before_midnight

PRICES = '[pricing."vtrix-gpt-5.3-codex"]\ninput = 1000\noutput = 10000\n'
ZONE = zone_before_midnight()
BOUND = Decimal("0.75")
"""More than any request of these jobs may cost: 40 tokens of answer, and some 300 bytes."""


def billed_usd(ledger: Iterable[LedgerLine]) -> Decimal:
    tokens = [(line.prompt_tokens, line.completion_tokens) for line in ledger if line.billed]
    return sum((Decimal(prompt * 1000 + output * 10_000) / 10**6 for prompt, output in tokens), Decimal(0))


def windows(state: Path) -> dict[str, tuple[Decimal, Decimal]]:
    with closing(sqlite3.connect(state)) as database:
        found = database.execute("SELECT period, spent_usd, in_doubt_usd FROM windows").fetchall()
    return {period: (Decimal(spent), Decimal(doubt)) for period, spent, doubt in found}


def job(folder: Path, url: str, budget: str, rows: int = 40, more: str = "") -> Path:
    source = write_rows(folder / "in.jsonl", rows)
    state = f'state = "{folder}/budget.db"\ntime_zone = "{ZONE}"\n'
    return write_job(folder / "job.toml", url, source, f"{PRICES}\n[budget]\n{state}{budget}\n{more}")


@pytest.fixture
def simulator(tmp_path: Path) -> Iterator[RunningSimulator]:
    with running_simulator(SimulatorConfig(latency_s=0.02, ledger=str(tmp_path / "ledger"))) as running:
        yield running


@pytest.mark.heavy
def test_each_start_has_its_own_budget(simulator: RunningSimulator, tmp_path: Path) -> None:
    file, before = job(tmp_path, simulator.url, "per_start_usd = 4"), Decimal(0)
    for _ in range(20):
        ended = batchrun("run", file, "-o", tmp_path / "out")
        spent = billed_usd(simulator.ledger())
        assert before < spent <= before + 4
        before = spent
        if ended.exit_code == 0:
            break
        assert ended.exit_code == 4
        assert "; the same command resumes with as much again; or raise budget.per_start_usd" in ended.stdout
        assert ended.stderr.count("of budget.per_start_usd is used") == 1
    assert len(simulator.ledger()) == 40
    assert not (tmp_path / "budget.db").exists()  # nothing is shared


@pytest.mark.heavy
def test_runs_share_the_budget_of_a_day(simulator: RunningSimulator, tmp_path: Path) -> None:
    file = job(tmp_path, simulator.url, 'per_day_usd = 4\nper_month_usd = 50\nname = "ours"')
    first = batchrun("run", file, "-o", tmp_path / "first", "--limit", "5")
    assert first.exit_code == 0
    second = batchrun("run", file, "-o", tmp_path / "second")
    assert second.exit_code == 4
    day = datetime.now(ZoneInfo(ZONE)).date().isoformat()
    reason = read_summary(tmp_path / "second")["reason"]
    opens = opens_at(day, datetime.now(ZoneInfo(ZONE)))
    assert re.fullmatch(
        rf"the budget is used up: \$3\.\d+ of \$4\.00 spent in {day} by ours, and the next request may cost \$0\.\d+; "
        rf"it opens again at {opens:%Y-%m-%d} 00:00 {opens:%Z}, or raise budget\.per_day_usd and run again",
        reason,
    )
    spent = billed_usd(simulator.ledger())
    assert 4 - BOUND < spent <= 4
    assert windows(tmp_path / "budget.db") == {day: (spent, Decimal(0)), day[:7]: (spent, Decimal(0))}
    assert second.stderr.count("of budget.per_day_usd is used") == 1
    assert sum("of budget.per_day_usd is used" in line for line in second.stdout.splitlines()) == 1
    log = [json.loads(line) for line in (tmp_path / "second" / "run.log").read_text().splitlines()]
    assert [line["period"] for line in log if line["event"] == "budget nearly used"] == [day]
    budgets = {use["setting"]: use for use in read_summary(tmp_path / "second")["budgets"]}
    assert Decimal(budgets["per_day_usd"]["spent_usd"]) == spent
    assert Decimal(budgets["per_month_usd"]["spent_usd"]) == spent
    before = len(simulator.ledger())
    assert batchrun("run", file, "-o", tmp_path / "second").exit_code == 4
    assert len(simulator.ledger()) == before
    raised = batchrun("run", file, "-o", tmp_path / "second", "--set", "budget.per_day_usd=40")
    assert raised.exit_code == 0, raised.stderr
    other = batchrun("run", file, "-o", tmp_path / "third", "--set", "budget.name=another", "--limit", "1")
    assert other.exit_code == 0


@pytest.mark.heavy
def test_eight_runs_never_pass_one_budget(tmp_path: Path) -> None:
    chance, cap = random.Random(12), Decimal(30)
    with running_simulator(SimulatorConfig(latency_s=0.1, ledger=str(tmp_path / "ledger"))) as simulator:
        file = job(tmp_path, simulator.url, f"per_day_usd = {cap}\nname = 'all'", rows=400)
        runs = {tmp_path / f"run-{number}": None for number in range(8)}
        processes = [start("run", file, "-o", out, "--set", "limits.max_in_flight=4") for out in runs]
        while len(simulator.ledger()) < 20:
            time.sleep(0.01)
        killed = processes[:3]
        for process in killed:
            time.sleep(chance.random() / 3)
            process.send_signal(signal.SIGKILL)
        for process in processes:
            process.communicate(timeout=DEADLINE_S)
        assert [process.returncode for process in processes[3:]] == [4] * 5
        billed = billed_usd(simulator.ledger())
    day = datetime.now(ZoneInfo(ZONE)).date().isoformat()
    spent, doubt = windows(tmp_path / "budget.db")[day]
    assert billed <= spent + doubt <= cap
    assert spent + doubt > cap - BOUND
    assert 0 < doubt <= 3 * 4 * BOUND  # what was in flight in those that were killed
    of_runs = [read_summary(out) for out in runs]
    assert sum(Decimal(each["cost_usd"]) for each in of_runs[3:]) <= spent
    with closing(sqlite3.connect(tmp_path / "budget.db")) as database:
        assert database.execute("SELECT count(*) FROM leases").fetchone() == (0,)
    assert list(tmp_path.glob("budget.db-*")) == []


@pytest.mark.heavy
def test_a_killed_runs_requests_stay_counted(tmp_path: Path) -> None:
    with running_simulator(SimulatorConfig(latency_s=0.3, ledger=str(tmp_path / "ledger"))) as simulator:
        file = job(tmp_path, simulator.url, "per_day_usd = 60", rows=60)
        process = start("run", file, "-o", tmp_path / "out", "--set", "limits.max_in_flight=3")
        while len(simulator.ledger()) < 4:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        ended = batchrun("run", file, "-o", tmp_path / "out")
        assert ended.exit_code == 0, ended.stderr
        summary = read_summary(tmp_path / "out")
        spent, doubt = windows(tmp_path / "budget.db")[datetime.now(ZoneInfo(ZONE)).date().isoformat()]
        cost, possibly = Decimal(summary["cost_usd"]), Decimal(summary["possibly_billed_usd"])
        assert spent <= cost  # an answer that was durable, but not settled in the lease yet, counts by its bound
        assert cost + possibly <= spent + doubt <= cost + 3 * BOUND
        assert 0 < summary["possibly_billed_count"] <= 3
        assert billed_usd(simulator.ledger()) <= spent + doubt


@pytest.mark.heavy
def test_a_budget_that_cant_be_kept_is_refused(simulator: RunningSimulator, tmp_path: Path) -> None:
    file = job(tmp_path, simulator.url, "per_day_usd = 4")
    for options, said in {
        ("budget.per_day_usd=0",): "budget.per_day_usd: expected 0 to",
        ("budget.per_month_usd=0.01",): "budget.per_month_usd: $0.01 is less than the largest request may cost",
        ("request.model=unknown-model",): "budget.per_day_usd: the price of unknown-model is unknown",
        ("budget.time_zone=Mars/Olympus",): "budget.time_zone: no time zone 'Mars/Olympus' is known here",
    }.items():
        ended = batchrun("run", file, "-o", tmp_path / "out", *(word for each in options for word in ("--set", each)))
        assert ended.exit_code == 2
        assert said in ended.stderr
    (tmp_path / "file").write_text("")
    ended = batchrun("run", file, "-o", tmp_path / "out", "--set", f"budget.state={tmp_path}/file/budget.db")
    assert ended.exit_code == 2
    assert "is in the way; name another file" in ended.stderr
    (tmp_path / "budget.db").write_bytes(b"not a database, surely" * 300)
    ended = batchrun("run", file, "-o", tmp_path / "out")
    assert (ended.exit_code, ended.stderr.count("damaged")) == (7, 1)
    assert simulator.ledger() == []


# ── the share of one start ────────────────────────────────────────────────────────────────────────────────────────────


def file(path: Path, day: str) -> BudgetFile:
    return BudgetFile(path / "budget.db", "nightly", Caps(pico(day), None), path)


async def until(holds: Callable[[], bool]) -> None:
    for _ in range(500):
        if holds():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("never")


def test_a_new_day_has_its_own_money(tmp_path: Path) -> None:
    now = [datetime(2026, 11, 30, 23, 59, 59, tzinfo=UTC)]

    async def night() -> None:
        share = SharedBudget(file(tmp_path, "1"), "nightly", ZoneInfo("UTC"), lambda: now[0])
        one = pico(1)
        await until(lambda: share.fits(one))
        lease = share.reserve(one)
        await until(lambda: not share.fits(one) and share.uses() != [])
        assert not share.is_used_up(one)  # this process has a request in flight
        now[0] = datetime(2026, 12, 1, tzinfo=UTC)
        await until(lambda: share.fits(one))
        share.reserve(one).settle(one, pico("0.9"))
        lease.settle(one, pico("0.4"))
        share.tidy()
        await asyncio.sleep(0.1)
        assert windows(tmp_path / "budget.db")["2026-11-30"] == (Decimal("0.4"), Decimal(0))
        assert [(use.period, use.spent_usd) for use in share.uses()] == [("2026-12-01", Decimal("0.9"))]
        await until(lambda: not share.fits(one) and share.is_used_up(one))
        assert not share.is_used_up(pico("0.05"))
        assert "0.90 of $1.00 spent in 2026-12-01" in share.refusal(one)
        assert "it opens again at 2026-12-02 00:00 UTC" in share.refusal(one)
        await share.close()

    asyncio.run(night())
    assert windows(tmp_path / "budget.db") == {
        "2026-11-30": (Decimal("0.4"), Decimal(0)),
        "2026-11": (Decimal("0.4"), Decimal(0)),
        "2026-12-01": (Decimal("0.9"), Decimal(0)),
        "2026-12": (Decimal("0.9"), Decimal(0)),
    }


def test_the_refusal_names_only_the_cap_reached(tmp_path: Path) -> None:
    """What is possibly billed counts as spent."""

    async def night() -> None:
        both = BudgetFile(tmp_path / "budget.db", "nightly", Caps(pico(1), pico(100)), tmp_path)
        now = datetime(2026, 11, 30, 12, tzinfo=UTC)
        share, most, half = SharedBudget(both, "nightly", ZoneInfo("UTC"), lambda: now), pico("0.9"), pico("0.5")
        await until(lambda: share.fits(most))
        share.reserve(most).settle(most, None)
        await until(lambda: not share.fits(half) and share.is_used_up(half))
        assert share.refusal(half).startswith(
            "$0.90 of $1.00 spent in 2026-11-30 by nightly, $0.90 of it possibly billed"
        )
        assert "spent in 2026-11 by" not in share.refusal(half)
        await share.close()

    asyncio.run(night())


def test_a_lost_budget_file_ends_the_run(tmp_path: Path) -> None:
    async def night() -> None:
        share, one, failed = (
            SharedBudget(file(tmp_path, "100"), "nightly", ZoneInfo("UTC")),
            pico(1),
            asyncio.Event(),
        )
        await until(lambda: share.fits(one))
        share.reserve(one)
        share.listen(lambda: None, lambda error: failed.set() if isinstance(error, DiskError) else None)
        (tmp_path / "budget.db").rename(tmp_path / "elsewhere.db")
        assert not share.fits(pico(90))
        await asyncio.wait_for(failed.wait(), DEADLINE_S)
        (tmp_path / "elsewhere.db").rename(tmp_path / "budget.db")
        await share.close()

    asyncio.run(night())


def test_a_lease_in_use_is_kept(tmp_path: Path) -> None:
    async def night() -> None:
        share, one = SharedBudget(file(tmp_path, "100"), "nightly", ZoneInfo("UTC")), pico(1)
        await until(lambda: share.fits(one))
        share.reserve(one).settle(one, pico("0.1"))
        share.tidy()
        await asyncio.sleep(0.05)
        assert share.fits(pico("0.5"))
        await share.close()

    asyncio.run(night())


class CountedFile(BudgetFile):
    """Counts the draws."""

    draws = 0

    def draw(self, lease: Lease, need: int) -> Drawn:
        self.draws += 1
        return super().draw(lease, need)


def test_a_lease_ends_with_its_day(tmp_path: Path) -> None:
    now = [datetime(2026, 11, 30, 23, 59, 59, tzinfo=UTC)]

    async def night() -> None:
        share = SharedBudget(file(tmp_path, "100"), "nightly", ZoneInfo("UTC"), lambda: now[0])
        one = pico(1)
        await until(lambda: share.fits(one))
        share.reserve(one).settle(one, pico("0.1"))
        assert share.fits(pico("0.5"))
        now[0] = datetime(2026, 12, 1, tzinfo=UTC)
        assert not share.fits(pico("0.5"))
        await until(lambda: share.fits(one))
        share.reserve(one).settle(one, pico("0.2"))
        await share.close()

    asyncio.run(night())
    spent = {period: usd for period, (usd, _) in windows(tmp_path / "budget.db").items()}
    assert (spent["2026-11-30"], spent["2026-12-01"]) == (Decimal("0.1"), Decimal("0.2"))


def test_a_refused_draw_is_repeated_within_a_second(tmp_path: Path) -> None:
    """Each time the gate is woken, so that it asks again."""

    async def night() -> None:
        counted = CountedFile(tmp_path / "budget.db", "nightly", Caps(pico(1), None), tmp_path)
        mine = SharedBudget(counted, "nightly", ZoneInfo("UTC"))
        its = SharedBudget(file(tmp_path, "1"), "nightly", ZoneInfo("UTC"))
        bound = pico("0.6")
        await until(lambda: its.fits(bound))
        lease = its.reserve(bound)
        is_awake = asyncio.Event()
        mine.listen(is_awake.set, lambda error: None)
        started_s = time.monotonic()
        for _ in range(4):
            is_awake.clear()
            assert not mine.fits(bound)
            await asyncio.wait_for(is_awake.wait(), DEADLINE_S)
        assert counted.draws <= 1 + (time.monotonic() - started_s) / shared_budget.POLL_S
        lease.settle(bound, pico("0.1"))
        await its.close()
        await until(lambda: mine.fits(bound))
        mine.reserve(bound).settle(bound, bound)
        await mine.close()

    asyncio.run(night())


def test_money_that_returns_during_a_draw_is_spent(tmp_path: Path) -> None:
    """A draw that is refused while the last request ends says nothing about what that request gave back."""

    async def night() -> None:
        share, one, half = SharedBudget(file(tmp_path, "1"), "nightly", ZoneInfo("UTC")), pico(1), pico("0.5")
        await until(lambda: share.fits(one))
        lease = share.reserve(one)
        has_drawn = asyncio.Event()
        share.listen(has_drawn.set, lambda error: None)
        assert not share.fits(half)
        await asyncio.sleep(0)  # the draw is in its thread now
        lease.settle(one, pico("0.4"))
        await has_drawn.wait()
        assert not share.is_used_up(half)
        await until(lambda: share.fits(half))
        share.reserve(half).settle(half, half)
        await share.close()

    asyncio.run(night())
    assert set(windows(tmp_path / "budget.db").values()) == {(Decimal("0.9"), Decimal(0))}


def test_an_idle_run_gives_its_lease_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_budget, "IDLE_S", 0.2)

    async def night() -> None:
        mine, its = (SharedBudget(file(tmp_path, "1"), "nightly", ZoneInfo("UTC")) for _ in range(2))
        bound = pico("0.6")
        await until(lambda: its.fits(bound))
        lease = its.reserve(bound)
        await until(lambda: not mine.fits(bound) and mine.uses() != [])
        await asyncio.sleep(0.4)
        assert not mine.fits(bound)
        assert not mine.is_used_up(bound)
        lease.settle(bound, pico("0.1"))
        its.tidy()
        await until(lambda: mine.fits(bound))
        mine.reserve(bound).settle(bound, bound)
        await mine.close()
        await its.close()

    asyncio.run(night())


def test_a_rehearsal_spends_its_own_budget(tmp_path: Path) -> None:
    """A run against the built-in simulator, which costs nothing, takes no money of the real runs."""
    file = job(tmp_path, "simulator", 'per_day_usd = 40\nname = "ours"', rows=2)
    assert batchrun("run", file, "-o", tmp_path / "out").exit_code == 0
    with closing(sqlite3.connect(tmp_path / "budget.db")) as database:
        assert database.execute("SELECT DISTINCT budget FROM windows").fetchall() == [("ours (simulator)",)]


def test_a_budgets_name_says_whose_it_is() -> None:
    budget = {"per_day_usd": 1, "name": "ours"}
    assert shared_budget.name_of(job_over(None, budget=budget)) == "ours (simulator)"
    real = {"url": "https://h/v1", "auth": "none"}
    assert shared_budget.name_of(job_over(None, budget=budget, endpoint=real)) == "ours"
    assert shared_budget.name_of(job_over(None, budget={}, endpoint=real)) == "job"
    berlin = datetime(2026, 10, 25, 1, tzinfo=ZoneInfo("Europe/Berlin"))  # a day of 25 hours
    assert opens_at("2026-10-25", berlin).astimezone(UTC) == datetime(2026, 10, 25, 23, tzinfo=UTC)
    assert opens_at("2026-12", berlin) == datetime(2027, 1, 1, tzinfo=ZoneInfo("Europe/Berlin"))
