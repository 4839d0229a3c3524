"""The bill over many runs: each run once, its newest copy, whatever the order of paths; every form says the same."""

import csv
import io
import json
import random
import shutil
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchrun.errors import InputError
from batchrun.records import Ending
from batchrun.report import bill as report
from batchrun.report import formats
from batchrun.report.figures import SUMS, kind
from batchrun.report.summary import VERSION
from batchrun.run_summary import TotalsLine
from batchrun.simulator import SimulatorConfig
from batchrun.store.checkpoint import Checkpoint
from batchrun.store.totals import DISCARDED, FIGURES, plus
from tests import level
from tests.bills import bill_over
from tests.cli_process import batchrun, read_summary, write_job, write_rows
from tests.endings import completion, discarded
from tests.money import pico
from tests.simulator_process import running_simulator

NOON = datetime(2026, 11, 28, 12, tzinfo=UTC)

LINES = st.builds(
    TotalsLine,
    invocation=st.integers(1, 3),
    model=st.sampled_from(["m", "another", "модель | `x`"]),
    status=st.sampled_from(["ok", "invalid", DISCARDED]),
    day=st.sampled_from(["2026-11-27", "2026-11-28", ""]),
    cost_usd=st.decimals(0, 1000, places=12),
    **{name: st.integers(0, 10**9) for name in FIGURES if name != "cost_usd"},
)


def summary_of(run_id: str, job: str, lines: Sequence[TotalsLine], invocation: int, minutes: int) -> dict[str, Any]:
    """What summary.json has of a run, as far as a bill reads it."""
    return {
        "version": VERSION,
        "job": job,
        "run_id": run_id,
        "invocation": invocation,
        "updated_at": (NOON + timedelta(minutes=minutes)).isoformat(),
        "complete": True,
        "totals": [msgspec.to_builtins(line) for line in lines],
        "possibly_billed_count": len(lines),
        "possibly_billed_usd": "0.5",
    }


def write_summary(directory: Path, summary: dict[str, Any]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "summary.json").write_bytes(msgspec.json.encode(summary))
    return directory


