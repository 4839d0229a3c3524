"""The promises, held by real processes: the command line against the simulator, whose ledger is the only oracle."""

import base64
import json
import re
import resource
import shutil
import signal
import urllib.parse
from collections import Counter
from datetime import timedelta
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from batchrun.limits.run_verdicts import REFUSED_IN_A_ROW
from batchrun.money import to_usd
from batchrun.prices import PriceTable, Tier, cost
from batchrun.records import Usage
from batchrun.simulator import Fault, LedgerLine, SimulatorConfig, parse_faults, read_ledger
from batchrun.store import in_flight
from tests.cli_process import (
    KEY,
    batchrun,
    finish,
    holds_key,
    kill_when,
    read_summary,
    snapshot,
    start,
    wait_until,
    write_job,
    write_rows,
)
from tests.fault_server import Exchange, answer, echo_key, serving_aside
from tests.simulator_process import running_simulator

SAME = ["id", "text", "score", "row", "request_key", "status", "content", "finish_reason"]
"""The columns in which a disturbed run equals an undisturbed one."""

CHUNKS_OF_300 = "[output]\nchunk_rows = 300\n"

LIST_PRICE = PriceTable(
    "vtrix-gpt-5.3-codex", (Tier(0, Decimal("1.75"), Decimal("0.175"), Decimal("14")),), "test", "2026-01-01"
)


def completions(out: Path, columns: list[str] | None = None) -> pa.Table:
    return pq.read_table(out / "completions.parquet", columns=columns, page_checksum_verification=True)


def billed_usd(ledger: list[LedgerLine]) -> Decimal:
    """What the simulator would invoice: its own tokens at the list price, exchange by exchange."""
    total = Decimal(0)
    for line in ledger:
        if line.billed:
            usage = Usage(
                line.prompt_tokens,
                line.completion_tokens,
                line.prompt_tokens + line.completion_tokens,
                line.cached_tokens,
                line.reasoning_tokens,
            )
            total += to_usd(cost(usage, LIST_PRICE) or 0)
    return total


def settled(out: Path) -> int:
    """Rows that are durable, as summary.json (at most five seconds old) and the sealed parts tell."""
    try:
        summary = read_summary(out)
    except (FileNotFoundError, json.JSONDecodeError):
        return 0
    return int(summary["rows"]) - int(summary["pending"])


@pytest.mark.heavy
def test_jsonl_and_parquet_give_the_same_answers(tmp_path: Path) -> None:
    """The same questions are sent from both and the same answers come back."""
    source = write_rows(tmp_path / "in.jsonl", 2000)
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet", row_group_size=700)
    questions, tables = [], []
    for name in ("in.jsonl", "in.parquet"):
        with running_simulator(SimulatorConfig(ledger=str(tmp_path / f"{name}.ledger"))) as simulator:
            job = write_job(tmp_path / "job.toml", simulator.url, tmp_path / name)
            out = tmp_path / f"out-{name}"
            ended = batchrun("run", job, "-o", out)
            assert ended.exit_code == 0, ended.stderr
            questions.append(sorted(line.question for line in simulator.ledger()))
            tables.append(completions(out, SAME))
    assert len(questions[0]) == 2000
    assert questions[0] == questions[1]
    assert tables[0].equals(tables[1])
    assert tables[0].column("row").to_pylist() == list(range(2000))


@pytest.mark.heavy
def test_killed_twice_only_requests_in_flight_repeat(tmp_path: Path) -> None:
    """Nothing is lost, and only what was in flight is sent again."""
    source = write_rows(tmp_path / "in.jsonl", 2000)
    faults = (
        Fault(kind="status", status=500, share=0.03, times=1, per_question=True),
        Fault(kind="cut", share=0.02, times=1, per_question=True),
        *parse_faults("content_policy=0.02"),
    )
    config = SimulatorConfig(latency_s=0.05, faults=faults, ledger=str(tmp_path / "ledger"))
    with running_simulator(config) as simulator:
        job = write_job(tmp_path / "job.toml", simulator.url, source, CHUNKS_OF_300)
        out = tmp_path / "out"
        for served_before_kill in (500, 1300):
            process = start("run", job, "-o", out)
            kill_when(process, lambda: len(simulator.ledger()) >= served_before_kill)  # noqa: B023
            process.communicate()
        parts = {path.name for path in (out / "parts").iterdir()}
        assert any(name.endswith(".parquet") for name in parts), "the kills came before the first seal"
        ended = batchrun("run", job, "-o", out)
        assert ended.exit_code == 0, ended.stderr
        assert " in flight when the last process died; they are sent again\n" in ended.stderr
        ledger = simulator.ledger()
    summary = read_summary(out)
    undisturbed = undisturbed_run(tmp_path, source, faults)

    assert completions(out, SAME).equals(undisturbed)
    retries = sum(line["attempts"] for line in summary["totals"] if line["status"] == "discarded")
    lost = [entry for entry in summary["possibly_billed"] if entry["cause"] == "crash"]
    assert len(lost) <= 2 * 64
    assert len(ledger) <= 2000 + retries + len(lost)
    named = {(entry["row"], entry["n"]) for entry in lost}
    answered_twice = repeated_answers(ledger, summary["run_id"])
    assert answered_twice <= named, "an answer was paid for twice without being named"
    billed = billed_usd(ledger)
    assert (
        Decimal(summary["cost_usd"]) <= billed <= Decimal(summary["cost_usd"]) + Decimal(summary["possibly_billed_usd"])
    )


