"""Rows that fail one after another: whoever is at fault, bad rows are given up, good ones served, and the run ends."""

import asyncio
from collections import Counter
from pathlib import Path

import pytest

from batchrun.dispatch.mixing import MOST_DOUBTED
from batchrun.run_summary import Summary
from tests.crash.test_network_faults import (
    BUSY,
    FAILURE,
    PAGE,
    RATE_LIMIT,
    WITH_A_WAIT,
    answers,
    requests_by_row,
    resets,
    row_of,
)
from tests.fault_server import Exchange, Script, answer, sends, serving_moved
from tests.jobs import write_lines
from tests.run.test_tail import bad_rows, run

TOO_LARGE = answer(
    b'{"error": {"message": "Request too large for m on tokens per min (TPM): Limit 10000, Requested 20000. The input '
    b'or output tokens must be reduced in order to run successfully.", "code": "rate_limit_exceeded"}}',
    status="429 Too Many Requests",
)


def rows(folder: Path, count: int) -> frozenset[int]:
    """The input has so many rows; their numbers."""
    write_lines(folder / "in.jsonl", [{"text": f"item {row}."} for row in range(count)])
    return frozenset(range(count))


@pytest.mark.heavy
@pytest.mark.sampled(2)
@pytest.mark.parametrize("bad", [range(20, 90), range(50, 120), range(70)], ids=["amid", "last", "first"])
@pytest.mark.parametrize("max_outage_s", [40.0, 7_200.0])
def test_consecutive_bad_rows_do_not_stop_good_ones(tmp_path: Path, bad: range, max_outage_s: float) -> None:
    rows(tmp_path, 120)
    limits, retry = {"max_in_flight": 16}, {"max_outage_s": max_outage_s}
    with serving_moved(bad_rows(frozenset(bad), sends(FAILURE))) as server:
        summary = run(tmp_path, server, limits=limits, retry=retry)
    assert (summary.exit_code, summary.by_status) == (3, {"ok": 50, "error": 70})
    sent = requests_by_row(server)
    assert {row: n for row, n in sent.items() if row not in bad} == dict.fromkeys(set(range(120)) - set(bad), 1)
    assert max(sent.values()) <= 8


ONCE: dict[str, Script] = {
    "429": sends(RATE_LIMIT),
    "429 that asks for a second": sends(WITH_A_WAIT),
    "500": sends(FAILURE),
    "503": sends(BUSY),
    "a reset": resets,
    "a page": sends(answer(PAGE)),
}


def fails_at_first(fault: Script, of: frozenset[int]) -> Script:
    """These rows meet the fault once, and are answered then."""
    met: set[int] = set()

    async def script(exchange: Exchange) -> None:
        if (row := row_of(exchange)) in of and row not in met:
            met.add(row)
            await fault(exchange)
        else:
            await asyncio.sleep(0.2)
            await answers(exchange)

    return script


@pytest.mark.heavy
@pytest.mark.parametrize("fault", ONCE)
def test_rows_failing_once_need_two_requests(tmp_path: Path, fault: str) -> None:
    every = rows(tmp_path, 120)
    with serving_moved(fails_at_first(ONCE[fault], every)) as server:
        summary = run(tmp_path, server, limits={"max_in_flight": 16})
    assert (summary.exit_code, summary.by_status) == (0, {"ok": 120})
    assert set(requests_by_row(server).values()) == {2}
    assert summary.elapsed_s < 18, "120 rows at one a minute would take 36 s on this clock, which is 200 times as fast"


def test_forty_failing_rows_delay_no_other(tmp_path: Path) -> None:
    rows(tmp_path, 120)
    some = frozenset(range(20, 60))
    with serving_moved(fails_at_first(sends(FAILURE), some)) as server:
        summary = run(tmp_path, server, limits={"max_in_flight": 16})
    assert (summary.exit_code, summary.by_status) == (0, {"ok": 120})
    assert max(requests_by_row(server).values()) <= 3


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("bad", "from_request"),
    [(range(0), 80), (range(0), 150), (range(20, 60), 80)],
    ids=["each fails once", "each failed once", "and forty for ever"],
)
@pytest.mark.parametrize("trouble", [FAILURE, BUSY], ids=["500", "503"])
def test_an_outage_among_retries_gives_up_nothing(
    tmp_path: Path, bad: range, from_request: int, trouble: bytes
) -> None:
    """Five minutes of it. Sixteen are in flight when it begins, and as many are sent once more after a first storm. A
    few more are of a kind of row that failed while another was answered, and show nothing about the endpoint.
    """
    every, until_s, during = rows(tmp_path, 120), 0.0, 0
    usual = bad_rows(frozenset(bad), sends(FAILURE)) if bad else fails_at_first(sends(FAILURE), every)

    async def script(exchange: Exchange) -> None:
        nonlocal until_s, during
        now_s = asyncio.get_running_loop().time()
        if not until_s and len(server.exchanges) > from_request:
            until_s = now_s + 300
        if now_s < until_s:
            during += 1
            await exchange.send(trouble)
        else:
            await usual(exchange)

    with serving_moved(script) as server:
        summary = run(tmp_path, server, limits={"max_in_flight": 16})
    assert summary.by_status == ({"ok": 80, "error": 40} if bad else {"ok": 120})
    assert during < 30 + 2 * 16 + MOST_DOUBTED


