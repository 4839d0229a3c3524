"""Many processes spend from one budget file: never more than its caps, whichever of them are killed."""

import contextlib
import json
import random
import signal
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from batchrun.errors import CheckpointError, DiskError
from batchrun.store import budget_file
from batchrun.store.budget_file import BudgetFile, Caps, Drawn
from batchrun.store.budget_lease import Lease, Period
from tests import prefork
from tests.money import pico

TODAY, TOMORROW = Period("2026-11-30", "2026-11"), Period("2026-12-01", "2026-12")
BOUND = pico("0.01")


OPENED: list[BudgetFile] = []


@pytest.fixture(autouse=True)
def all_closed() -> Iterator[None]:
    yield
    while OPENED:
        OPENED.pop().close()


def opened(path: Path, day: object = None, month: object = None, name: str = "nightly") -> BudgetFile:
    caps = Caps(None if day is None else pico(day), None if month is None else pico(month))
    OPENED.append(BudgetFile(path, name, caps, Path("runs/a")))
    return OPENED[-1]


def draw(file: BudgetFile, lease: Lease, need: object) -> Drawn:
    drawn = file.draw(lease, pico(need))
    lease.granted += drawn.granted
    return drawn


@contextlib.contextmanager
def changed(path: Path) -> Iterator[sqlite3.Connection]:
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        yield database


def windows(path: Path) -> dict[tuple[str, str], tuple[int, int]]:
    """(spent, in doubt) by budget and period, read from the file without the product."""
    with changed(path) as database:
        return {
            (budget, period): (pico(spent), pico(doubt))
            for budget, period, spent, doubt, _ in database.execute("SELECT * FROM windows")
        }


def leases(path: Path) -> int:
    with changed(path) as database:
        return int(database.execute("SELECT count(*) FROM leases").fetchone()[0])


def files(path: Path) -> list[str]:
    return sorted(each.name for each in path.parent.iterdir())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "budget.db"


def test_spending_is_booked_by_day_and_month(path: Path) -> None:
    file = opened(path, day=1, month=10)
    lease = file.lease(TODAY)
    drawn = draw(file, lease, "0.01")
    assert BOUND < drawn.granted <= pico(1) // budget_file.BLOCKS
    assert drawn.uses[0].cap == pico(1)
    lease.reserve(BOUND)
    assert lease.left_pico_usd == drawn.granted - BOUND
    lease.settle(BOUND, pico("0.004"))
    lease.reserve(BOUND)
    lease.settle(BOUND, None)
    file.end(lease)
    spent = pico("0.004"), BOUND
    assert windows(path) == {("nightly", "2026-11-30"): spent, ("nightly", "2026-11"): spent}
    assert (leases(path), files(path)) == (0, ["budget.db"])
    file.close()


def test_other_periods_and_budgets_are_separate(path: Path) -> None:
    file = opened(path, day=1)
    lease = file.lease(TODAY)
    draw(file, lease, 1)
    lease.reserve(pico(1))
    lease.settle(pico(1), pico(1))
    assert draw(file, lease, "0.01").granted == 0
    tomorrow = file.lease(TOMORROW)
    assert draw(file, tomorrow, "0.5").granted >= pico("0.5")
    other = opened(path, day=1, name="other")
    its = other.lease(TODAY)
    assert draw(other, its, 1).granted == pico(1)
    for each, held in ((file, lease), (file, tomorrow), (other, its)):
        each.end(held)


def test_only_unspent_leases_come_back(path: Path) -> None:
    first, second = opened(path, day=1), opened(path, day=1)
    mine, its = first.lease(TODAY), second.lease(TODAY)
    draw(first, mine, "0.7")
    mine.reserve(pico("0.7"))
    refused = draw(second, its, "0.5")
    assert refused.granted == 0
    assert refused.can_come
    assert draw(second, its, "1.1").can_come is False
    mine.settle(pico("0.7"), pico("0.6"))
    mine.shrink()
    first.give_back(mine)
    refused = draw(second, its, "0.5")
    assert refused.granted == 0
    assert not refused.can_come
    assert draw(second, its, "0.4").granted == pico("0.4")
    first.end(mine)
    second.end(its)


def test_an_answer_beyond_its_bound_counts_in_full(path: Path) -> None:
    file = opened(path, day=1)
    lease = file.lease(TODAY)
    draw(file, lease, "0.3")
    lease.reserve(pico("0.3"))
    lease.settle(pico("0.3"), pico("0.95"))
    refused = file.draw(lease, pico("0.1") - lease.left_pico_usd)
    assert refused.granted == 0
    assert refused.uses[0].spent == pico("0.95")
    assert file.draw(lease, pico("0.05") - lease.left_pico_usd).granted > 0
    file.end(lease)


