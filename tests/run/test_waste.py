"""What was paid for answers that are not in the output is wasted, however they came to be replaced: each way, by the
simulator's ledger and by the rows themselves.
"""

import shutil
from collections import Counter
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

import msgspec
import pyarrow.parquet as pq
import pytest

from batchrun import prices
from batchrun.money import to_usd
from batchrun.price_list import lookup
from batchrun.records import Usage
from batchrun.simulator import Fault, SimulatorConfig
from batchrun.simulator.ledger import LedgerLine
from tests.bills import bill_over
from tests.cli_process import batchrun, kill_when, read_summary, start, write_job, write_rows
from tests.simulator_process import running_simulator

MODEL = "vtrix-gpt-5.3-codex"
OTHER = "gpt-5-mini"
ROWS = 40

JOB = """functions = [{ name = "label", parameters = { type = "object", required = ["a"] } }]
function_call = { name = "label" }
[retry]
backoff_base_s = 0.02
INVALID
[output]
chunk_rows = 3
"""
UNFIT: Literal["unfit_json"] = "unfit_json"
UNFIT_ROWS = tuple(Fault(kind=UNFIT, match=f"item {row} ") for row in (3, 14, 15, 30))
TEXT = ("--set", 'request.function_call="none"')
"""Many answers are longer than the tokens they get."""
REFUSING = (Fault(kind="status", status=400, message="no more"),)


