"""What a network, a gateway and a broken server do to a whole run: what its rows, attempts and exit code show.

The server is a raw socket that counts its requests, so what was sent does not depend on what the run reports.
"""

import asyncio
import gzip
import re
import ssl
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import pytest

from batchrun import credentials, engine
from batchrun.run_summary import Summary
from batchrun.store.rundir import RunDirectory
from tests.cli_process import KEY, KEY_ENV, holds_key
from tests.endings import MODEL, answer_body
from tests.fault_server import (
    Exchange,
    FaultServer,
    Gap,
    Script,
    answer,
    black_hole,
    chunked,
    gzip_bomb,
    self_signed,
    sends,
    serving_aside,
    serving_moved,
)
from tests.jobs import job_over, write_lines
from tests.moved_clock import MovedClockLoop
from tests.wires import transport_on_test, wire_of_runs

pytestmark = pytest.mark.sampled(6)

__all__ = ["wire_of_runs"]  # the fixture that runs each test on both wires

FAULTY = 5
"""The row that meets the fault; the others are answered."""

QUICK_RETRY = {"backoff_base_s": 0.1}


class Ended(NamedTuple):
    """How a run ended: its summary, its rows if it is complete, and what its server was sent."""

    summary: Summary
    rows: list[dict[str, Any]]

    @property
    def exit_code(self) -> int | None:
        return self.summary.exit_code


def run(folder: Path, server: FaultServer, rows: int = 12, **tables: dict[str, Any]) -> Ended:
    """The run over rows `item 0`, `item 1` … on the server's clock, in this process."""
    source = write_lines(folder / "in.jsonl", [{"text": f"item {row}."} for row in range(rows)])
    fixed = {"url": server.url, "api_key_env": KEY_ENV, "transport": transport_on_test(), "connect_timeout_s": 100.0}
    endpoint = {**fixed, **tables.pop("endpoint", {})}
    job = job_over(source, **{"endpoint": endpoint, "retry": QUICK_RETRY, **tables})
    key = credentials.read(job.endpoint, {KEY_ENV: KEY})
    summary = engine.run(job, RunDirectory(folder / "out"), key, runtime=engine.Runtime(server.new_loop))
    assert holds_key(folder / "out", [KEY.encode()]) == []
    result = pq.read_table(folder / "out" / "completions.parquet").to_pylist() if summary.complete else []
    return Ended(summary, result)


def row_of(exchange: Exchange) -> int:
    found = re.search(rb"item (\d+)\.", exchange.body)
    assert found is not None
    return int(found[1])


def requests_by_row(server: FaultServer) -> Counter[int]:
    """How often each row was sent."""
    return Counter(map(row_of, server.exchanges))


async def answers(exchange: Exchange) -> None:
    await exchange.send(answer(answer_body(f"answer {row_of(exchange)}")))


def meeting(fault: Script, times: int = 1_000) -> Script:
    """One row meets the fault this many times, among others that are answered."""
    met = 0

    async def script(exchange: Exchange) -> None:
        nonlocal met
        if row_of(exchange) != FAULTY or met >= times:
            await answers(exchange)
        else:
            met += 1
            await asyncio.sleep(0.3)  # others are answered meanwhile, so the fault is the row's own
            await fault(exchange)

    return script


def says(body: bytes | None = None, *headers: str, status: str = "200 OK", **changes: Any) -> Script:
    """A whole answer with this body, or a completion with these changes."""
    return sends(answer(answer_body("fine", **changes) if body is None else body, *headers, status=status))