def undisturbed_run(tmp_path: Path, source: Path, faults: tuple[Fault, ...]) -> pa.Table:
    with running_simulator(SimulatorConfig(faults=faults)) as simulator:
        job = write_job(tmp_path / "calm.toml", simulator.url, source)
        ended = batchrun("run", job, "-o", tmp_path / "calm")
        assert ended.exit_code == 0, ended.stderr
    return completions(tmp_path / "calm", SAME)


def repeated_answers(ledger: list[LedgerLine], run_id: str) -> set[tuple[int, int]]:
    """The (row, attempt) of every billed exchange but the last of its row."""
    by_row: dict[int, list[int]] = {}
    for line in ledger:
        run, row, n = str(line.client_request_id).rsplit("-", 2)
        assert run == run_id
        if line.billed and line.fault is None:
            by_row.setdefault(int(row), []).append(int(n))
    return {(row, n) for row, attempts in by_row.items() for n in sorted(attempts)[:-1]}


def test_repeating_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    """Nothing is sent and no file is touched."""
    source = write_rows(tmp_path / "in.jsonl", 50)
    with running_simulator(SimulatorConfig(ledger=str(tmp_path / "ledger"))) as simulator:
        job = write_job(tmp_path / "job.toml", simulator.url, source)
        assert batchrun("run", job, "-o", tmp_path / "out").exit_code == 0
        before = snapshot(tmp_path / "out")
        again = batchrun("run", job, "-o", tmp_path / "out")
        assert again.exit_code == 0
        assert "50 of 50 done" in again.stdout
        assert len(simulator.ledger()) == 50
    assert snapshot(tmp_path / "out") == before


def test_the_second_concurrent_start_names_the_lock_holder(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", 300)
    with running_simulator(SimulatorConfig(latency_s=0.1, ledger=str(tmp_path / "ledger"))) as simulator:
        job = write_job(tmp_path / "job.toml", simulator.url, source)
        both = [start("run", job, "-o", tmp_path / "out") for _ in range(2)]
        ended = sorted((finish(process) for process in both), key=lambda end: end.exit_code)
        assert [end.exit_code for end in ended] == [0, 6]
        assert "another run works here (" in ended[1].stderr
        assert len(simulator.ledger()) == 300


@pytest.mark.heavy
def test_the_first_signal_drains_without_repeats(tmp_path: Path) -> None:
    """The run drains at the first signal; the resume repeats nothing."""
    source = write_rows(tmp_path / "in.jsonl", 400)
    with running_simulator(SimulatorConfig(latency_s=0.2, ledger=str(tmp_path / "ledger"))) as simulator:
        job = write_job(tmp_path / "job.toml", simulator.url, source)
        process = start("run", job, "-o", tmp_path / "out")
        kill_when(process, lambda: len(simulator.ledger()) >= 60, signal.SIGTERM)
        ended = finish(process)
        assert ended.exit_code == 143, ended.stderr
        summary = read_summary(tmp_path / "out")
        assert summary["rows"] - summary["pending"] == len(simulator.ledger())
        assert batchrun("run", job, "-o", tmp_path / "out").exit_code == 0
        assert len(simulator.ledger()) == 400
    assert read_summary(tmp_path / "out")["possibly_billed_count"] == 0


@pytest.mark.parametrize("value", ["-1", "nan", "inf", "soon"])
@pytest.mark.parametrize("flag", ["--grace", "--max-cost"])
def test_a_flag_that_is_no_amount_is_refused(tmp_path: Path, flag: str, value: str) -> None:
    source = write_rows(tmp_path / "in.jsonl", 1)
    job = write_job(tmp_path / "job.toml", "http://127.0.0.1:9", source)
    ended = batchrun("run", job, "-o", tmp_path / "out", f"{flag}={value}")
    assert ended.exit_code == 2
    assert f"Invalid value for '{flag}': expected " in ended.stderr
    assert not (tmp_path / "out").exists()


def test_input_and_output_may_be_called_by_numbers(tmp_path: Path) -> None:
    write_rows(tmp_path / "20261101", 3)
    with running_simulator(SimulatorConfig()) as simulator:
        job = write_job(tmp_path / "job.toml", simulator.url, tmp_path / "none")
        ended = batchrun("run", job, "-i", "20261101", "-o", "2026", "--max-cost", "1e2", cwd=tmp_path)
        assert ended.exit_code == 0, ended.stderr
    assert completions(tmp_path / "2026", ["row"]).num_rows == 3


def test_all_files_of_a_run_are_private(tmp_path: Path) -> None:
    """Every file is readable by its owner only, and a start that is refused reserves no room."""
    source, out = write_rows(tmp_path / "in.jsonl", 300), tmp_path / "out"
    with running_simulator(SimulatorConfig(latency_s=0.2, ledger=str(tmp_path / "ledger"))) as simulator:
        job = write_job(tmp_path / "job.toml", simulator.url, source, "[output]\nchunk_rows = 40\n")
        assert batchrun("run", job, "-o", out, "-i", tmp_path / "gone.jsonl").exit_code == 2
        assert not (out / "reserve.bin").exists()
        process = start("run", job, "-o", out)
        kill_when(process, lambda: len(simulator.ledger()) >= 60)
        process.communicate()
    files = [path for path in out.rglob("*") if path.is_file()]
    assert {"reserve.bin", "checkpoint.db", "inflight.bin", "summary.json", "run.log"} <= {path.name for path in files}
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in files} == {path.name: "0o600" for path in files}


