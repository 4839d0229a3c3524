"""The bill of many nights: real runs with retries, kills and unpriced rows, compared with the simulator's ledger and an
independent sum over the Parquet files.
"""

import json
import shutil
import signal
import time
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import openpyxl
import pyarrow.parquet as pq
import pytest

from batchrun.errors import JobError
from batchrun.records import PossiblyBilled
from batchrun.report import figures, keys
from batchrun.report.runs import FoundRun, find_runs
from batchrun.simulator import Fault, LedgerLine, SimulatorConfig, parse_faults
from tests.bills import bill_over
from tests.cli_process import batchrun, finish, kill_when, read_summary, start, write_job, write_rows
from tests.result_files import row, write_result
from tests.simulator_process import running_simulator

NIGHTS = [f"2026-11-{day:02d}" for day in range(1, 13)]
ROWS = 40
TABLES = """
[job]
tags = {{ team = "{team}" }}

[pricing."vtrix-gpt-5.3-codex"]
input = 1.25
output = 10

[output]
path = "{folder}/runs/{{job}}/{{date}}"
"""
PRICE = Decimal("1.25"), Decimal(10)
FAULTS = parse_faults("500=0.05,429=0.05,content_policy=0.03,billed_reset=0.02")


class Nights(msgspec.Struct, frozen=True):
    """Twelve runs, and what the simulator served."""

    folder: Path
    ledger: list[dict[str, Any]]


@pytest.fixture(scope="module")
def nights(tmp_path_factory: pytest.TempPathFactory) -> Nights:
    folder = tmp_path_factory.mktemp("nights")
    ledger = folder / "ledger.jsonl"
    source = write_rows(folder / "in.jsonl", ROWS)
    config = SimulatorConfig(latency_s=0.01, faults=FAULTS, ledger=str(ledger))
    with running_simulator(config) as simulator:
        for number, night in enumerate(NIGHTS):
            team = "search" if number % 2 else "ads"
            more = TABLES.format(team=team, folder=folder)
            job = write_job(folder / "night.toml", simulator.url, source, more)
            arguments: list[str | Path] = ["run", job, "--date", night]
            if number % 4 == 1:
                arguments += ["--set", "request.model=mystery-model"]
            if number % 3 == 2:
                slowly = "--set", "limits.requests_per_second=20"  # it must not end before it is killed
                process = start(*arguments, *slowly)
                out = folder / "runs" / "night" / night
                kill_when(process, lambda out=out: settled(out) > 5, signal.SIGKILL)
                finish(process)
            if night != NIGHTS[-1]:
                ended = batchrun(*arguments)
                assert ended.exit_code in (0, 3), ended.stderr
        (folder / "nothing-to-see").mkdir()
        served = [json.loads(line) for line in ledger.read_text().splitlines()]
    return Nights(folder, served)


def settled(out: Path) -> int:
    try:
        return sum(read_summary(out)["by_status"].values())
    except (OSError, ValueError):
        return 0


def report(nights: Nights, *arguments: str) -> dict[str, Any]:
    ended = batchrun("report", nights.folder / "runs", "--format", "json", *arguments)
    assert ended.exit_code == 0, ended.stderr
    reported: dict[str, Any] = json.loads(ended.stdout)
    return reported


# ── against the ledger, and against an independent sum over the files ─────────────────────────────────────────────────


def run_ids(nights: Nights) -> dict[str, str]:
    """Run id → night."""
    return {read_summary(out)["run_id"]: out.name for out in sorted((nights.folder / "runs" / "night").iterdir())}


def possibly_billed(nights: Nights) -> set[str | None]:
    """The ids of the requests whose cost no run knows; None for one that got none."""
    found = find_runs([nights.folder / "runs"]).found
    return {doubt.request_id for each in found for doubt in each.account.possibly_billed}


def known_to_the_ledger(nights: Nights) -> dict[str, list[dict[str, Any]]]:
    """By night, what the simulator billed, besides the attempts that the bill names as possibly billed."""
    doubts = possibly_billed(nights)
    by_night: dict[str, list[dict[str, Any]]] = {night: [] for night in NIGHTS}
    ids = run_ids(nights)
    for served in nights.ledger:
        if served["billed"] and not {served["client_request_id"], served["request_id"]} & doubts:
            by_night[ids[served["client_request_id"].partition("-")[0]]].append(served)
    return by_night