def test_a_damaged_budget_file_is_named(path: Path) -> None:
    file = opened(path, day=1)
    lease = file.lease(TODAY)
    draw(file, lease, "0.5")
    lease.reserve(pico("0.5"))
    file.end(lease)
    file.close()
    with changed(path) as database:
        database.execute("UPDATE windows SET in_doubt_usd = '0.1'")
    with pytest.raises(CheckpointError, match=r"budget\.db: damaged"):
        opened(path, day=1)
    with changed(path) as database:
        database.execute("PRAGMA user_version = 9")
    with pytest.raises(CheckpointError, match="another version"):
        opened(path, day=1)


def test_a_deleted_budget_file_is_noticed(path: Path) -> None:
    file = opened(path, day=1)
    lease = file.lease(TODAY)
    draw(file, lease, "0.1")
    path.unlink()
    with pytest.raises(DiskError, match="was deleted or replaced"):
        draw(file, lease, "0.1")
    opened(path, day=1)
    with pytest.raises(DiskError, match="was deleted or replaced"):
        draw(file, lease, "0.1")


def test_a_power_loss_puts_leases_in_doubt(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dying = spender(path, requests=1, then="hang")
    dying.kill()
    dying.communicate()
    monkeypatch.setattr(budget_file, "boot_id", lambda: "another start of the machine")
    with changed(path) as database:
        granted = pico(database.execute("SELECT granted_usd FROM leases").fetchone()[0])
    file = opened(path, day=1)
    draw(file, file.lease(TODAY), "0.01")
    assert windows(path)["nightly", TODAY.day] == (0, granted)


# ── processes ─────────────────────────────────────────────────────────────────────────────────────────────────────────

SPENDER = """
import json, random, sys, time
from pathlib import Path
from batchrun.store.budget_file import BudgetFile, Caps
from batchrun.store.budget_lease import Period

path, cap, requests, then, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]
chance = random.Random(seed)
file = BudgetFile(path, "nightly", Caps(cap, None), Path("runs"))
lease = file.lease(Period("2026-11-30", "2026-11"))
bound, spent, sent = 10**10, 0, 0
in_flight = []

def say(**what):
    print(json.dumps({name: str(value) for name, value in what.items()}), flush=True)

while sent < requests:
    if lease.left_pico_usd < bound:
        drawn = file.draw(lease, bound - lease.left_pico_usd)
        lease.granted += drawn.granted
        if not drawn.granted:
            if in_flight:
                cost = in_flight.pop()
                lease.settle(bound, cost)
                say(spent=cost)
            elif drawn.can_come:
                lease.shrink(); file.give_back(lease); time.sleep(0.01)
            else:
                break
            continue
    lease.reserve(bound)
    cost = chance.randrange(10, 101) * 10**8
    in_flight.append(cost)
    sent += 1
    if len(in_flight) > 4:
        cost = in_flight.pop(0)
        lease.settle(bound, cost)
        say(spent=cost)
    time.sleep(chance.random() / 500)
if then == "hang":
    say(reserved=bound * len(in_flight))
    time.sleep(600)
for cost in in_flight:
    lease.settle(bound, cost)
    say(spent=cost)
file.end(lease)
"""


def spender(path: Path, requests: int, then: str, cap: int = 10**12, seed: int = 0) -> "subprocess.Popen[str]":
    """A process that spends; one that shall `hang` is returned when it has come so far."""
    process = prefork.script(SPENDER, path, str(cap), str(requests), then, str(seed))
    if then == "hang":
        assert process.stdout is not None
        for line in process.stdout:
            if "reserved" in line:
                break
    return process


def test_a_killed_process_leaves_requests_in_flight(path: Path) -> None:
    dying = spender(path, requests=7, then="hang")
    dying.send_signal(signal.SIGKILL)
    dying.communicate()
    file = opened(path, day=1)
    lease = file.lease(TODAY)
    drawn = draw(file, lease, "0.01")
    assert drawn.uses[0].in_doubt == 4 * BOUND
    assert 0 < drawn.uses[0].spent <= 3 * BOUND
    assert drawn.uses[0].held == 0
    assert leases(path) == 1
    file.end(lease)
    assert files(path) == ["budget.db"]


def test_eight_processes_use_and_keep_one_cap(path: Path) -> None:
    """Three of them are killed. The last one starts after that: it gets what they left, if no other does."""
    cap, chance = pico(4), random.Random(5)
    processes = [spender(path, 10**6, "end", cap, seed) for seed in range(7)]
    for process in processes[:3]:
        time.sleep(0.3 + chance.random() / 4)
        process.send_signal(signal.SIGKILL)
        process.wait()
    processes.append(spender(path, 10**6, "end", cap, seed=7))
    spent = 0
    for process in processes:
        said, _ = process.communicate(timeout=60)
        spent += sum(int(json.loads(line)["spent"]) for line in said.splitlines())
    assert [process.returncode for process in processes[3:]] == [0] * 5
    booked, doubt = windows(path)["nightly", TODAY.day]
    assert booked + doubt <= cap
    assert booked + doubt > cap - BOUND
    assert spent <= booked + doubt  # what a killed process could not say any more is among it
    assert booked + doubt - spent <= 3 * 6 * BOUND
    assert (leases(path), files(path)) == (0, ["budget.db"])