@pytest.mark.heavy
@pytest.mark.parametrize(("bad_before", "least_s", "most_s"), [(range(20, 60), 0, 150), (range(0), 200, 600)])
def test_usual_failures_blame_the_last_rows(tmp_path: Path, bad_before: range, least_s: float, most_s: float) -> None:
    """Twelve of them always fail. They don't wait for the end of an outage if most rows that failed before were bad."""
    rows(tmp_path, 400)
    bad = frozenset([*bad_before, *range(388, 400)])
    sent_s: list[float] = []
    usual = bad_rows(bad, sends(FAILURE), good_s=2.0)

    async def script(exchange: Exchange) -> None:
        sent_s.append(asyncio.get_running_loop().time())
        await usual(exchange)

    with serving_moved(script) as server:
        summary = run(tmp_path, server, limits={"max_in_flight": 16})
    assert (summary.exit_code, summary.by_status) == (3, {"ok": 400 - len(bad), "error": len(bad)})
    assert least_s <= sent_s[-1] - sent_s[0] <= most_s


@pytest.mark.heavy
def test_an_always_refused_row_is_given_up_early(tmp_path: Path) -> None:
    """At two in flight, ten seconds an answer, three hundred rows take twenty-five minutes; it is given up in ten."""
    rows(tmp_path, 300)
    with serving_moved(bad_rows(frozenset({5}), sends(WITH_A_WAIT), good_s=10.0)) as server:
        summary = run(tmp_path, server, limits={"max_in_flight": 2})
    assert (summary.exit_code, summary.by_status) == (3, {"ok": 299, "error": 1})
    sent = [row_of(exchange) for exchange in server.exchanges]
    assert sent.count(5) in range(24, 28)
    assert sent[-1] != 5


def refused(folder: Path, fault: Script, **retry: float) -> tuple[Summary, Counter[int]]:
    """Rows 5 and 17 of forty are always refused."""
    with serving_moved(bad_rows(frozenset({5, 17}), fault)) as server:
        summary = run(folder, server, retry=retry)
    return summary, requests_by_row(server)


@pytest.mark.heavy
@pytest.mark.parametrize("max_outage_s", [60.0, 7_200.0])
@pytest.mark.parametrize("refusal", [RATE_LIMIT, WITH_A_WAIT], ids=["429", "429 that asks for a second"])
def test_an_always_refused_last_row_is_given_up(tmp_path: Path, refusal: bytes, max_outage_s: float) -> None:
    summary, sent = refused(tmp_path, sends(refusal), max_outage_s=max_outage_s)
    assert (summary.exit_code, summary.by_status) == (3, {"ok": 38, "error": 2})
    assert max(sent.values()) <= 12


def test_a_request_above_the_limit_is_sent_once(tmp_path: Path) -> None:
    summary, sent = refused(tmp_path, sends(TOO_LARGE))
    assert (summary.exit_code, summary.by_status) == (3, {"ok": 38, "error": 2})
    assert set(sent.values()) == {1}


def test_a_minute_limit_gives_up_no_last_row(tmp_path: Path) -> None:
    """Four minutes of refusals."""
    last, until_s = frozenset(range(30, 40)), 0.0

    async def limited(exchange: Exchange) -> None:
        nonlocal until_s
        now_s = asyncio.get_running_loop().time()
        until_s = until_s or now_s + 240
        await (exchange.send(RATE_LIMIT) if now_s < until_s else answers(exchange))

    with serving_moved(bad_rows(last, limited)) as server:
        summary = run(tmp_path, server)
    assert (summary.exit_code, summary.by_status) == (0, {"ok": 40})


def test_only_long_waits_left_end_the_start(tmp_path: Path) -> None:
    """At once; a later start gives the row up."""
    said = answer(b'{"error": {"message": "slow down"}}', "Retry-After: 1000", status="429 Slow Down")
    with serving_moved(bad_rows(frozenset({5}), sends(said))) as server:
        first = run(tmp_path, server)
        second = run(tmp_path, server)
        third = run(tmp_path, server, retry={"max_wait_s": 0.001})
    assert (first.exit_code, first.pending) == (second.exit_code, second.pending) == (5, 1)
    assert "row 5: HTTP 429: the server asks to wait 1000 s" in str(first.reason)
    assert first.elapsed_s < 4.0, "the wait itself would take five seconds on the fast clock"
    assert (third.exit_code, third.by_status) == (3, {"ok": 39, "error": 1})
    assert requests_by_row(server)[5] <= 5, "a lone row is sent twice before it pauses a start"