def lost(found: FoundRun) -> list[PossiblyBilled]:
    """The attempts in flight when a process of the run died."""
    return [doubt for doubt in found.account.possibly_billed if doubt.cause == "crash"]


def test_each_run_costs_what_the_ledger_billed(nights: Nights) -> None:
    served = known_to_the_ledger(nights)
    bill = report(nights, "--by", "night")
    assert [line["night"] for line in bill["lines"]] == NIGHTS
    for number, line in enumerate(bill["lines"]):
        entries = served[line["night"]]
        for name in ("prompt_tokens", "completion_tokens", "cached_tokens"):
            assert line[name] == sum(entry[name] for entry in entries), (line["night"], name)
        cost = sum(
            (Decimal(entry["prompt_tokens"]) * PRICE[0] + Decimal(entry["completion_tokens"]) * PRICE[1]) / 10**6
            for entry in entries
        )
        if number % 4 == 1:
            assert (line["cost_usd"], line["cost_per_1000_rows_usd"]) == (None, None)
            assert line["unpriced"] == len(entries)
        else:
            assert Decimal(line["cost_usd"]) == cost
    assert list(bill["unpriced"]) == ["mystery-model"]
    # the kill of the last night may come after a slot was taken and before the server has done the work
    listed = {doubt.request_id for found in find_runs([nights.folder / "runs"]).found for doubt in lost(found)}
    sent = {entry["client_request_id"] for entry in nights.ledger}
    assert bill["total"]["attempts"] == len(sent | listed)


def test_every_column_is_an_independent_sum(nights: Nights) -> None:
    """Each column of the bill is a sum that this test computes itself from the runs' files."""
    bill = report(nights, "--by", "run")
    by_run = {line["run"]: line for line in bill["lines"]}
    for out in sorted((nights.folder / "runs" / "night").iterdir()):
        summary = read_summary(out)
        if not summary["complete"]:
            continue
        line = by_run[summary["run_id"]]
        usage = pq.read_table(out / "usage.parquet").to_pylist()
        rows = pq.read_table(out / "completions.parquet").to_pylist()
        assert (line["runs"], line["complete"], line["pending"]) == (1, 1, 0)
        assert line["rows"] == len(rows) == ROWS
        assert line["ok"] == sum(row["status"] == "ok" for row in rows)
        assert line["attempts"] == sum(row["attempts"] for row in rows)
        assert line["attempts_per_row"] == round(sum(row["attempts"] for row in rows) / ROWS, 6)
        assert line["reused"] == sum(row["reused"] for row in rows) == 0
        for name in ("prompt_tokens", "completion_tokens", "total_tokens", "reasoning_tokens"):
            assert line[name] == sum(each[name] or 0 for each in usage)
        assert line["cache_write_tokens"] is None
        cost = sum((each["cost_usd"] for each in usage), Decimal(0))
        wasted = sum((each["cost_usd"] for each in usage if each["status"] == "discarded"), Decimal(0))
        assert Decimal(line["wasted_usd"]) == wasted
        if not line["unpriced"]:
            assert Decimal(line["cost_usd"]) == cost == sum((row["cost_usd"] for row in rows), Decimal(0))
            assert Decimal(line["cost_per_1000_rows_usd"]) == (cost * 1000 / ROWS).quantize(Decimal("1e-12"))
            assert Decimal(line["cost_per_ok_usd"]) == (cost / line["ok"]).quantize(Decimal("1e-12"))
            expected = Decimal(summary["estimate"]["expected_usd"])
            assert (Decimal(line["expected_usd"]), Decimal(line["compared_usd"])) == (expected, cost)
        latencies = sorted(row["latency_s"] for row in rows)
        for name, place in (("p50_latency_s", 19), ("p95_latency_s", 37), ("p99_latency_s", 39)):
            assert line[name] == pytest.approx(latencies[place], rel=0.011)
    for name in ("rows", "attempts", "prompt_tokens", "completion_tokens", "pending", "possibly_billed"):
        assert sum(line[name] for line in bill["lines"]) == bill["total"][name]