RUNS = st.lists(
    st.tuples(
        st.lists(LINES, max_size=6, unique_by=lambda line: line.key),  # the newest copy's ledger
        st.lists(st.tuples(st.integers(1, 3), st.integers(0, 3)), min_size=1, max_size=4),  # when copies were written
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=level.amount(10, 60))
@given(RUNS, st.sampled_from([("day",), ("job", "model"), ("status", "run")]), st.randoms(use_true_random=False))
def test_the_bill_ignores_path_order_and_copies(
    tmp_path_factory: pytest.TempPathFactory, runs: list[Any], by: tuple[str, ...], order: random.Random
) -> None:
    """It is the sum of the newest account of each run."""
    folder = tmp_path_factory.mktemp("runs")
    places, ledgers = [], []
    for number, (lines, copies) in enumerate(runs):
        newest = max(copies)
        for place, written in enumerate(copies):
            kept = lines if written == newest else lines[: len(lines) // 2]
            summary = summary_of(f"run{number}", f"job{number % 2}", kept, *written)
            places.append(write_summary(folder / f"{number}-{place}", summary))
        ledgers += lines
    bills = []
    for _ in range(3):
        order.shuffle(places)
        bills.append(bill_over([*places, *order.sample(places, 1)], by))
    assert bills[0] == bills[1] == bills[2] == bill_over([folder], by)
    total = TotalsLine(0, "", "")
    for line in ledgers:
        total = plus(total, line)
    bill = bills[0]
    assert {name: getattr(bill.total, name) for name in FIGURES if hasattr(bill.total, name)} == {
        name: getattr(total, name) for name in FIGURES if hasattr(bill.total, name)
    }
    assert bill.total.wasted_usd == sum((line.cost_usd for line in ledgers if line.status == DISCARDED), Decimal(0))
    for name in SUMS:
        known = [value for line in bill.lines if (value := getattr(line, name)) is not None]
        if known and name not in ("runs", "reused"):
            assert sum(known) == getattr(bill.total, name), name
    assert bill.runs == len(runs)
    assert len(bill.left_out) == len(places) - len(runs)
    assert {each.why.partition(",")[0] for each in bill.left_out} <= {f"a copy of run run{n}" for n in range(len(runs))}
    assert_every_form_says_the_same(bill)


def assert_every_form_says_the_same(bill: report.Bill) -> None:
    reported = json.loads(formats.render(bill, "json"))
    lines = list(csv.DictReader(io.StringIO(formats.render(bill, "csv").decode())))
    table = pq.read_table(io.BytesIO(formats.render(bill, "parquet")))
    for in_json, in_csv, in_parquet in zip(reported["lines"], lines, table.to_pylist(), strict=True):
        for name, value in in_json.items():
            exact = Decimal(value) if kind(name) == "usd" and value is not None else value
            assert in_parquet[name] == exact
            assert in_csv[name].removeprefix("'") == ("" if value is None else str(value))
    rest = json.loads(table.schema.metadata[b"batchrun"])
    assert rest == {name: value for name, value in reported.items() if name != "lines"}
    shown = formats.render(bill, "table").decode().splitlines()
    page = formats.render(bill, "markdown").decode().splitlines()
    body = [line for line in page if line.startswith("|")]
    assert len(body) == len(bill.lines) + 3  # the header, the rule and the sum
    assert [line.split()[-1] for line in shown[1 : len(bill.lines) + 2]] == [
        line.split("|")[-2].strip().replace("\\", "") for line in body[2:]
    ]
    remarks = len([line for line in page if line.startswith("- ")])
    assert remarks == len(shown) - len(bill.lines) - 2 >= len(bill.left_out)


@pytest.mark.heavy
def test_the_newest_of_two_copies_counts(tmp_path: Path) -> None:
    """The other copy is named."""
    source, out = write_rows(tmp_path / "in.jsonl", 20), tmp_path / "out"
    with running_simulator(SimulatorConfig()) as simulator:
        job = write_job(tmp_path / "job.toml", simulator.url, source)
        assert batchrun("run", job, "-o", out, "--limit", "5").exit_code == 0
        shutil.copytree(out, copy := tmp_path / "copy")
        shutil.copyfile(out / "completions.parquet", moved := tmp_path / "moved.parquet")
        assert batchrun("run", job, "-o", out).exit_code == 0
        cost = Decimal(read_summary(out)["cost_usd"])
        for paths in ((out, copy, moved), (moved, out, copy), (copy, moved, out), (tmp_path, moved)):
            bill = json.loads(batchrun("report", *paths, "--format", "json").stdout)
            assert (bill["runs"], bill["total"]["rows"], Decimal(bill["total"]["cost_usd"])) == (1, 20, cost)
            assert [(each["path"], each["why"].split(" counted as ")[1]) for each in bill["left_out"]] == [
                (str(copy), str(out)),
                (str(moved), str(out)),
            ]
        assert f"left out: {copy}: a copy of run " in batchrun("report", copy, out).stdout
        assert batchrun("run", job, "-o", copy).exit_code == 0  # resumed by itself: real money that no one bill holds
    reported = batchrun("report", copy, out).stdout
    own = Decimal(read_summary(copy)["cost_usd"]) - Decimal(read_summary(out)["cost_usd"])
    assert abs(own) < cost
    assert "left out: " in reported


def test_a_forked_copy_is_reported_as_uncounted(tmp_path: Path) -> None:
    """A copy that was resumed by itself has spent money that no figure holds; the report says so."""
    first, cost = TotalsLine(1, "m", "ok", "2026-11-27", rows=5, attempts=5, cost_usd=Decimal(1)), Decimal("0.25")
    here = [first, TotalsLine(3, "m", "ok", "2026-11-28", rows=9, attempts=9, cost_usd=Decimal(2))]
    there = [first, TotalsLine(2, "m", "ok", "2026-11-28", rows=1, attempts=1, cost_usd=cost)]
    newest = write_summary(tmp_path / "a", summary_of("r", "job", here, 3, 0))
    other = write_summary(tmp_path / "b", summary_of("r", "job", there, 2, 5))
    for paths in ([newest, other], [other, newest]):
        bill = bill_over(paths, ("job",))
        assert bill.total.cost_usd == 3
        (left_out,) = bill.left_out
        assert left_out.path == str(other)
        assert left_out.why.endswith("but resumed separately: no figure includes at least $0.250000 of it")


@pytest.mark.parametrize("ending", [".pdf", ".parq", ".jsonl", ""])
def test_an_unknown_suffix_is_refused_before_reading(tmp_path: Path, ending: str) -> None:
    ended = batchrun("report", tmp_path / "nowhere", "-o", target := tmp_path / f"bill{ending}")
    known = ".txt, .md, .csv, .json, .parquet, .xlsx, .html"
    assert (ended.exit_code, ended.stdout) == (2, "")
    assert ended.stderr == (f"Error: -o {target}: unknown suffix; expected one of {known}, or --format\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.heavy
def test_a_bill_never_overwrites_its_sources(tmp_path: Path) -> None:
    run = write_summary(tmp_path / "run", summary_of("r", "job", [], 1, 0))
    (run / "checkpoint.db").touch()
    (run / "completions.parquet").touch()
    (run / "usage.parquet").touch()
    for target in ("summary.json", "completions.parquet", "usage.parquet"):
        ended = batchrun("report", run, "-o", run / target)
        assert ended.exit_code == 2
        assert ended.stderr == f"Error: -o {run / target}: the bill is made from this file; name another\n"
    assert (run / "completions.parquet").stat().st_size == 0
    assert batchrun("report", run, "-o", run / "bill.csv").exit_code == 0
    for wrong in (("--format", "json", "-o", tmp_path / "b.csv"), ("--format", "parquet"), ("--by", "job,job")):
        assert batchrun("report", run, *wrong).exit_code == 2


# ── what lies under the paths ─────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_not_a_run_is_named(tmp_path: Path) -> None:
    """In a folder it is named; given by name it is refused."""
    write_summary(tmp_path / "runs" / "night", summary_of("r", "job", [], 1, 0))
    for name, content in {
        "coverage": '{"totals": {"percent": 93}}',
        "list": "[1, 2]",
        "torn": '{"a',
        "empty": "",
    }.items():
        (folder := tmp_path / "runs" / name).mkdir()
        (folder / "summary.json").write_text(content)
    (tmp_path / "runs" / "summary.json").write_text("{}")
    bill = bill_over([tmp_path / "runs"], ("job",))
    assert bill.runs == 1
    assert [Path(each.path).name for each in bill.left_out] == ["runs", "coverage", "empty", "list", "torn"]
    assert {each.why for each in bill.left_out} == {"its summary.json is not batchrun's"}
    for path in (tmp_path / "runs" / "list", tmp_path / "runs" / "torn" / "summary.json", tmp_path / "nowhere"):
        with pytest.raises(InputError, match=str(path)):
            bill_over([path], ("job",))


def test_a_file_without_a_bill_is_refused(tmp_path: Path) -> None:
    run = write_summary(tmp_path / "run", summary_of("r", "job", [], 1, 0))
    (run / "checkpoint.db").touch()
    pq.write_table(pa.table({"a": [1]}), run / "usage.parquet")
    with pytest.raises(InputError, match=f"no bill in its footer; name {run} or a completions.parquet"):
        bill_over([run / "usage.parquet"], ("job",))
    (text := tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(InputError, match=f"{text}: can't be read as Parquet"):
        bill_over([text], ("job",))


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "half": (lambda content: content[: len(content) // 2], "damaged: "),
    "empty": (lambda content: b"", "damaged: "),
    "bytes": (lambda content: b"\xff\xfe" + content, "damaged: "),
    "newer": (lambda content: content.replace(b'"version":%d' % VERSION, b'"version":99'), "schema 99, this one reads"),
    "older": (lambda content: content.replace(b'"version":%d' % VERSION, b'"version":1'), "schema 1, this one reads"),
    "money": (lambda content: content.replace(b'"0.5"', b'"much"'), "damaged: "),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("damage", DAMAGES)
def test_an_unreadable_run_is_never_left_out(tmp_path: Path, damage: str) -> None:
    """A sum that would miss one of our runs is an error."""
    write_summary(tmp_path / "sound", summary_of("r", "job", [], 1, 0))
    run = write_summary(tmp_path / "unsound", summary_of("s", "job", [], 1, 0))
    (run / "checkpoint.db").touch()
    change, why = DAMAGES[damage]
    (run / "summary.json").write_bytes(change((run / "summary.json").read_bytes()))
    for path in (tmp_path, run):
        ended = batchrun("report", path)
        assert (ended.exit_code, ended.stdout) == (2, "")
        assert ended.stderr.startswith(f"Error: {run}/summary.json: ")
        assert why in ended.stderr
        assert ended.stderr.count("\n") == 1
    (run / "summary.json").unlink()
    assert f"{run}/summary.json is missing" in batchrun("report", tmp_path).stderr
    (run / "salvaged.parquet").touch()
    bill = bill_over([tmp_path], ("job",))
    assert (bill.runs, [each.path for each in bill.left_out]) == (1, [str(run)])


def test_runs_behind_links_count_once(tmp_path: Path) -> None:
    archive = write_summary(tmp_path / "archive" / "night", summary_of("r", "job", [], 1, 0)).parent
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "2026-10").symlink_to(archive)
    (tmp_path / "runs" / "latest").symlink_to(archive / "night")
    (archive / "again").symlink_to(tmp_path / "runs")
    bill = bill_over([tmp_path / "runs", archive], ("job",))
    assert (bill.runs, bill.left_out) == (1, ())


# ── money on the day it was spent ─────────────────────────────────────────────────────────────────────────────────────

MIDNIGHT = 1_795_824_000.0  # 2026-11-28, UTC


def test_money_is_booked_on_the_day_spent(tmp_path: Path) -> None:
    """The real checkpoint, with endings whose time is made: two starts, the first of them over midnight."""
    starts: list[list[Ending]] = [
        [discarded(0, at=MIDNIGHT - 9.0, cost_pico_usd=pico(1)), completion(0, finished_at=MIDNIGHT - 0.5, attempts=2)],
        [completion(1, finished_at=MIDNIGHT), completion(2, finished_at=MIDNIGHT + 86_400 * 3)],
    ]
    for endings in starts:
        checkpoint = Checkpoint(tmp_path / "checkpoint.db", free_reserve=lambda: False)
        checkpoint.start_invocation(0.0, 1, "here", "0")
        for ending in endings:
            checkpoint.put(ending)
        assert checkpoint.flushed()
        lines = checkpoint.totals.lines()
        checkpoint.close()
    run = write_summary(tmp_path / "run", summary_of("r", "job", lines, 2, 0))
    each = Decimal("0.0000455")
    by_day = {line.group[0]: line for line in bill_over([run], ("day",)).lines}
    assert {day: line.cost_usd for day, line in by_day.items()} == {
        "2026-11-27": 1 + each,
        "2026-11-28": each,
        "2026-12-01": each,
    }
    assert by_day["2026-11-27"].wasted_usd == 1
    assert {day: line.rows for day, line in by_day.items()} == {"2026-11-27": 1, "2026-11-28": 1, "2026-12-01": 1}


def test_booked_lines_carry_their_rows_day(tmp_path: Path) -> None:
    source, out = write_rows(tmp_path / "in.jsonl", 10), tmp_path / "out"
    with running_simulator(SimulatorConfig()) as simulator:
        job = write_job(tmp_path / "job.toml", simulator.url, source)
        assert batchrun("run", job, "-o", out).exit_code == 0
    rows = pq.read_table(out / "completions.parquet", columns=["finished_at", "cost_usd"]).to_pylist()
    expected: dict[str, Decimal] = {}
    for row in rows:
        day = row["finished_at"].date().isoformat()
        expected[day] = expected.get(day, Decimal(0)) + row["cost_usd"]
    bill = bill_over([out], ("day",))
    assert {line.group[0]: line.cost_usd for line in bill.lines} == expected
    usage = pq.read_table(out / "usage.parquet").to_pylist()
    assert {row["day"].isoformat() for row in usage} == set(expected)


# ── what was expected ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.heavy
def test_the_estimate_is_shown_beside_the_cost(tmp_path: Path) -> None:
    source, out = write_rows(tmp_path / "in.jsonl", 40), tmp_path / "out"
    with running_simulator(SimulatorConfig()) as simulator:
        job = write_job(tmp_path / "job.toml", simulator.url, source)
        reported = batchrun("estimate", job).stdout
        pilot = batchrun("run", job, "-o", out, "--limit", "10")
        assert msgspec.convert(read_summary(out)["estimate"], dict[str, Any])["rows"] == 10
        ended = batchrun("run", job, "-o", out)
    expected = Decimal(read_summary(out)["estimate"]["expected_usd"])
    assert f"about ${expected:,.4f}; " in reported
    assert "the list price of OpenAI for gpt-5.3-codex, not the endpoint's own, by " in reported
    assert f"estimate     ${expected / 4:,.6f} for 10 rows; the cost is " in pilot.stdout
    off = Decimal(read_summary(out)["cost_usd"]) / expected - 1
    words = f"{abs(off) * 100:.0f} % {'above' if off >= 0 else 'below'} that"
    assert f"estimate     ${expected:,.6f} for 40 rows; the cost is {words}\n" in ended.stdout
    assert f"estimate ${expected:,.6f} for 40 rows; the cost is {words}\n" in batchrun("status", out).stdout
    bill = json.loads(batchrun("report", out, "--format", "json").stdout)
    assert (bill["estimated"]["runs"], Decimal(bill["estimated"]["expected_usd"])) == (1, expected)
    assert Decimal(bill["estimated"]["cost_usd"]) == Decimal(read_summary(out)["cost_usd"])
    assert batchrun("verify", out).exit_code == 0


def test_an_estimate_uses_the_newest_runs_means(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", 60)
    runs = f'[output]\npath = "{tmp_path}/runs/{{job}}/{{date}}"\n'
    with running_simulator(SimulatorConfig()) as simulator:
        job = write_job(tmp_path / "job.toml", simulator.url, source, runs)
        for date in ("2026-11-25", "2026-11-26"):
            ended = batchrun("run", job, "--date", date)
            assert ended.exit_code == 0, ended.stderr
        assert "; the cost is as estimated\n" in ended.stdout
        last = read_summary(tmp_path / "runs" / "job" / "2026-11-26")
        assert "of the newest run, " in last["estimate"]["basis"]
        assert "2026-11-25" in last["estimate"]["basis"]
        write_rows(tmp_path / "in.jsonl", 120)
        reported = batchrun("estimate", job).stdout
        expensive = '[pricing."vtrix-gpt-5.3-codex"]\ninput = 1000\noutput = 1000\n'
        write_job(job, simulator.url, source, runs + expensive)
        dear = batchrun("estimate", job).stdout
    prompt, answer = (
        sum(line[name] for line in last["totals"]) / 60 for name in ("prompt_tokens", "completion_tokens")
    )
    cost = Decimal(last["cost_usd"])
    assert (
        f"about {round(prompt * 120):,} in, {round(answer * 120):,} out (the mean of 60 answers of the newest"
        in reported
    )
    assert f"{tmp_path}/runs/job/2026-11-26" in reported
    assert f"about ${cost * 2:,.4f}; " in reported
    assert f"${cost / 60:,.6f} a row" in reported
    assert "s an answer)" in reported
    expected = Decimal(dear.split("about $")[1].split(";")[0].replace(",", ""))
    assert abs(expected - Decimal(prompt + answer) * 120 / 1000) < 1  # another price: by tokens