class Night:
    """A run of 40 rows, started any number of times against simulators that share a ledger."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.out = folder / "out"
        self.ledger: list[LedgerLine] = []
        write_rows(folder / "in.jsonl", ROWS)

    def start(
        self, *more: str, faults: tuple[Fault, ...] = (), code: int = 0, invalid: int = 0, kill_after: int | None = None
    ) -> None:
        ledger = self.folder / "ledger"
        config = SimulatorConfig(faults=faults, ledger=str(ledger), latency_s=0.2 if kill_after else 0.01)
        with running_simulator(config) as simulator:
            job = self.folder / "job.toml"
            more_of_it = JOB.replace("INVALID", f"invalid = {invalid}" if invalid else "")
            write_job(job, simulator.url, self.folder / "in.jsonl", more_of_it)
            if kill_after is None:
                ended = batchrun("run", job, "-o", self.out, *more)
                assert ended.exit_code == code, ended.stderr
            else:
                before = len(simulator.ledger())
                process = start("run", job, "-o", self.out, *more)
                kill_when(process, lambda: len(simulator.ledger()) >= before + kill_after)
                process.communicate()
            self.ledger = simulator.ledger()

    def billed_usd(self) -> Decimal:
        """By the ledger. Both models have a price."""
        table = {model: lookup.resolve(model, {}, "2026-11-28", "http://127.0.0.1/v1") for model in (MODEL, OTHER)}
        total = Decimal(0)
        for line in self.ledger:
            if line.billed:
                known = line.prompt_tokens, line.completion_tokens, 0, line.cached_tokens
                total += to_usd(prices.cost(Usage(*known), table[MODEL]) or 0)
        return total


def retried(night: Night) -> None:
    night.start(faults=UNFIT_ROWS, code=3)
    night.start("--retry-failed")


def retried_in_vain(night: Night) -> None:
    """The truncated answers stay, since nothing came instead."""
    night.start(*TEXT)
    night.start("--retry-failed", "--status", "truncated", faults=REFUSING)


def retried_for_worse(night: Night) -> None:
    """The truncated answers stay; what came instead was paid for, and is in no row."""
    night.start(*TEXT)
    night.start("--retry-failed", "--status", "truncated", faults=(Fault(kind=UNFIT),))


def retried_and_refused(night: Night) -> None:
    """Failures replace failures: the invalid answers go."""
    night.start(faults=UNFIT_ROWS, code=3)
    night.start("--retry-failed", faults=REFUSING, code=3)


def retried_twice(night: Night) -> None:
    night.start(faults=UNFIT_ROWS, code=3)
    night.start("--retry-failed", faults=UNFIT_ROWS[:2], code=3)
    night.start("--retry-failed")


def retried_and_killed(night: Night) -> None:
    night.start(faults=(Fault(kind=UNFIT),), code=3)
    night.start("--retry-failed", kill_after=15)
    night.start()


def asked_again(night: Night) -> None:
    once = tuple(msgspec.structs.replace(fault, times=1) for fault in UNFIT_ROWS)
    night.start(faults=once, invalid=2)


def asked_again_in_vain(night: Night) -> None:
    """The invalid answer stays, since the server then refused: it was paid for, and it is in the output."""
    refused = tuple(Fault(kind="status", status=400, message="no more", match=fault.match) for fault in UNFIT_ROWS)
    once = tuple(msgspec.structs.replace(fault, times=1) for fault in UNFIT_ROWS)
    night.start(faults=(*once, *refused), invalid=2, code=3)


def asked_again_in_vain_then_retried(night: Night) -> None:
    asked_again_in_vain(night)
    night.start("--retry-failed")


def changed(night: Night) -> None:
    night.start(faults=UNFIT_ROWS, code=3)
    night.start("--set", "request.prompt=Tell: {{ text }}", "--accept-changes")


def changed_in_part(night: Night) -> None:
    """Rows are dropped, moved and new; an answer to a question that is gone is wasted, a moved one is not."""
    night.start(faults=UNFIT_ROWS, code=3)
    lines = (night.folder / "in.jsonl").read_text().splitlines()
    other = ['{"id": 90, "text": "item 90 ", "score": 0.5}', *lines[10:], *lines[2:4]]
    (night.folder / "in.jsonl").write_text("\n".join(other) + "\n")
    night.start("--accept-changes", code=3)
    night.start("--retry-failed")


def changed_while_retried(night: Night) -> None:
    night.start(faults=(Fault(kind=UNFIT),), code=3)
    night.start("--retry-failed", kill_after=12)
    lines = (night.folder / "in.jsonl").read_text().splitlines()
    (night.folder / "in.jsonl").write_text("\n".join(lines[5:]) + "\n")
    night.start("--accept-changes", code=3)


def salvaged(night: Night) -> None:
    night.start(faults=UNFIT_ROWS, code=3)
    night.start("--retry-failed")
    result = night.out / "completions.parquet"
    content = bytearray(result.read_bytes())
    content[len(content) // 3] ^= 1
    result.write_bytes(content)
    assert batchrun("verify", night.out, "--salvage").exit_code == 7
    shutil.rmtree(night.out)
    night.out.with_name("out.salvaged").rename(night.out)
    night.start()


WAYS: list[tuple[Callable[[Night], None], bool]] = [
    (retried, True),
    (retried_in_vain, False),
    (retried_for_worse, True),
    (retried_and_refused, True),
    (retried_twice, True),
    (retried_and_killed, True),
    (asked_again, True),
    (asked_again_in_vain, False),
    (asked_again_in_vain_then_retried, True),
    (changed, True),
    (changed_in_part, True),
    (changed_while_retried, True),
    (salvaged, True),
]


@pytest.mark.heavy
@pytest.mark.sampled(4)
@pytest.mark.parametrize(("way", "wasteful"), WAYS, ids=[way.__name__ for way, _ in WAYS])
def test_rejected_paid_answers_are_waste(tmp_path: Path, way: Callable[[Night], None], wasteful: bool) -> None:
    night = Night(tmp_path)
    way(night)
    rows = pq.read_table(night.out / "completions.parquet").to_pylist()
    summary = read_summary(night.out)
    cost, wasted = Decimal(summary["cost_usd"]), Decimal(summary["wasted_usd"])
    assert cost == sum(Decimal(line["cost_usd"]) for line in summary["totals"])
    if summary["possibly_billed_count"]:
        assert cost <= night.billed_usd() <= cost + Decimal(summary["possibly_billed_usd"])
    else:
        assert cost == night.billed_usd()
    assert wasted == cost - sum(row["answer_cost_usd"] for row in rows)
    assert (wasted > 0) == wasteful
    assert_lines_are_the_rows(rows, summary["totals"])
    assert summary["by_status"] == dict(Counter(row["status"] for row in rows))
    bill = bill_over([night.out], ("job",))
    assert (bill.total.cost_usd, bill.total.wasted_usd, bill.total.rows) == (cost, wasted, len(rows))
    assert pq.read_table(night.out / "usage.parquet").num_rows == len(summary["totals"])
    ended = batchrun("verify", night.out)
    assert ended.exit_code == 0, ended.stdout


@pytest.mark.heavy
def test_a_resumed_salvage_is_the_newest_copy(tmp_path: Path) -> None:
    """It has the whole bill."""
    night = Night(tmp_path)
    night.start(faults=UNFIT_ROWS, code=3)
    content = bytearray((night.out / "checkpoint.db").read_bytes())
    content[3] ^= 1
    (night.out / "checkpoint.db").write_bytes(content)
    lost = bytearray((night.out / "completions.parquet").read_bytes())
    lost[len(lost) // 3] ^= 1
    (night.out / "completions.parquet").write_bytes(lost)
    assert batchrun("verify", night.out, "--salvage").exit_code == 7
    damaged, night.out = night.out, night.out.with_name("out.salvaged")
    before = bill_over([tmp_path], ("job",))
    assert [each.why for each in before.left_out] == ["salvaged and not resumed yet; the damaged run has the bill"]
    night.start(faults=UNFIT_ROWS, code=3)
    for paths in ([tmp_path], [damaged, night.out], [night.out, damaged]):
        bill = bill_over(paths, ("job",))
        assert (bill.runs, bill.total.rows, bill.total.cost_usd) == (1, ROWS, night.billed_usd())
        assert bill.total.wasted_usd == bill.total.cost_usd - kept_usd(night.out)
        assert [each.path for each in bill.left_out] == [str(damaged)]


def kept_usd(out: Path) -> Decimal:
    """What the answers in the output cost."""
    rows: list[dict[str, Decimal]] = pq.read_table(out / "completions.parquet", columns=["answer_cost_usd"]).to_pylist()
    return sum((row["answer_cost_usd"] for row in rows), Decimal(0))


def assert_lines_are_the_rows(rows: list[dict[str, Any]], lines: list[dict[str, Any]]) -> None:
    """Each line but those of discarded and lost attempts is the sum of the rows that it counts."""
    counted: Counter[tuple[object, ...]] = Counter()
    cost: Counter[tuple[object, ...]] = Counter()
    tokens: Counter[tuple[object, ...]] = Counter()
    for row in rows:
        day = row["finished_at"].date().isoformat()
        key = row["invocation"], row["requested_model"], row["status"], day
        counted[key] += 1
        cost[key] += row["answer_cost_usd"]
        tokens[key] += row["total_tokens"] or 0
    standing = [line for line in lines if line["status"] not in ("discarded", "lost")]
    keys = [(line["invocation"], line["model"], line["status"], line["day"]) for line in standing]
    assert dict(zip(keys, (line["rows"] for line in standing), strict=True)) == counted
    assert dict(zip(keys, (line["attempts"] for line in standing), strict=True)) == counted
    assert dict(zip(keys, (Decimal(line["cost_usd"]) for line in standing), strict=True)) == cost
    assert dict(zip(keys, (line["total_tokens"] for line in standing), strict=True)) == tokens
    assert all(line["attempts"] > 0 and Decimal(line["cost_usd"]) >= 0 for line in lines)


@pytest.mark.heavy
def test_retried_models_are_billed_separately(tmp_path: Path) -> None:
    night = Night(tmp_path)
    night.start(faults=UNFIT_ROWS, code=3)
    first = Decimal(read_summary(night.out)["cost_usd"])
    night.start("--retry-failed", "--set", f"request.model={OTHER}", faults=UNFIT_ROWS[:1], code=3)
    summary = read_summary(night.out)
    second = Decimal(summary["cost_usd"]) - first
    rows = pq.read_table(night.out / "completions.parquet").to_pylist()
    assert Counter(row["requested_model"] for row in rows) == {MODEL: ROWS - 4, OTHER: 4}
    lines = {line.group[0]: line for line in bill_over([night.out], ("model",)).lines}
    assert {model: line.rows for model, line in lines.items()} == {MODEL: ROWS - 4, OTHER: 4}
    assert {model: line.cost_usd for model, line in lines.items()} == {MODEL: first, OTHER: second}
    assert {model: line.attempts for model, line in lines.items()} == {MODEL: ROWS, OTHER: 4}
    kept = sum(row["answer_cost_usd"] for row in rows if row["requested_model"] == MODEL)
    assert lines[MODEL].wasted_usd == first - kept > 0
    assert lines[OTHER].wasted_usd == 0
    by_both = {line.group: line.rows for line in bill_over([night.out], ("model", "status")).lines if line.rows}
    assert by_both == Counter((row["requested_model"], row["status"]) for row in rows)
    assert_lines_are_the_rows(rows, summary["totals"])