@pytest.mark.heavy
def test_every_grouping_has_the_same_sum(nights: Nights) -> None:
    """Whatever the bill is grouped by, the total is the same; tags come from the jobs."""
    total = report(nights)["total"]
    for by in (
        "night",
        "day",
        "month",
        "job",
        "model",
        "status",
        "tag",
        "tag.team",
        "run",
        "night,model,status,tag.team",
    ):
        bill = report(nights, "--by", by, "--tz", "Asia/Kathmandu")
        assert bill["total"] == total, by
        for name in ("rows", "ok", "attempts", "prompt_tokens", "unpriced"):
            assert sum(line[name] for line in bill["lines"]) == total[name], (by, name)
        assert sum(Decimal(line["cost_usd"] or 0) for line in bill["lines"]) == Decimal(total["cost_usd"])
    assert {line["tag.team"] for line in report(nights, "--by", "tag.team")["lines"]} == {"ads", "search"}
    assert [line["tag"] for line in report(nights, "--by", "tag")["lines"]] == ["team=ads", "team=search"]


def test_an_unfinished_run_shows_its_spending(nights: Nights) -> None:
    bill = report(nights, "--by", "night")
    last = bill["lines"][-1]
    assert (last["complete"], last["rows"] + last["pending"]) == (0, ROWS)
    assert bill["unfinished"] == [str(nights.folder / "runs" / "night" / NIGHTS[-1])]
    shown = batchrun("report", nights.folder / "runs").stdout
    assert f"not complete: {nights.folder}/runs/night/{NIGHTS[-1]}\n" in shown
    assert "latency: without 1 run whose rows can't be read\n" in shown


def test_a_workbook_holds_figures_as_exact_numbers(nights: Nights, tmp_path: Path) -> None:
    """The workbook has the bill's figures as numbers, to the last digit."""
    runs = nights.folder / "runs"
    assert batchrun("report", runs, "--by", "night", "-o", tmp_path / "bill.xlsx").exit_code == 0
    bill = report(nights, "--by", "night")
    book = openpyxl.load_workbook(tmp_path / "bill.xlsx")
    assert book.sheetnames == ["bill", "exact", "beyond the figures"]
    for sheet, exact in (("bill", False), ("exact", True)):
        header, *lines = list(book[sheet].values)
        for line, cells in zip([*bill["lines"], {"night": "total", **bill["total"]}], lines, strict=True):
            reported = dict(zip(header, cells, strict=True))
            for name, value in line.items():
                if name.endswith("_usd") and value is not None and not exact:
                    assert reported[str(name)] == pytest.approx(float(value), rel=1e-14)
                else:
                    assert reported[str(name)] == value or (value == 0 and reported[str(name)] == 0), name
    assert any("mystery-model" in str(cells[0]) for cells in book["beyond the figures"].values)


def killed_in_flight(folder: Path, *flags: str) -> tuple[list[LedgerLine], Path, Path]:
    """A run killed while billed requests of it are in flight: the ledger, the run, and its job without the server."""
    config = SimulatorConfig(faults=(Fault(kind="hang", billed=True, share=0.4),))
    with running_simulator(config) as simulator:
        job = write_job(folder / "job.toml", simulator.url, write_rows(folder / "in.jsonl", ROWS))
        process = start("run", job, "-o", (out := folder / "out"), *flags)
        kill_when(process, lambda: len(simulator.ledger()) == ROWS)
        finish(process)
        return simulator.ledger(), out, job


def test_a_killed_run_names_ids_in_flight(tmp_path: Path) -> None:
    """Before any resume, and when it is resumed by a job that sends no ids: those in flight were sent with theirs."""
    ledger, out, job = killed_in_flight(tmp_path)
    sent = {str(each.client_request_id) for each in ledger}
    hung = {str(each.client_request_id) for each in ledger if each.fault == "hang"}
    (found,) = find_runs([out]).found
    doubts = {doubt.request_id for doubt in found.account.possibly_billed}
    assert hung <= doubts <= sent
    lines = ["request_id,amount_usd", *(f"{each},0.001" for each in sorted(hung))]
    (tmp_path / "invoice.csv").write_text("\n".join(lines) + "\n")
    compared = batchrun("report", out, "--reconcile", tmp_path / "invoice.csv", "--format", "json")
    reconciled = json.loads(compared.stdout)
    assert (reconciled["doubtful"], reconciled["missing_here"]) == (len(hung), 0)
    with running_simulator() as simulator:
        write_job(job, simulator.url, tmp_path / "in.jsonl")
        resumed = batchrun("run", job, "-o", out, "--set", "endpoint.client_request_id=false")
    assert resumed.exit_code == 0, resumed.stderr
    assert {doubt["request_id"] for doubt in read_summary(out)["possibly_billed"]} == doubts