@pytest.mark.sampled(1)
@pytest.mark.parametrize("refusal", [("--limit", "20"), ("--set", "request.prompt=Other: {{ text }}"), ("-i", "gone")])
def test_a_refused_start_keeps_the_run_totals(tmp_path: Path, refusal: tuple[str, str]) -> None:
    source, out = write_rows(tmp_path / "in.jsonl", 60), tmp_path / "out"
    with running_simulator() as simulator:
        job = write_job(tmp_path / "job.toml", simulator.url, source)
        assert batchrun("run", job, "-o", out, "--set", "budget.max_requests=25").exit_code == 4
        before = read_summary(out)
        assert before["pending"] == 35
        ended = batchrun("run", job, "-o", out, *refusal)
        assert ended.exit_code == 2, ended.stderr
        after = read_summary(out)
        assert after["state"] == "failed"
        for name in ("run_id", "rows", "pending", "by_status", "totals", "cost_usd", "created_at", "price"):
            assert after[name] == before[name], name
        assert batchrun("run", job, "-o", out).exit_code == 0
    assert sum(read_summary(out)["by_status"].values()) == 60


def test_the_second_signal_names_requests_in_flight(tmp_path: Path) -> None:
    """It ends the process at once."""
    source = write_rows(tmp_path / "in.jsonl", 100)
    with running_simulator(SimulatorConfig(latency_s=30, latency_sigma=0)) as simulator:
        job = write_job(tmp_path / "job.toml", simulator.url, source)
        process = start("run", job, "-o", tmp_path / "out")
        inflight = tmp_path / "out" / "inflight.bin"
        kill_when(process, lambda: inflight.exists() and len(in_flight.read(inflight)) >= 8, signal.SIGTERM)
        wait_until(lambda: '"signal"' in (tmp_path / "out" / "run.log").read_text(), process)
        process.send_signal(signal.SIGTERM)
        ended = finish(process)
    assert ended.exit_code == 143, ended.stderr
    summary = read_summary(tmp_path / "out")
    assert 1 <= summary["possibly_billed_count"] <= 64
    assert {entry["cause"] for entry in summary["possibly_billed"]} == {"aborted"}
    given_up = summary["possibly_billed_count"]
    assert summary["reason"].startswith(f"SIGTERM: stopped at once; {given_up} request")
    assert Decimal(summary["possibly_billed_usd"]) > 0


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("fault", "exit_code"),
    [
        (Fault(kind="status", status=401, message="Incorrect API key provided", from_request=200), 5),
        (Fault(kind="status", status=402, message="Payment required", from_request=200), 5),
        (Fault(kind="status", status=403, message="Insufficient balance", from_request=200), 5),
        (
            Fault(
                kind="status",
                status=429,
                code="insufficient_quota",
                message="You exceeded your quota",
                from_request=200,
            ),
            5,
        ),
        (Fault(kind="status", status=404, message="no such route", from_request=200), 2),
    ],
    ids=lambda value: str(getattr(value, "status", value)),
)
def test_run_wide_trouble_stops_and_fails_nothing(tmp_path: Path, fault: Fault, exit_code: int) -> None:
    """It stops the run within a window of rows, a wrong key within two."""
    source = write_rows(tmp_path / "in.jsonl", 400)
    with running_simulator(
        SimulatorConfig(faults=(fault,), latency_s=0.02, ledger=str(tmp_path / "ledger"))
    ) as simulator:
        job = write_job(tmp_path / "job.toml", simulator.url, source)
        ended = batchrun("run", job, "-o", tmp_path / "out")
        assert ended.exit_code == exit_code, ended.stderr
        assert str(fault.message) in ended.stdout
        assert ("\nfix          endpoint.api_key_env: the server rejects the key in $" in ended.stdout) == (
            fault.status == 401
        )
        # a wrong key may be one of several: each of the 64 answers that are still to come starts its count again, while
        # refusals come at once
        assert len(simulator.ledger()) <= 200 + 64 + (64 + 2 * REFUSED_IN_A_ROW if fault.status == 401 else 0)
    summary = read_summary(tmp_path / "out")
    assert summary["by_status"].get("error", 0) == 0
    assert summary["pending"] >= 136
    with running_simulator(SimulatorConfig(ledger=str(tmp_path / "ledger2"))) as simulator:
        write_job(tmp_path / "job.toml", simulator.url, source)
        assert batchrun("run", job, "-o", tmp_path / "out", key="another-key-1234").exit_code == 0
        assert len(simulator.ledger()) == summary["pending"]


