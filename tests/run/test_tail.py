"""The last rows of a run: rows that always fail are given up, and an outage that comes just then burns none."""

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from batchrun import credentials, engine
from batchrun.dispatch.hooks import Hooks
from batchrun.dispatch.retries import LOG_EVERY_S, Retries
from batchrun.records import RowError
from batchrun.report import progress, status
from batchrun.report.run_state import RunState
from batchrun.run_summary import Summary
from batchrun.store.rundir import RunDirectory
from tests.cli_process import KEY, KEY_ENV
from tests.crash.test_network_faults import BUSY, FAILURE, answers, requests_by_row, resets, row_of
from tests.fault_server import Exchange, FaultServer, Script, answer, sends, serving_moved
from tests.jobs import job_over, write_lines

ROWS = 40


def run(folder: Path, server: FaultServer, tell: Callable[[Summary], None] | None = None, **tables: Any) -> Summary:
    """A start of the run over `item 0`, `item 1` … in `folder`, on the server's clock."""
    source = folder / "in.jsonl"
    if not source.exists():
        write_lines(source, [{"text": f"item {row}."} for row in range(ROWS)])
    endpoint = {"url": server.url, "api_key_env": KEY_ENV, "name": "test"}
    job = job_over(source, endpoint=endpoint, **tables)
    key = credentials.read(job.endpoint, {KEY_ENV: KEY})
    hooks = Hooks() if tell is None else Hooks(progress=tell)
    return engine.run(job, RunDirectory(folder / "out"), key, hooks=hooks, runtime=engine.Runtime(server.new_loop))


def bad_rows(bad: frozenset[int], fault: Script, good_s: float = 0.2) -> Script:
    """These rows meet the fault, always; the others are answered."""

    async def script(exchange: Exchange) -> None:
        if row_of(exchange) in bad:
            await fault(exchange)
        else:
            await asyncio.sleep(good_s)
            await answers(exchange)

    return script


async def slow_failure(exchange: Exchange) -> None:
    await asyncio.sleep(4.0)
    await exchange.send(FAILURE)


FAULTS: dict[str, tuple[Script, int]] = {
    "500": (sends(FAILURE), 4),
    "500, late": (slow_failure, 4),
    "408": (sends(answer(b"{}", status="408 Request Timeout")), 6),
    "503 overloaded": (sends(BUSY), 6),
    "a reset after the request": (resets, 2),
    "200 with a page": (sends(answer(b"<html></html>")), 2),
}
"""A failure, and after how many counted ones a row is given up."""


@pytest.mark.sampled(6)
@pytest.mark.parametrize(
    ("fault", "bad", "in_flight"),
    [("500", bad, in_flight) for bad in (1, 2, 3, 10) for in_flight in (1, 64)]
    + [(fault, *some) for fault in FAULTS if fault != "500" for some in ((3, 1), (10, 64))],
)
def test_bad_last_rows_are_given_up_soon(tmp_path: Path, bad: int, in_flight: int, fault: str) -> None:
    script, attempts = FAULTS[fault]
    last = frozenset(range(ROWS - bad, ROWS))
    with serving_moved(bad_rows(last, script)) as server:
        summary = run(tmp_path, server, limits={"max_in_flight": in_flight})
    assert (summary.exit_code, summary.by_status) == (3, {"ok": ROWS - bad, "error": bad})
    assert pq.read_table(tmp_path / "out" / "completions.parquet").num_rows == ROWS
    sent = requests_by_row(server)
    assert {row: n for row, n in sent.items() if row not in last} == dict.fromkeys(range(ROWS - bad), 1)
    assert all(attempts <= sent[row] <= attempts + 2 for row in last), sent  # the first may have had no witness yet


@pytest.mark.parametrize("bad", [{3, 21}, {3, 4, 21}, set(range(10, 20))], ids=["two", "three", "ten in a row"])
@pytest.mark.parametrize("max_outage_s", [10.0, 7_200.0])
def test_bad_rows_are_given_up_under_short_outages(tmp_path: Path, bad: set[int], max_outage_s: float) -> None:
    with serving_moved(bad_rows(frozenset(bad), sends(FAILURE))) as server:
        summary = run(tmp_path, server, retry={"max_outage_s": max_outage_s})
    assert (summary.exit_code, summary.by_status) == (3, {"ok": ROWS - len(bad), "error": len(bad)})
    assert max(requests_by_row(server).values()) <= 6