def test_a_killed_run_without_ids_names_none(tmp_path: Path) -> None:
    """An id that was not sent can't be looked up."""
    _, out, _ = killed_in_flight(tmp_path, "--set", "endpoint.client_request_id=false")
    (found,) = find_runs([out]).found
    assert {doubt.request_id for doubt in found.account.possibly_billed} == {None}


# ── whose days ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_rows_name_their_local_day_within_utc(nights: Nights) -> None:
    """The zone whose midnight lies within the run, found by its rows."""
    out = nights.folder / "runs" / "night" / NIGHTS[0]
    rows = pq.read_table(out / "completions.parquet").to_pylist()
    summary = read_summary(out)
    (found,) = find_runs([out]).found
    first = datetime(2026, 11, 28, tzinfo=UTC)
    # rows move to times around midnight in Tokyo: a run over it, made of this one
    moved = [row | {"finished_at": first.replace(hour=14 + number % 2, minute=30)} for number, row in enumerate(rows)]
    table = pq.read_table(out / "completions.parquet")
    copy = nights.folder / "moved"
    copy.mkdir(exist_ok=True)
    pq.write_table(table.from_pylist(moved, table.schema), copy / "completions.parquet")
    lines = [line | {"day": "2026-11-28"} for line in summary["totals"]]
    reported = summary | {"totals": lines, "created_at": "2026-11-28T14:00:00Z", "updated_at": "2026-11-28T16:00:00Z"}
    (copy / "summary.json").write_text(json.dumps(reported))
    bills = {line.group[0]: line for line in bill_over([copy], ("day",), keys.span("Asia/Tokyo", None, None)).lines}
    assert list(bills) == ["2026-11-28", "2026-11-28 or 2026-11-29", "2026-11-29"]
    for day, parity in (("2026-11-28", 0), ("2026-11-29", 1)):
        expected = [row for number, row in enumerate(rows) if number % 2 == parity]
        assert bills[day].rows == len(expected)
        assert bills[day].cost_usd == sum((row["answer_cost_usd"] or 0 for row in expected), Decimal(0))
    assert sum(line.cost_usd for line in bills.values()) == Decimal(summary["cost_usd"])
    assert sum(line.attempts for line in bills.values()) == sum(row["attempts"] for row in rows)
    assert bills["2026-11-28 or 2026-11-29"].rows == 0
    assert found.account.run_id == summary["run_id"]
    second = bill_over([copy], ("day",), keys.span("Asia/Tokyo", "2026-11-29", "2026-11-29")).total
    assert second.latencies is not None
    assert second.rows == sum(second.latencies.values()) == bills["2026-11-29"].rows
    shutil.rmtree(copy)


def test_a_date_range_bounds_the_money_counted(nights: Nights) -> None:
    """Money counts from the first day of a range to its last, both included."""
    today = datetime.now(UTC).date()
    month, now = (today - timedelta(days=1)).isoformat()[:7], today.isoformat()[:7]  # the runs may be of yesterday
    whole = report(nights)["total"]
    assert report(nights, "--since", month, "--until", now)["total"]["rows"] == whole["rows"]
    nothing = report(nights, "--until", "2020-01")
    assert (nothing["runs"], nothing["lines"], nothing["total"]["attempts"]) == (0, [], 0)


@pytest.mark.parametrize(
    "wrong",
    [
        ("Nowhere/Land", None, None),
        ("../etc/passwd", None, None),
        ("UTC", "yesterday", None),
        ("UTC", "2026-12", "2026-11"),
    ],
)
def test_an_invalid_date_range_is_refused(wrong: tuple[str, str | None, str | None]) -> None:
    with pytest.raises(JobError, match=r"^--"):
        keys.span(*wrong)
    assert keys.span("local", "2026-02", "2026-02").until is not None
    assert str(keys.span("UTC", "2028-02", "2028-02").until) == "2028-02-29"


# ── the invoice, and other prices ─────────────────────────────────────────────────────────────────────────────────────