def test_too_many_failures_have_an_exit_code(tmp_path: Path) -> None:
    """One bad row fails alone; too many failed rows end the run with their own exit code."""
    source = write_rows(tmp_path / "in.jsonl", 300)
    faults = (
        Fault(kind="status", status=500, match="item 7 "),
        Fault(kind="status", status=403, message="not for you", match="item 8 "),
        Fault(kind="status", status=400, message="bad", match="item 9 "),
    )
    with running_simulator(
        SimulatorConfig(faults=faults, latency_s=0.02, ledger=str(tmp_path / "ledger"))
    ) as simulator:
        job = write_job(tmp_path / "job.toml", simulator.url, source, "[retry]\nbackoff_base_s = 0.1\n")
        ended = batchrun("run", job, "-o", tmp_path / "out")
        assert ended.exit_code == 3, ended.stderr
        statuses = Counter(line.status for line in simulator.ledger())
    table = completions(tmp_path / "out")
    bad = [row for row in table.to_pylist() if row["status"] != "ok" and row["status"] != "truncated"]
    assert [(row["row"], row["status"]) for row in bad] == [(7, "error"), (8, "error"), (9, "error")]
    assert statuses[400] == 1
    assert 2 <= statuses[500] <= 6
    assert read_summary(tmp_path / "out")["by_status"]["error"] == 3


def test_ten_equal_first_failures_stop_the_run(tmp_path: Path) -> None:
    """A resume doesn't check the first ten rows again."""
    source = write_rows(tmp_path / "in.jsonl", 100)
    faults = (Fault(kind="status", status=400, message="no such parameter"),)
    with running_simulator(SimulatorConfig(faults=faults, ledger=str(tmp_path / "ledger"))) as simulator:
        job = write_job(tmp_path / "job.toml", simulator.url, source)
        ended = batchrun("run", job, "-o", tmp_path / "out")
        assert ended.exit_code == 2, ended.stderr
        assert "the first 10 rows all failed alike: HTTP 400: no such parameter" in ended.stdout
        assert 10 <= len(simulator.ledger()) <= 10 + 8
        assert batchrun("run", job, "-o", tmp_path / "out").exit_code == 3
        assert len(simulator.ledger()) == 100
        assert batchrun("run", job, "-o", tmp_path / "out", "--max-failures", "100").exit_code == 0
        assert len(simulator.ledger()) == 100