@pytest.mark.parametrize("max_outage_s", [10.0, 7_200.0])
def test_a_start_with_only_bad_rows_ends(tmp_path: Path, max_outage_s: float) -> None:
    """The first start ends by the balance, with three rows left, and no answer comes in the second."""
    last = frozenset(range(ROWS - 3, ROWS))
    no_balance = sends(answer(b'{"error": {"message": "Insufficient balance"}}', status="402 Payment Required"))
    with serving_moved(bad_rows(last, no_balance)) as server:
        first = run(tmp_path, server)
    assert (first.exit_code, first.pending) == (5, 3)
    with serving_moved(bad_rows(last, sends(FAILURE))) as server:
        second = run(tmp_path, server, retry={"max_outage_s": max_outage_s})
    assert (second.exit_code, second.by_status) == (3, {"ok": ROWS - 3, "error": 3})
    assert max(requests_by_row(server).values()) <= 6
    assert requests_by_row(server).keys() == last


@pytest.mark.heavy
@pytest.mark.parametrize("left", [1, 3, 10])
def test_an_outage_at_the_end_fails_nothing(tmp_path: Path, left: int) -> None:
    last, ends_at_s = frozenset(range(ROWS - left, ROWS)), 0.0

    async def fails_for_a_minute(exchange: Exchange) -> None:
        nonlocal ends_at_s
        now_s = asyncio.get_running_loop().time()
        ends_at_s = ends_at_s or now_s + 60
        await (exchange.send(FAILURE) if now_s < ends_at_s else answers(exchange))

    with serving_moved(bad_rows(last, fails_for_a_minute, good_s=0.0)) as server:
        summary = run(tmp_path, server, limits={"max_in_flight": 1})
    assert (summary.exit_code, summary.by_status) == (0, {"ok": ROWS})
    assert len(server.exchanges) < ROWS + 6 * left


def test_progress_and_log_name_retried_rows(tmp_path: Path) -> None:
    """With the reason of the retry; `status`, too."""
    seen: list[Summary] = []
    with serving_moved(bad_rows(frozenset({38, 39}), sends(FAILURE))) as server:
        ended = run(tmp_path, server, tell=seen.append, limits={"max_in_flight": 1})
    waiting = [each for each in seen if each.retrying is not None and each.retrying.rows == each.pending == 2]
    again = [each for each in waiting if each.retrying is not None and each.retrying.attempts > 1]
    reported = next(each for each in again if each.limited_by.startswith("retries"))
    assert reported.retrying is not None
    assert reported.retrying.first == [38, 39]
    assert reported.limited_by.startswith("retries (500)")
    assert "2 retried (500 server error), " in progress.line(reported)
    assert "2 retried" in progress.around_bar(reported, 200)[1]
    shown = list(status.lines(RunDirectory(tmp_path / "out"), RunState(reported, working=True)))
    assert any(line.startswith("retries 2 rows (38, 39), sent up to ") for line in shown), shown
    assert ended.retrying is None
    log = [json.loads(line) for line in (tmp_path / "out" / "run.log").read_text().splitlines()]
    lines = [line for line in log if line["event"] == "retrying"]
    assert {"first": [38, 39], "nothing_else_left": True, "reasons": {"500 server error": 2}}.items() <= max(
        lines, key=lambda line: line["rows"]
    ).items()
    assert len(lines) < 10


def test_ten_of_many_retried_rows_are_named() -> None:
    """The log has such a line seldom."""
    now_s, now = 0.0, datetime.now(UTC)
    retries = Retries(lambda: now_s)
    assert retries.summary(now) is None
    assert not retries.should_log(last=True)
    for row in range(1_000):
        retries.put(row, 1 + row % 3, RowError("timeout") if row % 4 else RowError("server_error", 500), 7.0 + row)
    reported = retries.summary(now)
    assert reported is not None
    assert (reported.rows, reported.first, reported.attempts) == (1_000, list(range(10)), 3)
    assert reported.reasons == {"timeout": 750, "500 server error": 250}
    assert reported.next_at == now + timedelta(seconds=7)
    due = Counter[bool]()
    for _ in range(600):
        now_s += 0.5
        due[retries.should_log(last=now_s > 100)] += 1
    assert due[True] == 300 / LOG_EVERY_S + 1
    for row in range(1_000):
        retries.drop(row)
    assert retries.summary(now) is None