def invoice(nights: Nights, path: Path) -> Decimal:
    """What the provider would bill for all that it served, by request; its sum."""
    doubts = possibly_billed(nights)
    lines, total = ["request_id,model,amount_usd"], Decimal(0)
    for served in nights.ledger:
        if served["billed"]:
            cost = (served["prompt_tokens"] * PRICE[0] + served["completion_tokens"] * PRICE[1]) / 10**6
            known_by = served["client_request_id"] if served["client_request_id"] in doubts else served["request_id"]
            lines.append(f"{known_by},m,{cost:f}")
            total += cost
    path.write_text("\n".join(lines) + "\n")
    return total


def test_an_invoice_is_reconciled_request_by_request(nights: Nights, tmp_path: Path) -> None:
    """An invoice by request is explained to the last cent."""
    total = invoice(nights, tmp_path / "invoice.csv")
    runs = nights.folder / "runs"
    complete = [out for out in sorted((runs / "night").iterdir()) if out.name != NIGHTS[-1]]
    arguments = ("--reconcile", tmp_path / "invoice.csv", "--format", "json")
    reported = json.loads(batchrun("report", *complete, *arguments).stdout)
    bill = json.loads(batchrun("report", *complete, "--format", "json").stdout)
    assert reported["by"] == "request"
    assert (reported["different"], reported["missing_there"]) == (0, 0)
    assert reported["unpriced"] == bill["unpriced"]["mystery-model"]
    assert Decimal(reported["here_usd"]) == Decimal(bill["total"]["cost_usd"])
    assert Decimal(reported["there_usd"]) == total
    ids = run_ids(nights)
    last = [
        each
        for each in nights.ledger
        if each["billed"] and ids[each["client_request_id"].partition("-")[0]] == NIGHTS[-1]
    ]
    assert reported["missing_here"] == len(last)
    assert reported["doubtful"] <= bill["possibly_billed"]
    shown = batchrun("report", *complete, "--reconcile", tmp_path / "invoice.csv").stdout
    assert f"missing here: {len(last):,}, $" in shown
    whole = json.loads(batchrun("report", runs, *arguments).stdout)
    assert whole["unread"] == [str(runs / "night" / NIGHTS[-1])]


def test_reconciliation_separates_prices_from_missing_lines(tmp_path: Path) -> None:
    """Other prices, lines that were lost and lines we don't know are said separately."""
    rows = [row(number, request_id=f"req_{number}") for number in range(10)]
    run = write_result(tmp_path / "run", rows)
    lines = [f"req_{number},{'0.003' if number == 4 else '$0.001'}" for number in range(1, 10)]
    (tmp_path / "invoice.csv").write_text(
        "\ufeffRequest ID,Amount (USD)\n" + "\n".join([*lines, 'stranger,"1,000.5"']) + "\n"
    )
    said = json.loads(batchrun("report", run, "--reconcile", tmp_path / "invoice.csv", "--format", "json").stdout)
    assert (said["matched"], said["different"], said["missing_here"], said["missing_there"]) == (
        8,
        1,
        1,
        1,
    )
    assert said["differences"] == [{"key": "req_4", "here_usd": "0.001000000000", "there_usd": "0.003"}]
    assert (said["only_there"], said["only_here"]) == (["stranger"], ["req_0"])
    assert (Decimal(said["missing_here_usd"]), Decimal(said["difference_usd"])) == (
        Decimal("1000.5"),
        Decimal("0.002"),
    )
    by_day = "date,model,cost\n2026-11-01T00:00:00Z,vtrix-gpt-5.3-codex,0.01\n2026-11-02,other,5\n"
    (tmp_path / "days.csv").write_text(by_day)
    said = json.loads(batchrun("report", run, "--reconcile", tmp_path / "days.csv", "--format", "json").stdout)
    assert (said["by"], said["matched"], said["only_there"]) == ("day and model", 1, ["2026-11-02 other"])
    for wrong in ("a,b\n1,2\n", "", "request_id,amount\nx,much\n", "request_id,amount\nx,nan\n"):
        (tmp_path / "wrong.csv").write_text(wrong)
        ended = batchrun("report", run, "--reconcile", tmp_path / "wrong.csv")
        assert (ended.exit_code, ended.stderr.count("\n")) == (2, 1)
        assert str(tmp_path / "wrong.csv") in ended.stderr