def test_invalid_json_answers_keep_their_bytes(tmp_path: Path) -> None:
    """The output file stays valid."""
    source = write_rows(tmp_path / "in.jsonl", 6)
    choices = '"choices": [{"message": {"content": %s}, "finish_reason": "stop"}]'
    bodies = [
        '{"id": "a", %s}' % (choices % r'"lone \ud800 surrogate"'),
        '{"id": "b", "x": NaN, %s}' % (choices % '"not a number"'),
        '{"id": "c", "x": ' + "9" * 5000 + ", " + choices % '"long integer"' + "}",
        "[" * 100_000,
        '{"id": "d", "id": "e", %s}' % (choices % r'"twice \u0000 and \u2028"'),
    ]
    faults = tuple(Fault(kind="body", body=body, match=f"item {row} ") for row, body in enumerate(bodies))
    with running_simulator(SimulatorConfig(faults=faults)) as simulator:
        job = write_job(tmp_path / "job.toml", simulator.url, source, "[retry]\nbackoff_base_s = 0.05\n")
        ended = batchrun("run", job, "-o", tmp_path / "out")
        assert ended.exit_code == 3, ended.stderr
    rows = completions(tmp_path / "out", ["status", "content", "error", "raw"]).to_pylist()
    assert [row["status"] for row in rows[:5]] == ["ok", "ok", "ok", "error", "ok"]
    assert rows[0]["content"] == "lone \ufffd surrogate"
    assert [row["error"]["kind"] for row in rows[:4]] == ["not_strict_json"] * 3 + ["unreadable"]
    assert [row["raw"] for row in rows[:4]] == [body.encode() for body in bodies[:4]]
    assert rows[4]["content"] == "twice \x00 and \u2028"


def test_content_policy_503_is_not_an_outage(tmp_path: Path) -> None:
    """Such a row is sent once."""
    source = write_rows(tmp_path / "in.jsonl", 300)
    faults = parse_faults("content_policy=0.1")
    with running_simulator(SimulatorConfig(faults=faults, ledger=str(tmp_path / "ledger"))) as simulator:
        job = write_job(tmp_path / "job.toml", simulator.url, source)
        assert batchrun("run", job, "-o", tmp_path / "out").exit_code == 0
        assert len(simulator.ledger()) == 300
    filtered = completions(tmp_path / "out", ["status"]).column("status").to_pylist().count("filtered")
    assert 10 <= filtered <= 60
    assert '"Cooling"' not in (tmp_path / "out" / "run.log").read_text()


def test_the_budget_is_never_exceeded(tmp_path: Path) -> None:
    """A higher budget resumes the run."""
    source = write_rows(tmp_path / "in.jsonl", 400)
    with running_simulator(SimulatorConfig(latency_s=0.02, ledger=str(tmp_path / "ledger"))) as simulator:
        job = write_job(tmp_path / "job.toml", simulator.url, source)
        ended = batchrun("run", job, "-o", tmp_path / "out", "--max-cost", "0.05")
        assert ended.exit_code == 4, ended.stderr
        assert "budget" in ended.stdout
        spent = billed_usd(simulator.ledger())
        assert Decimal("0.045") < spent <= Decimal("0.05")
        assert batchrun("run", job, "-o", tmp_path / "out", "--max-cost", "5").exit_code == 0
        assert len(simulator.ledger()) == 400
    assert Decimal(read_summary(tmp_path / "out")["cost_usd"]) == billed_usd(simulator.ledger())


@pytest.mark.heavy
def test_a_resumed_rehearsal_meets_the_same_faults(tmp_path: Path) -> None:
    """Two starts meet the faults that one start would have met."""
    source = write_rows(tmp_path / "in.jsonl", 60)
    more = (
        '[simulator]\nlatency_s = 0\nfaults = "500=0.2"\nledger = "{ledger}"\n'
        "[retry]\nbackoff_base_s = 0.3\nmax_attempts = 9\nmax_5xx = 9\n[output]\nmax_failures = 60\n"
    )
    fates: list[dict[str, str | None]] = []
    for name, caps in (("one", ["1000"]), ("two", ["50", "1000"])):
        ledger = tmp_path / f"{name}.ledger"
        job = write_job(tmp_path / f"{name}.toml", "simulator", source, more.format(ledger=ledger))
        for cap in caps:
            ended = batchrun("run", job, "-o", tmp_path / name, "--set", f"budget.max_requests={cap}")
            assert ended.exit_code == (4 if cap == "50" else 0), ended.stderr
        lines = read_ledger(ledger)
        fates.append({str(line.client_request_id).split("-", 1)[1]: line.fault for line in lines})
        assert len(fates[-1]) == len(lines)
    assert fates[0] == fates[1]
    assert len(fates[0]) > 60


