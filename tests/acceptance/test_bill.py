"""The bill over runs, from the command line: an unknown price is never shown as free."""

import csv
import io
import json
from decimal import Decimal
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from batchrun.simulator import Fault, SimulatorConfig
from tests.cli_process import batchrun, read_summary, write_job, write_rows
from tests.simulator_process import running_simulator

UNKNOWN = ("--set", "request.model=mystery-model")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two complete runs of ten rows: `known` has a price, `unknown` has none."""
    folder = tmp_path_factory.mktemp("runs")
    source = write_rows(folder / "in.jsonl", 10)
    with running_simulator(SimulatorConfig()) as simulator:
        for name, more in (("known", ()), ("unknown", UNKNOWN)):
            job = write_job(folder / f"{name}.toml", simulator.url, source)
            ended = batchrun("run", job, "-o", folder / name, *more)
            assert ended.exit_code == 0, ended.stderr
            if more:
                assert "cost         unknown\n" in ended.stdout
                assert "no known price for 10 attempts: not included in any sum" in ended.stdout
    return folder


def test_unknown_price_is_null_in_every_row(runs: Path) -> None:
    """A cost without a price is null in every row and "unknown" in every bill, never zero."""
    assert pq.read_table(runs / "unknown" / "completions.parquet").column("cost_usd").null_count == 10
    assert "cost    unknown; no known price for 10 attempts" in batchrun("status", runs / "unknown").stdout
    table = batchrun("report", runs / "unknown", "--columns", "cost_usd,wasted_usd").stdout.splitlines()
    assert [line.split()[-2] for line in table[1:3]] == ["unknown", "unknown"]
    assert table[3] == "no known price for 10 attempts of mystery-model: not included in cost_usd"
    bill = json.loads(batchrun("report", runs / "unknown", "--format", "json").stdout)
    assert (bill["lines"][0]["cost_usd"], bill["total"]["cost_usd"], bill["total"]["unpriced"]) == (None, None, 10)
    (line,) = csv.DictReader(io.StringIO(batchrun("report", runs / "unknown", "--format", "csv").stdout))
    assert (line["cost_usd"], line["unpriced"]) == ("", "10")


def test_priced_rows_are_summed_beside_unpriced_ones(runs: Path) -> None:
    bill = json.loads(batchrun("report", runs, "--format", "json").stdout)
    spent = Decimal(read_summary(runs / "known")["cost_usd"])
    assert spent > 0
    assert {line["job"]: line["cost_usd"] and Decimal(line["cost_usd"]) for line in bill["lines"]} == {
        "known": spent,
        "unknown": None,
    }
    assert (Decimal(bill["total"]["cost_usd"]), bill["total"]["unpriced"], bill["total"]["rows"]) == (spent, 10, 20)


@pytest.mark.parametrize("form", ["csv", "json"])
def test_the_file_suffix_selects_the_format(runs: Path, tmp_path: Path, form: str) -> None:
    assert batchrun("report", runs, "-o", tmp_path / f"bill.{form}").exit_code == 0
    assert (tmp_path / f"bill.{form}").read_text() == batchrun("report", runs, "--format", form).stdout


def test_an_unwritable_bill_is_one_error_line(runs: Path) -> None:
    ended = batchrun("report", runs, "-o", runs / "nowhere" / "bill.csv")
    assert ended.exit_code == 2
    assert ended.stderr == f"Error: {runs}/nowhere/bill.csv: can't be written: No such file or directory\n"


def test_a_rest_without_price_has_no_cost(tmp_path: Path) -> None:
    """What is left of a run whose price is unknown is announced without a cost."""
    source, out = write_rows(tmp_path / "in.jsonl", 10), tmp_path / "out"
    with running_simulator(SimulatorConfig()) as simulator:
        job = write_job(tmp_path / "job.toml", simulator.url, source)
        pilot = batchrun("run", job, "-o", out, "--limit", "1", *UNKNOWN).stderr.splitlines()
        assert pilot[:2] == [
            "input: 10 rows in 1 file, read as columns",
            "only the first 1 row; run without --limit to send the rest",
        ]
        rest = batchrun("run", job, "-o", out, *UNKNOWN).stderr.splitlines()
        assert rest[:2] == [f"resuming {out}: 1 of 10 rows done", "9 rows to send"]


def test_unpriced_answers_are_not_summed_as_zero(tmp_path: Path) -> None:
    """Possibly billed attempts and answers without a price never add up to a sum of zero."""
    faults = (Fault(kind="reset", billed=True, match="item 3 "),)
    with running_simulator(SimulatorConfig(faults=faults)) as simulator:
        job = write_job(tmp_path / "job.toml", simulator.url, write_rows(tmp_path / "in.jsonl", 10))
        batchrun("run", job, "-o", tmp_path / "out", "--set", "request.model=mystery-model")
    assert read_summary(tmp_path / "out")["possibly_billed_count"]
    report = batchrun("report", tmp_path / "out").stdout
    assert "may have been billed, at an unknown price" in report
    assert "$0.000000" not in report