def test_repricing_equals_the_ledger_at_new_prices(nights: Nights, tmp_path: Path) -> None:
    (tmp_path / "prices.toml").write_text('[pricing."mystery-model"]\ninput = 2\noutput = 3\nper_request = 0.5\n')
    paid = report(nights, "--by", "model")
    said = report(nights, "--by", "model", "--reprice", str(tmp_path / "prices.toml"))
    (mystery, *_), (kept, *_) = (
        [line for line in said["lines"] if line["model"].startswith(m)] for m in ("mys", "vtr")
    )
    served = [each for night in NIGHTS[1::4] for each in known_to_the_ledger(nights)[night]]
    cost = sum((2 * each["prompt_tokens"] + 3 * each["completion_tokens"]) * Decimal("1e-6") for each in served)
    assert Decimal(mystery["cost_usd"]) == cost + Decimal("0.5") * len(served)
    assert kept["cost_usd"] == next(line["cost_usd"] for line in paid["lines"] if line["model"].startswith("vtr"))
    assert said["supposed"].endswith(f"; paid were ${Decimal(paid['total']['cost_usd']):,.6f}")
    assert said["unpriced"] == {}
    for wrong in ("", "[pricing.m]\ninput = 1\n", "x = ["):
        (tmp_path / "prices.toml").write_text(wrong)
        ended = batchrun("report", nights.folder / "runs", "--reprice", tmp_path / "prices.toml")
        assert (ended.exit_code, ended.stderr.count("\n")) == (2, 1)


def test_limit_share_is_of_the_tightest_limit(tmp_path: Path) -> None:
    """Only starts of at least a minute count."""

    def run(name: str, elapsed_s: float, used: tuple[int, int], allowed: tuple[int | None, int | None]) -> None:
        limits = {"requests_per_minute": allowed[0], "tokens_per_minute": allowed[1], "max_in_flight": 8}
        pace: dict[str, Any] = {"requests_per_minute": used[0], "tokens_per_minute": used[1]}
        write_result(tmp_path / name, [row(0)], elapsed_s=elapsed_s, limits=limits, **pace)

    run("long", 300.0, (50, 900), (100, 1000))  # 90 % of its tokens
    run("short", 100.0, (50, 0), (100, None))  # 50 % of its requests
    run("burst", 5.0, (900, 0), (100, None))
    run("free", 500.0, (900, 0), (None, None))
    by_run = {line.group[0]: line for line in bill_over([tmp_path], ("run",)).lines}
    shares = {name: figures.figure(line, "limit_share") for name, line in by_run.items()}
    assert shares == {"long": 0.9, "short": 0.5, "burst": None, "free": None}
    assert figures.figure(bill_over([tmp_path], ("job",)).lines[0], "limit_share") == 0.8  # of 400 seconds


def test_a_run_is_filed_under_its_date(tmp_path: Path) -> None:
    """The date is the run's own, whenever it started and ended."""
    started = "2026-11-02T23:30:00Z"
    places = ("2026-11-01", "2026-11-01-2", "nightly", "2026-12-01/reviews")
    for number, place in enumerate(places):
        write_result(tmp_path / place, [row(0)], run_id=str(number), created_at=started)
    reported = bill_over([tmp_path], ("night",), keys.span("Asia/Tokyo", None, None))
    assert {line.group: line.runs for line in reported.lines} == {
        ("2026-11-01",): 2,
        ("2026-11-03",): 1,
        ("2026-12-01",): 1,
    }


@pytest.mark.heavy
def test_a_thousand_runs_cost_twice_their_reading(tmp_path: Path) -> None:
    """At most, in CPU: pyarrow reads one column of each file in the other half. However fast the machine is."""
    first = write_result(tmp_path / "0", [row(number) for number in range(400)])
    summary = json.loads((first / "summary.json").read_text())
    for number in range(1, 1000):
        (folder := tmp_path / str(number)).mkdir()
        (folder / "completions.parquet").hardlink_to(first / "completions.parquet")
        (folder / "summary.json").write_text(json.dumps(summary | {"run_id": f"r{number}"}))
    began = time.process_time()  # of all threads: other tests share the machine
    reported = bill_over([tmp_path], ("night", "model"))
    collected = time.process_time()
    for number in range(200):
        pq.read_table(tmp_path / str(number) / "completions.parquet", columns=["latency_s"], partitioning=None)
    assert collected - began < 2 * 5 * (time.process_time() - collected)
    assert (reported.runs, reported.total.rows, reported.total.cost_usd) == (1000, 400_000, Decimal(400))