@pytest.mark.heavy
def test_request_and_token_budgets_survive_kills(tmp_path: Path) -> None:
    """Both hold over retries and kills; higher ones resume the run."""
    source = write_rows(tmp_path / "in.jsonl", 200)
    faults = parse_faults("500=0.1")
    config = SimulatorConfig(latency_s=0.05, faults=faults, ledger=str(tmp_path / "ledger"))
    with running_simulator(config) as simulator:
        job = write_job(tmp_path / "job.toml", simulator.url, source, "[retry]\nbackoff_base_s = 0.01\n")
        out = tmp_path / "out"
        dying = start("run", job, "-o", out, "--set", "budget.max_requests=120", "--set", "limits.max_in_flight=8")
        kill_when(dying, lambda: len(simulator.ledger()) >= 60)
        finish(dying)
        ended = batchrun("run", job, "-o", out, "--set", "budget.max_requests=120")
        assert ended.exit_code == 4, ended.stderr
        assert "120 of 120 requests sent; raise budget.max_requests and run again" in ended.stdout
        assert 120 - 8 <= len(simulator.ledger()) <= 120  # of eight that were killed, some may not have arrived
        capped = batchrun("run", job, "-o", out, "--set", "budget.max_tokens=9000")
        assert capped.exit_code == 4, capped.stderr
        assert "raise budget.max_tokens and run again" in capped.stdout
        used = sum(line.prompt_tokens + line.completion_tokens for line in simulator.ledger() if line.billed)
        assert 7_000 < used <= 9_000
        assert batchrun("run", job, "-o", out).exit_code == 0


@pytest.mark.heavy
def test_an_unreachable_endpoint_ends_quickly(tmp_path: Path) -> None:
    """No row fails."""
    source = write_rows(tmp_path / "in.jsonl", 50)
    for url, word in (("http://127.0.0.1:9/v1", "127.0.0.1:9"), ("https://nowhere.invalid/v1", "nowhere.invalid")):
        job = write_job(tmp_path / "job.toml", url, source, "[retry]\nmax_outage_s = 1.5\n")
        ended = batchrun("run", job, "-o", tmp_path / word.replace(":", "-"))
        assert ended.exit_code == 5, ended.stderr
        assert "the endpoint was never reached" in ended.stdout
        assert word in ended.stdout.lower()
        summary = read_summary(tmp_path / word.replace(":", "-"))
        assert (summary["pending"], summary["possibly_billed_count"]) == (50, 0)


@pytest.mark.heavy
def test_an_unfinished_run_resumes_another_day(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", 200)
    with running_simulator(SimulatorConfig(latency_s=0.2, ledger=str(tmp_path / "ledger"))) as simulator:
        job = write_job(tmp_path / "job.toml", simulator.url, source, '[output]\npath = "runs/{job}/{date}"\n')
        process = start("run", job, "--date", "2026-01-31", cwd=tmp_path)
        kill_when(process, lambda: len(simulator.ledger()) >= 40)
        process.communicate()
        ended = batchrun("run", job, cwd=tmp_path)
        assert ended.exit_code == 0, ended.stderr
        assert "unfinished run of 2026-01-31" in ended.stderr
        assert len(simulator.ledger()) <= 200 + 64
    assert [path.name for path in (tmp_path / "runs" / "job").iterdir()] == ["2026-01-31"]


def test_bad_records_are_reported_before_sending(tmp_path: Path) -> None:
    """They are named before the first request, or set aside if the job says so."""
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "a"}\nnot json\n{"other": 1}\n[1]\n{"text": "b"}\n')
    with running_simulator(SimulatorConfig(ledger=str(tmp_path / "ledger"))) as simulator:
        job = write_job(tmp_path / "job.toml", simulator.url, source)
        for command in ("check", "run"):
            ended = batchrun(command, job, *(() if command == "check" else ("-o", tmp_path / "out")))
            assert ended.exit_code == 2
            for place in ("in.jsonl:2", "in.jsonl:3", "in.jsonl:4", "3 of 5 input records"):
                assert place in ended.stderr
        assert simulator.ledger() == []
        ended = batchrun("run", job, "-o", tmp_path / "out", "--skip-invalid")
        assert ended.exit_code == 0, ended.stderr
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert [reject["ordinal"] for reject in rejects] == [1, 2, 3]
    assert completions(tmp_path / "out", ["row", "text"]).to_pylist() == [
        {"row": 0, "text": "a"},
        {"row": 1, "text": "b"},
    ]


