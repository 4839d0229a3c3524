"""A month of nights: an input that grows, a bad key, a budget that is used up, a new prompt, and what it all cost."""

import json
import sqlite3
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import pytest

from batchrun.simulator import LedgerLine, SimulatorConfig, parse_faults
from tests import level
from tests.at_time import batchrun_at
from tests.cli_process import KEY, batchrun, read_summary, write_job, write_rows
from tests.simulator_process import running_simulator

NIGHTS = level.amount(sample=12, full=30)
FIRST = datetime(2026, 12, 1, 2, 15, tzinfo=UTC) - timedelta(days=NIGHTS // 2)
BAD_KEY, USED_UP, NEW_PROMPT = NIGHTS // 4, NIGHTS // 2 - 2, 2 * NIGHTS // 3
"""On these nights something is otherwise."""

pytestmark = pytest.mark.campaign

INPUT_USD, OUTPUT_USD = Decimal("1.25"), Decimal(10)
JOB = """
[pricing."vtrix-gpt-5.3-codex"]
input = 1.25
output = 10

[budget]
name = "nights"
per_day_usd = {per_day}
per_month_usd = 5
state = "{folder}/runs/budget.db"

[retry]
backoff_base_s = 0.02

[canary]
rows = 3
min_ok_share = 0

[output]
path = "{folder}/runs/{{job}}/{{date}}"
max_failures = 100
"""

RECORD = "import json, sys; received = json.load(sys.stdin); print(received['exit_code'], file=open(sys.argv[1], 'a'))"


class Start(NamedTuple):
    """One start of `batchrun`: when, for which night, how it ended, and what the simulator served in it."""

    at: datetime
    night: str
    exit_code: int
    served: list[LedgerLine]

    @property
    def day(self) -> str:
        return self.at.date().isoformat()


class Month(NamedTuple):
    """A whole month."""

    folder: Path
    starts: list[Start]

    @property
    def billed(self) -> Iterator[tuple[Start, LedgerLine]]:
        return ((start, line) for start in self.starts for line in start.served if line.billed)

    def report(self, *arguments: str) -> dict[str, Any]:
        ended = batchrun("report", self.folder / "runs", "--format", "json", *arguments)
        assert ended.exit_code == 0, ended.stderr
        found: dict[str, Any] = json.loads(ended.stdout)
        return found

    def costs(self, by: str) -> dict[str, Decimal]:
        """What the report says."""
        lines = self.report("--by", by)["lines"]
        return {line[by]: Decimal(line["cost_usd"]) for line in lines if Decimal(line["cost_usd"] or 0)}


def usd(lines: Iterable[LedgerLine]) -> Decimal:
    micro = (line.prompt_tokens * INPUT_USD + line.completion_tokens * OUTPUT_USD for line in lines if line.billed)
    return sum(micro, Decimal(0)) / 10**6


def sums(month: Month, key: Callable[[Start, LedgerLine], str]) -> dict[str, Decimal]:
    """What the simulator billed, by whatever the key says."""
    groups: dict[str, list[LedgerLine]] = defaultdict(list)
    for start, line in month.billed:
        groups[key(start, line)].append(line)
    return {name: usd(lines) for name, lines in groups.items()}


@pytest.fixture(scope="module")
def month(tmp_path_factory: pytest.TempPathFactory) -> Month:
    folder = tmp_path_factory.mktemp("month")
    faults = parse_faults("500=0.04,429=0.03,content_policy=0.03")
    config = SimulatorConfig(latency_s=0.01, faults=faults, ledger=str(folder / "ledger"), seed=11, api_key=KEY)
    starts: list[Start] = []
    with running_simulator(config) as simulator:
        seen = 0
        for number in range(NIGHTS):
            at = FIRST + timedelta(days=number)
            source = write_rows(folder / "in.jsonl", 6 + number)
            job = write_job(folder / "night.toml", simulator.url, source, JOB.format(folder=folder, per_day="0.5"))
            received = json.dumps([sys.executable, "-c", RECORD, str(folder / "ends")])
            job.write_text(f"on_end = {received}\n{job.read_text()}")

            prompt = ("--set", "request.prompt=Repeat: {{ text }}") if number >= NEW_PROMPT else ()

            def run(
                at: datetime, *more: str, night: str, key: str = KEY, job: Path = job, prompt: tuple[str, ...] = prompt
            ) -> int:
                nonlocal seen
                ended = batchrun_at(at, "run", job, "--date", night, *prompt, *more, key=key)
                served = simulator.ledger()
                starts.append(Start(at, night, ended.exit_code, served[seen:]))
                seen = len(served)
                assert "Traceback" not in ended.stderr
                return ended.exit_code

            night = at.date().isoformat()
            if number == BAD_KEY:
                assert run(at, night=night, key="wrong-key") == 5
                at += timedelta(minutes=15)
            if number == USED_UP:
                assert run(at, "--set", "budget.per_day_usd=0.002", night=night) == 4
                at += timedelta(days=1, minutes=-90)  # the next day finishes it, before its own night
            assert run(at, night=night) == 0
    return Month(folder, starts)


def test_the_bill_of_a_month_is_the_ledgers(month: Month) -> None:
    assert month.costs("night") == sums(month, lambda start, line: start.night)
    assert month.costs("day") == sums(month, lambda start, line: start.day)
    by_month = sums(month, lambda start, line: start.day[:7])
    assert list(by_month) == ["2026-11", "2026-12"]
    assert month.costs("month") == by_month
    total = month.report()["total"]
    assert Decimal(total["cost_usd"]) == usd(line for _, line in month.billed)
    assert total["rows"] == sum(6 + number for number in range(NIGHTS))
    assert (total["runs"], total["complete"], total["pending"]) == (NIGHTS, NIGHTS, 0)


def test_the_bill_by_reason_is_the_ledgers(month: Month) -> None:
    """The last exchange of a row was for its answer; what others cost is wasted."""
    status: dict[tuple[str, int], str] = {}
    runs: dict[str, str] = {}
    for out in (month.folder / "runs" / "night").iterdir():
        runs[read_summary(out)["run_id"]] = out.name
        for settled in pq.read_table(out / "completions.parquet", columns=["row", "status"]).to_pylist():
            status[out.name, settled["row"]] = settled["status"]
    last: dict[tuple[str, int], int] = {}
    exchanges: list[tuple[tuple[str, int], int, LedgerLine]] = []
    for _, line in month.billed:
        run, row, attempt = (line.client_request_id or "").rsplit("-", 2)
        request = runs[run.partition(".")[0]], int(row)
        exchanges.append((request, int(attempt), line))
        last[request] = max(int(attempt), last.get(request, 0))
    reasons: dict[str, list[LedgerLine]] = defaultdict(list)
    for request, n, line in exchanges:
        reasons[status[request] if n == last[request] else "discarded"].append(line)
    assert month.costs("status") == {name: usd(lines) for name, lines in reasons.items() if usd(lines)}
    counted = {line["status"]: line["rows"] for line in month.report("--by", "status")["lines"]}
    assert {name: number for name, number in counted.items() if number} == Counter(status.values())


def test_the_budget_of_a_month_is_the_ledgers(month: Month) -> None:
    with closing(sqlite3.connect(month.folder / "runs" / "budget.db")) as database:
        found = database.execute("SELECT period, spent_usd, in_doubt_usd FROM windows").fetchall()
    spent = {period: Decimal(usd) for period, usd, _ in found}
    expected = sums(month, lambda start, line: start.day) | sums(month, lambda start, line: start.day[:7])
    assert {period: amount for period, amount in spent.items() if amount} == expected
    assert {Decimal(doubt) for _, _, doubt in found} == {Decimal(0)}
    used_up = next(start for start in month.starts if start.exit_code == 4)
    assert usd(used_up.served) <= Decimal("0.002")


def test_every_end_of_a_month_reached_on_end(month: Month) -> None:
    ends = [int(line) for line in (month.folder / "ends").read_text().splitlines()]
    assert ends == [start.exit_code for start in month.starts]
    assert Counter(ends) == {0: NIGHTS, 4: 1, 5: 1}
    refused = next(start for start in month.starts if start.exit_code == 5)
    assert 0 < len(refused.served) <= 8
    assert usd(refused.served) == 0