def message(content: Any) -> list[dict[str, Any]]:
    return [{"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}]


async def closes(exchange: Exchange) -> None:
    exchange.writer.close()


async def resets(exchange: Exchange) -> None:
    await asyncio.sleep(0.02)  # what was sent must arrive before the RST
    exchange.reset()


async def resets_late(exchange: Exchange) -> None:
    """Too late to be a connection that was closed while idle."""
    await asyncio.sleep(0.15)
    exchange.reset()


def crawls(start: bytes) -> Script:
    """After these bytes of a good answer, one every tenth of a deadline, and never the last."""

    async def script(exchange: Exchange) -> None:
        await exchange.send(start)
        for byte in answer(answer_body("fine " * 200))[len(start) :]:
            await exchange.send(bytes([byte]))
            await asyncio.sleep(0.3)

    return script


# ── 14: no server ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("where", ["no listener", "no such name", "a black hole"])
def test_an_unreachable_endpoint_ends_the_start_quickly(tmp_path: Path, where: str) -> None:
    """No row fails."""
    with black_hole() as hole:
        url = {
            "no listener": "http://127.0.0.1:9/v1",
            "no such name": "https://nowhere.invalid/v1",
            "a black hole": f"http://127.0.0.1:{hole}/v1",
        }[where]
        started_s = time.monotonic()
        ended = run(tmp_path, FaultServer(url, new_loop=MovedClockLoop))
        assert time.monotonic() - started_s < 10
    assert ended.exit_code == 5
    assert "the endpoint was never reached for 15 seconds" in str(ended.summary.reason)
    assert (ended.summary.pending, ended.summary.by_status, ended.summary.possibly_billed_count) == (12, {}, 0)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("hole", [False, True], ids=["refused", "black hole"])
def test_a_minute_without_server_fails_no_row(tmp_path: Path, hole: bool) -> None:
    """An outage during the run; every row is answered after it."""

    async def slowly(exchange: Exchange) -> None:
        await asyncio.sleep(1.0)
        await answers(exchange)

    with serving_moved(slowly, gap=Gap(after_requests=30, for_s=60.0, hole=hole)) as server:
        ended = run(tmp_path, server, 100)
    assert ended.exit_code == 0
    assert [row["status"] for row in ended.rows] == ["ok"] * 100
    repeated = sum(requests_by_row(server).values()) - 100
    assert repeated <= 64, "only what was in flight when the server went away is sent again"
    assert ended.summary.possibly_billed_count <= 64, "of those, what may have been read before the server went away"


# ── 15, 17, 18: answers that never come, or in pieces ─────────────────────────────────────────────────────────────────

GOOD = answer_body("fine")
CUT = GOOD[:-40]
PAGE = b"<html><body>Welcome</body></html>"
ERROR = b'{"error": {"message": "no luck", "code": "odd"}}'


async def sends_bomb(exchange: Exchange) -> None:
    await exchange.send(answer(gzip_bomb(), "Content-Encoding: gzip"))


class Broken(NamedTuple):
    """An answer that may have been billed, and the part of it that is kept."""

    script: Script
    kind: str
    raw: bytes | None = b""


BROKEN = {
    "silence": Broken(Exchange.silence, "timeout"),
    "the head a byte at a time": Broken(crawls(b"HTTP/1.1 "), "timeout"),
    "the body a byte at a time": Broken(crawls(answer(answer_body("fine " * 200))[:150]), "timeout", None),
    "a reset before a byte": Broken(resets_late, "reset"),
    "a reset in mid-body": Broken(sends(answer(CUT, length=5_000), then=resets), "cut|reset", CUT),
    "a chunked body that is cut": Broken(sends(chunked(CUT, end=False), then=closes), "cut", CUT),
    "a Content-Length that is too long": Broken(sends(answer(CUT, length=5_000), then=closes), "cut", CUT),
    "JSON that is cut": Broken(says(CUT), "unreadable", CUT),
    "gzip that unpacks to a thousand times its size": Broken(sends_bomb, "answer_too_large", None),
    "invalid gzip": Broken(sends(answer(b"no gzip", "Content-Encoding: gzip")), "bad_encoding"),
    "a thousand headers": Broken(sends(answer(GOOD, *(f"X-{n}: x" for n in range(1_000)))), "malformed_http"),
    "a header line of 20 KB": Broken(sends(answer(GOOD, "X-Long: " + "x" * 20_000)), "malformed_http"),
    "a page of HTML": Broken(says(PAGE), "unreadable", PAGE),
    "an error that calls itself 200": Broken(says(ERROR), "error_in_answer", ERROR),
    "no choices": Broken(says(choices=[]), "unreadable", answer_body("fine", choices=[])),
    "a null message": Broken(
        says(choices=[{"index": 0, "message": None, "finish_reason": "stop"}]), "unreadable", None
    ),
}
DEADLINE = {"attempt_timeout_s": 3.0}  # of the real clock, for the other rows too
BOUND = {"max_answer_bytes": 1_000_000}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_answer_is_retried_once(tmp_path: Path, name: str) -> None:
    """It may have been billed, and the part that arrived is kept."""
    broken = BROKEN[name]
    with serving_aside(meeting(broken.script)) as server:
        ended = run(tmp_path, server, endpoint=BOUND | (DEADLINE if broken.kind == "timeout" else {}))
    assert ended.exit_code == 3
    row = ended.rows[FAULTY]
    assert (row["status"], row["attempts"]) == ("error", 2)
    assert row["error"]["kind"] in broken.kind.split("|")
    assert broken.raw is None or row["raw"] == broken.raw
    assert len(row["raw"]) <= 1_000_000
    assert ended.summary.by_status == {"ok": 11, "error": 1}
    assert requests_by_row(server) == Counter({**dict.fromkeys(range(12), 1), FAULTY: 2})
    doubts = [(doubt.row, doubt.n) for doubt in ended.summary.possibly_billed]
    priced = row["prompt_tokens"] is not None  # if its usage arrived, it is billed and not in doubt
    assert doubts == ([] if priced else [(FAULTY, 1), (FAULTY, 2)])


@pytest.mark.parametrize("name", ["silence", "a chunked body that is cut", "a reset before a byte", "a page of HTML"])
def test_a_retried_broken_answer_stays_possibly_billed(tmp_path: Path, name: str) -> None:
    """The second attempt brings the answer."""
    with serving_aside(meeting(BROKEN[name].script, times=1)) as server:
        ended = run(tmp_path, server, endpoint=DEADLINE if BROKEN[name].kind == "timeout" else {})
    assert ended.exit_code == 0
    assert (ended.rows[FAULTY]["status"], ended.rows[FAULTY]["attempts"]) == ("ok", 2)
    assert [(doubt.row, doubt.n) for doubt in ended.summary.possibly_billed] == [(FAULTY, 1)]


WHOLE = {
    "length": sends(answer(GOOD, length=5_000), then=closes),
    "length and a reset": sends(answer(GOOD, length=5_000), then=resets),
    "length and silence": sends(answer(GOOD, length=5_000), then=Exchange.silence),
    "no last chunk": sends(chunked(GOOD, end=False), then=closes),
    "packed without its end": sends(
        answer(gzip.compress(GOOD)[:-8], "Content-Encoding: gzip", length=5_000), then=closes
    ),
}


@pytest.mark.parametrize("name", WHOLE)
def test_an_answer_that_parses_whole_is_paid_once(tmp_path: Path, name: str) -> None:
    """Whatever its framing announced: JSON ends with its last bracket."""
    with serving_aside(meeting(WHOLE[name])) as server:
        ended = run(tmp_path, server, endpoint=DEADLINE if "silence" in name else {})
    assert (ended.exit_code, ended.rows[FAULTY]["content"], ended.rows[FAULTY]["attempts"]) == (0, "fine", 1)
    assert requests_by_row(server) == Counter(range(12))
    assert ended.summary.possibly_billed_count == 0


def test_a_cut_refusal_counts_by_its_status(tmp_path: Path) -> None:
    refusal = answer(b'{"error": {"mess', "Retry-After: 0", status="429 Too Many Requests", length=500)
    with serving_moved(meeting(sends(refusal, then=closes), times=3)) as server:
        ended = run(tmp_path, server)
    assert (ended.exit_code, ended.rows[FAULTY]["status"], requests_by_row(server)[FAULTY]) == (0, "ok", 4)
    assert ended.summary.possibly_billed_count == 0


@pytest.mark.heavy
def test_a_valid_answer_may_have_ten_megabytes(tmp_path: Path) -> None:
    content = "0123456789" * 1_000_000
    with serving_moved(meeting(says(choices=message(content)))) as server:
        ended = run(tmp_path, server)
    assert ended.exit_code == 0
    assert ended.rows[FAULTY]["content"] == content
    assert requests_by_row(server)[FAULTY] == 1


def test_a_compressed_answer_is_an_answer(tmp_path: Path) -> None:
    with serving_moved(meeting(sends(answer(gzip.compress(GOOD), "Content-Encoding: gzip")))) as server:
        ended = run(tmp_path, server)
    assert (ended.exit_code, ended.rows[FAULTY]["content"]) == (0, "fine")


# ── 16: connections that were closed while idle ───────────────────────────────────────────────────────────────────────


def test_closed_keep_alive_costs_no_attempt(tmp_path: Path) -> None:
    """A server that closes every connection after its answer causes no retry and no request twice."""

    async def answers_and_closes(exchange: Exchange) -> None:
        await answers(exchange)
        exchange.writer.close()

    with serving_moved(answers_and_closes) as server:
        ended = run(tmp_path, server, 200)
    assert ended.exit_code == 0
    assert {row["attempts"] for row in ended.rows} == {1}
    assert requests_by_row(server) == Counter(range(200))
    assert ended.summary.possibly_billed_count == 0


# ── 19, 23: answers that are odd ──────────────────────────────────────────────────────────────────────────────────────


class Odd(NamedTuple):
    """An answer that can be read in part: its row's status, and some of its columns."""

    script: Script
    status: str
    columns: dict[str, Any]


WITHOUT_USAGE = {"prompt_tokens": None, "total_tokens": None, "cost_usd": None}
ODD = {
    "null content": Odd(says(choices=message(None)), "empty", {"content": None, "prompt_tokens": 10}),
    "content that is a list of parts": Odd(
        says(choices=message([{"type": "text", "text": part} for part in ("fi", "ne")])),
        "ok",
        {"content": "fine"},
    ),
    "content that is a number": Odd(says(choices=message(7)), "ok", {"content": "7"}),
    "no usage": Odd(says(usage=None), "ok", {"content": "fine", **WITHOUT_USAGE}),
    "half a usage": Odd(says(usage={"prompt_tokens": 5}), "ok", {"content": "fine", **WITHOUT_USAGE}),
    "usage as strings": Odd(
        says(usage={"prompt_tokens": "10", "completion_tokens": "2", "total_tokens": "12"}),
        "ok",
        {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12},
    ),
    "unknown fields": Odd(says(novel={"a": [1]}, service_tier="x"), "ok", {"content": "fine"}),
    "no id, and created as text": Odd(
        says(id=None, created="today"), "ok", {"completion_id": None, "created": None, "content": "fine"}
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_answer_counts_at_first_attempt(tmp_path: Path, name: str) -> None:
    odd = ODD[name]
    with serving_moved(meeting(odd.script)) as server:
        ended = run(tmp_path, server)
    row = ended.rows[FAULTY]
    assert (row["status"], row["attempts"]) == (odd.status, 1)
    assert {name: row[name] for name in odd.columns} == odd.columns
    assert ended.exit_code == (0 if odd.status == "ok" else 3)
    assert ended.summary.without_usage == (row["total_tokens"] is None)
    assert ended.summary.possibly_billed_count == 0


def test_an_error_inside_200_has_its_status(tmp_path: Path) -> None:
    refused = b'{"error": {"message": "no such parameter", "code": 400}}'
    with serving_moved(meeting(says(refused))) as server:
        ended = run(tmp_path, server)
    row = ended.rows[FAULTY]
    assert (row["status"], row["attempts"], row["error"]["kind"]) == ("error", 1, "bad_request")
    assert ended.summary.possibly_billed_count == 0


def test_an_answer_of_another_model_is_kept(tmp_path: Path) -> None:
    """Its model is shown and counted under the name that the answer states."""
    with serving_moved(meeting(says(model="another-model"))) as server:
        ended = run(tmp_path, server)
    assert ended.exit_code == 0
    assert {row["status"] for row in ended.rows} == {"ok"}
    assert (ended.rows[FAULTY]["model"], ended.rows[0]["model"]) == ("another-model", MODEL)
    assert ended.summary.models == {MODEL: 11, "another-model": 1}


# ── 20: redirects and certificates ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("status", ["302 Found", "307 Temporary Redirect"])
def test_a_redirect_stops_the_run(tmp_path: Path, status: str) -> None:
    """The other server sees neither the key nor a prompt."""
    with (
        serving_moved(answers) as other,
        serving_moved(says(b"", f"Location: {other.url}", status=status)) as server,
    ):
        ended = run(tmp_path, server)
        assert other.connections == 0
    assert len(server.exchanges) <= 9, "the first eight, and the one that was to confirm"
    assert ended.exit_code == 2
    assert (ended.summary.pending, ended.summary.by_status) == (12, {})
    assert (
        ended.summary.reason
        == f"HTTP {status[:3]}: the server redirects to {other.url}, and redirects are not followed"
    )


def test_an_untrusted_certificate_stops_the_run(tmp_path: Path) -> None:
    """Nothing is sent before that."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(self_signed(tmp_path))
    with serving_moved(answers, context) as server:
        ended = run(tmp_path, server)
        assert server.exchanges == []
    assert ended.exit_code == 2
    assert (ended.summary.pending, ended.summary.by_status) == (12, {})
    assert "certificate" in str(ended.summary.reason).lower()


# ── 21: how long to wait ──────────────────────────────────────────────────────────────────────────────────────────────


def date(seconds: float, **since: int) -> str:
    return format_datetime(datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=seconds, **since), usegmt=True)


WAITS: dict[str, tuple[tuple[str, ...], float]] = {
    "0": (("Retry-After: 0",), 0),
    "-1": (("Retry-After: -1",), 0),
    "1e9": (("Retry-After: 1e9",), 0),
    "abc": (("Retry-After: abc",), 0),
    "a date that is past": ((f"Retry-After: {date(-3600)}",), 0),
    "seconds": (("Retry-After: 20",), 20),
    "milliseconds": (("retry-after-ms: 2500",), 2.5),
    "milliseconds before seconds": (("Retry-After: 60", "retry-after-ms: 2500"), 2.5),
    "two of them": (("Retry-After: 3", "Retry-After: 500"), 3),
    "a date by a clock that is days behind": ((f"Date: {date(0, days=-9)}", f"Retry-After: {date(20, days=-9)}"), 20),
    "a date by a clock that is days ahead": ((f"Date: {date(0, days=9)}", f"Retry-After: {date(20, days=9)}"), 20),
}


@pytest.mark.parametrize("name", WAITS)
def test_retry_after_is_obeyed_within_bounds(tmp_path: Path, name: str) -> None:
    """The refused row waits that long; the others don't wait."""
    headers, wait_s = WAITS[name]
    times: dict[bytes, list[float]] = {}

    async def refuses_once(exchange: Exchange) -> None:
        first = not times
        times.setdefault(exchange.body, []).append(asyncio.get_running_loop().time())
        if first:
            await exchange.send(answer(b'{"error": {"message": "slow down"}}', *headers, status="429 Slow Down"))
        else:
            await answers(exchange)

    with serving_moved(refuses_once) as server:
        ended = run(tmp_path, server, limits={"max_in_flight": 1})
    assert ended.exit_code == 0
    assert {row["status"] for row in ended.rows} == {"ok"}
    (refused_s, again_s), *others = times.values()
    assert wait_s <= again_s - refused_s <= wait_s + 30, "Retry-After and jitter"
    assert [len(each) for each in others] == [1] * 11
    if wait_s == 20:
        assert others[0][0] < again_s


def test_an_excessive_retry_after_pauses_the_run(tmp_path: Path) -> None:
    """No row fails."""
    refusal = says(b'{"error": {"message": "slow down"}}', "Retry-After: 1000000000", status="429 Slow Down")
    with serving_moved(refusal) as server:
        ended = run(tmp_path, server)
    assert ended.exit_code == 5
    assert "the server asks to wait 1000000000 s" in str(ended.summary.reason)
    assert (ended.summary.pending, ended.summary.by_status) == (12, {})
    assert len(server.exchanges) <= 9


# ── 26: a refusal of one row ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_refused_last_row_pauses_once(tmp_path: Path) -> None:
    """The next start fails the row."""
    refusal = b'{"error": {"message": "not for you"}}'
    with serving_moved(meeting(says(refusal, status="403 Forbidden"))) as server:
        first = run(tmp_path, server, 6)  # the refused row is the last
        second = run(tmp_path, server, 6)
    assert (first.exit_code, first.summary.pending) == (5, 1)
    assert (second.exit_code, second.summary.pending) == (3, 0)
    assert (second.rows[FAULTY]["status"], second.rows[FAULTY]["error"]["kind"]) == ("error", "forbidden")
    assert requests_by_row(server) == Counter({**dict.fromkeys(range(5), 1), FAULTY: 3})


# ── 22: minutes of failures ────────────────────────────────────────────────────────────────────────────────

RATE_LIMIT = answer(b'{"error": {"message": "Rate limit reached"}}', status="429 Too Many Requests")
WITH_A_WAIT = answer(b'{"error": {"message": "Rate limit reached"}}', "Retry-After: 1", status="429 Too Many Requests")
FAILURE = answer(b'{"error": {"message": "The server had an error"}}', status="500 Internal Server Error")
BUSY = answer(b'{"error": {"message": "The server is overloaded"}}', status="503 Service Unavailable")


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("trouble", "from_request"),
    [
        pytest.param(RATE_LIMIT, 1, id="429 from the start"),
        pytest.param(RATE_LIMIT, 200, id="429 in mid-run"),
        pytest.param(WITH_A_WAIT, 200, id="429 that asks for a second"),
        pytest.param(FAILURE, 1, id="500 from the start"),
        pytest.param(FAILURE, 200, id="500 in mid-run"),
        pytest.param(BUSY, 200, id="503 in mid-run"),
    ],
)
def test_five_minutes_of_trouble_need_few_requests(tmp_path: Path, trouble: bytes, from_request: int) -> None:
    """Ten refusals in a row are a storm, and three more requests are out by then. Four probes a second apart follow,
    five that double their wait, and six or fewer at 45 seconds. In a second storm three more may be refused: up to 31
    with the worst jitter, and fewer than thirty with this one.
    """
    served, refused, well_at_s = 0, 0, 0.0

    async def in_trouble(exchange: Exchange) -> None:
        nonlocal served, refused, well_at_s
        served += 1
        now_s = asyncio.get_running_loop().time()
        if served == from_request:
            well_at_s = now_s + 300
        if served >= from_request and now_s < well_at_s:
            refused += 1
            await exchange.send(trouble)
        else:
            await answers(exchange)

    with serving_moved(in_trouble) as server:
        ended = run(tmp_path, server, 300, limits={"max_in_flight": 4})
    assert ended.exit_code == 0
    assert ended.summary.by_status == {"ok": 300}
    assert 3 <= refused < 30
    assert len(server.exchanges) == 300 + refused
    assert ended.summary.possibly_billed_count == 0


@pytest.mark.heavy
def test_random_failures_of_a_third_fail_nothing(tmp_path: Path) -> None:
    chance = Random(22)

    async def fails_often(exchange: Exchange) -> None:
        await asyncio.sleep(0.1)
        await (exchange.send(FAILURE) if chance.random() < 0.3 else answers(exchange))

    with serving_moved(fails_often) as server:
        ended = run(tmp_path, server, 1_000)
    assert ended.exit_code == 0
    assert ended.summary.by_status == {"ok": 1_000}
    assert max(row["attempts"] for row in ended.rows) > 4, "four failures in a row would have failed it"