def test_the_job_must_allow_an_empty_input(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text("\n\n")
    job = write_job(tmp_path / "job.toml", "http://127.0.0.1:9/v1", source)
    for given in (
        ("run", job, "-o", tmp_path / "out"),
        ("run", job, "-o", tmp_path / "out", "-i", "-"),
        ("check", job),
    ):
        ended = batchrun(*given)  # standard input is empty here
        assert ended.exit_code == 2
        assert ended.stderr.count("Error: ") == 1
        assert "Error: the input has no rows; check that it is complete, or set input.min_rows = 0" in ended.stderr
    assert not (tmp_path / "out" / "completions.parquet").exists()
    allowed = ("--set", "input.min_rows=0")
    ended = batchrun("run", job, "-o", tmp_path / "out", *allowed)
    assert ended.exit_code == 0, ended.stderr
    assert "nothing to send" in ended.stderr
    ended = batchrun("run", job, "-o", tmp_path / "parts", "--set", "output.layout=parts", *allowed)
    assert ended.exit_code == 0, ended.stderr
    for table in (completions(tmp_path / "out"), pq.read_table(tmp_path / "parts" / "completions")):
        assert table.num_rows == 0
        assert "content" in table.column_names


def test_the_key_appears_in_no_file_or_stream(tmp_path: Path) -> None:
    """Even though the server repeats it."""
    source = write_rows(tmp_path / "in.jsonl", 60)

    async def echo_one_key_in_three(exchange: Exchange) -> None:
        echoes = re.search(rb"item \d*[147] ", exchange.body) is not None
        await (echo_key(exchange) if echoes else exchange.send(answer()))

    with serving_aside(echo_one_key_in_three) as server:
        job = write_job(tmp_path / "job.toml", server.url, source, '[output]\nraw = "always"\n')
        ended = batchrun("run", job, "-o", tmp_path / "out")
    assert ended.exit_code == 3, ended.stderr
    encoded = [urllib.parse.quote(KEY).encode(), base64.b64encode(KEY.encode()).rstrip(b"=")[:-1]]
    forms = [KEY.encode(), *encoded]
    assert holds_key(tmp_path / "out", forms) == []
    assert KEY not in ended.stdout + ended.stderr
    assert any(b"[redacted]" in (row["raw"] or b"") for row in completions(tmp_path / "out", ["raw"]).to_pylist())


def test_standard_input_is_stored_for_the_resume(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", 200)
    with running_simulator(SimulatorConfig(latency_s=0.1, ledger=str(tmp_path / "ledger"))) as simulator:
        job = write_job(tmp_path / "job.toml", simulator.url, "-")
        with source.open("rb") as stdin:
            process = start("run", job, "-o", tmp_path / "out", stdin=stdin)
        kill_when(process, lambda: len(simulator.ledger()) >= 50)
        process.communicate()
        ended = batchrun("run", job, "-o", tmp_path / "out")
        assert ended.exit_code == 0, ended.stderr
    assert completions(tmp_path / "out", ["id"]).column("id").to_pylist() == list(range(200))


@pytest.mark.heavy
def test_a_full_disk_pauses_the_run(tmp_path: Path) -> None:
    """With room again, the run resumes."""
    source = write_rows(tmp_path / "in.jsonl", 600)

    def small_files() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))

    with running_simulator(SimulatorConfig(latency_s=0.02, ledger=str(tmp_path / "ledger"))) as simulator:
        job = write_job(tmp_path / "job.toml", simulator.url, source)
        ended = finish(start("run", job, "-o", tmp_path / "out", preexec_fn=small_files))
        assert ended.exit_code == 5, ended.stderr + ended.stdout
        assert "raise the limit on file sizes with ulimit -f and run the same command again" in ended.stderr
        done = settled(tmp_path / "out")
        ended = batchrun("run", job, "-o", tmp_path / "out")
        assert ended.exit_code == 0, ended.stderr
        assert len(simulator.ledger()) <= 600 + 64
    assert 0 < done < 600
    assert completions(tmp_path / "out", ["row"]).column("row").to_pylist() == list(range(600))


def test_a_changed_question_is_never_silently_reused(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", 30)
    with running_simulator(SimulatorConfig(ledger=str(tmp_path / "ledger"))) as simulator:
        job = write_job(tmp_path / "job.toml", simulator.url, source)
        assert batchrun("run", job, "-o", tmp_path / "out").exit_code == 0
        ended = batchrun("run", job, "-o", tmp_path / "out", "--set", "request.temperature=0.5")
        assert ended.exit_code == 2
        assert "request.temperature" in ended.stderr
        write_rows(source, 29)
        ended = batchrun("run", job, "-o", tmp_path / "out")
        assert ended.exit_code == 2
        assert "the input: " in ended.stderr
        assert "--accept-changes" in ended.stderr
        assert len(simulator.ledger()) == 30


def test_new_check_status_and_report_go_together(tmp_path: Path) -> None:
    write_rows(tmp_path / "prompts.jsonl", 20)
    assert batchrun("new", "mine.toml", cwd=tmp_path).exit_code == 0
    assert batchrun("new", "mine.toml", cwd=tmp_path).exit_code == 2
    assert "20 rows" in batchrun("check", "mine.toml", cwd=tmp_path).stdout
    none = ("-i", write_rows(tmp_path / "none.jsonl", 0), "--set", "input.min_rows=0")
    empty = batchrun("check", "mine.toml", *none, cwd=tmp_path)
    assert (empty.exit_code, empty.stdout) == (0, "0 rows in 1 file: there is nothing to send\n")
    assert batchrun("run", "mine.toml", "-o", "out", "--set", "simulator.latency_s=0", cwd=tmp_path).exit_code == 0
    status = batchrun("status", "out", cwd=tmp_path)
    assert "20 of 20 done" in status.stdout
    report = json.loads(batchrun("report", "out", "--format", "json", cwd=tmp_path).stdout)
    assert report["total"]["rows"] == 20
    moved = tmp_path / "elsewhere.parquet"
    (tmp_path / "out" / "completions.parquet").rename(moved)
    again = json.loads(batchrun("report", moved, "--format", "json").stdout)
    assert again["total"] == report["total"]
    assert batchrun("report", tmp_path / "nowhere").exit_code == 2


@pytest.mark.heavy
@pytest.mark.parametrize("killed", [True, False], ids=["killed", "finished"])
def test_a_copied_run_directory_works_as_well(tmp_path: Path, killed: bool) -> None:
    source = write_rows(tmp_path / "in.jsonl", 200)
    first, second = tmp_path / "out", tmp_path / "elsewhere" / "copy"
    with running_simulator(SimulatorConfig(latency_s=0.1, ledger=str(tmp_path / "ledger"))) as simulator:
        job = write_job(tmp_path / "job.toml", simulator.url, source, "[output]\nchunk_rows = 30\n")
        process = start("run", job, "-o", first)
        if killed:
            kill_when(process, lambda: len(simulator.ledger()) >= 80)
        finish(process)
        shutil.copytree(first, second)
        shutil.rmtree(first)
        before = snapshot(second)
        ended = batchrun("run", job, "-o", second)
        assert ended.exit_code == 0, ended.stderr
        assert killed or snapshot(second) == before
        assert str(second / "completions.parquet") in ended.stdout
        assert str(first) not in ended.stdout
        assert ("complete already; nothing is sent" in ended.stderr) is not killed
        assert len(simulator.ledger()) <= 200 + read_summary(second)["possibly_billed_count"]
    assert completions(second, ["row"]).column("row").to_pylist() == list(range(200))
    assert not first.exists()


def test_a_deleted_run_directory_stops_the_spending(tmp_path: Path) -> None:
    """The run ends before it pays for more answers that nothing would keep."""
    source = write_rows(tmp_path / "in.jsonl", 400)
    with running_simulator(SimulatorConfig(latency_s=0.2, ledger=str(tmp_path / "ledger"))) as simulator:
        job = write_job(tmp_path / "job.toml", simulator.url, source, "[limits]\nmax_in_flight = 4\n")
        process = start("run", job, "-o", tmp_path / "out")
        wait_until(lambda: len(simulator.ledger()) >= 20, process)
        shutil.rmtree(tmp_path / "out")
        ended = finish(process)
        assert ended.exit_code == 5, ended
        assert ended.stderr.splitlines()[-1].startswith(f"Error: {tmp_path / 'out' / 'checkpoint.db'}: was deleted")
        assert len(simulator.ledger()) < 200


JUMPING_CLOCK = """
import time
real = time.time
time.time = lambda: real() + 86_400 * (int(time.monotonic() * 3) % 3 - 1)
"""


@pytest.mark.heavy
def test_clock_jumps_of_a_day_change_nothing(tmp_path: Path) -> None:
    """A wall clock that jumps a day either way delays no request and fails no row."""
    (tmp_path / "sitecustomize.py").write_text(JUMPING_CLOCK)
    source = write_rows(tmp_path / "in.jsonl", 120)
    faults = parse_faults("500=0.1,429=0.05")
    with running_simulator(SimulatorConfig(latency_s=0.1, faults=faults, ledger=str(tmp_path / "ledger"))) as simulator:
        job = write_job(tmp_path / "job.toml", simulator.url, source, "[limits]\nrequests_per_minute = 1800\n")
        ended = batchrun("run", job, "-o", tmp_path / "out", before=["env", f"PYTHONPATH={tmp_path}"])
        assert ended.exit_code == 0, ended.stderr
        served = len(simulator.ledger())
    summary = read_summary(tmp_path / "out")
    assert summary["by_status"].keys() == {"ok", "truncated"}
    assert served / 30 - 2 <= summary["elapsed_s"] <= 60
    finished = completions(tmp_path / "out", ["finished_at"]).column("finished_at")
    assert pc.max(finished).as_py() - pc.min(finished).as_py() > timedelta(days=1), "the clock did not jump"
