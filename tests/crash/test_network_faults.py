"""What a network, a gateway and a clumsy server do to a whole run: each line of it is a row, an attempt, an exit code.

The server is a raw socket that counts what it was sent, so it says what was asked and how often, whatever the run says.
"""

import asyncio
import gzip
import re
import ssl
import time
import zlib
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
from tests.fast_clock import fast_clock, patient
from tests.fault_server import (
    Exchange,
    FaultServer,
    Gap,
    Script,
    answer,
    black_hole,
    chunked,
    self_signed,
    sends,
    serving_aside,
)
from tests.jobs import job_over, write_lines
from tests.wires import transport_on_test, wire_of_runs

pytestmark = pytest.mark.sampled(6)

__all__ = ["wire_of_runs"]  # the fixture that runs each test on both wires

FAULTY = 5
"""The row that meets the fault; the others are answered."""

QUICK_RETRY = {"backoff_base_s": 0.1}


class Told(NamedTuple):
    """How a run ended: its summary, its rows if it is complete, and what its server was sent."""

    summary: Summary
    rows: list[dict[str, Any]]

    @property
    def exit_code(self) -> int | None:
        return self.summary.exit_code


def ask(folder: Path, url: str, rows: int = 12, *, speed: float = 10.0, **tables: dict[str, Any]) -> Told:
    """The run over rows `item 0`, `item 1` … on a fast clock, in this process."""
    source = write_lines(folder / "in.jsonl", [{"text": f"item {row}."} for row in range(rows)])
    fixed = {
        "url": url,
        "api_key_env": KEY_ENV,
        "transport": transport_on_test(),
        "connect_timeout_s": patient(speed),
    }
    endpoint = {**fixed, **tables.pop("endpoint", {})}
    job = job_over(source, **{"endpoint": endpoint, "retry": QUICK_RETRY, **tables})
    key = credentials.read(job.endpoint, {KEY_ENV: KEY})
    summary = engine.run(job, RunDirectory(folder / "out"), key, runtime=engine.Runtime(fast_clock(speed)))
    assert holds_key(folder / "out", [KEY.encode()]) == []
    result = pq.read_table(folder / "out" / "completions.parquet").to_pylist() if summary.complete else []
    return Told(summary, result)


def row_of(exchange: Exchange) -> int:
    found = re.search(rb"item (\d+)\.", exchange.body)
    assert found is not None
    return int(found[1])


def asked_for(server: FaultServer) -> Counter[int]:
    """How often each row was sent."""
    return Counter(map(row_of, server.exchanges))


async def answers(exchange: Exchange) -> None:
    await exchange.send(answer(answer_body(f"answer {row_of(exchange)}")))


def meeting(fault: Script, times: int = 1_000) -> Script:
    """One row meets the fault so many times, in the midst of others that are answered."""
    met = 0

    async def script(exchange: Exchange) -> None:
        nonlocal met
        if row_of(exchange) != FAULTY or met >= times:
            await answers(exchange)
        else:
            met += 1
            await asyncio.sleep(0.03)  # others are answered meanwhile, so that this is the row's own
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
    await asyncio.sleep(0.02)  # so that what was sent arrives before the RST
    exchange.reset()


async def resets_late(exchange: Exchange) -> None:
    """Too late for a connection that was closed while idle."""
    await asyncio.sleep(0.15)
    exchange.reset()


def crawls(start: bytes) -> Script:
    """After these bytes of a good answer, one every tenth of a deadline, and never the last."""

    async def script(exchange: Exchange) -> None:
        await exchange.send(start)
        for byte in answer(answer_body("fine " * 200))[len(start) :]:
            await exchange.send(bytes([byte]))
            await asyncio.sleep(0.03)

    return script


# ── 14: nobody there ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("where", ["nobody listens", "no such name", "a black hole"])
def test_an_unreachable_endpoint_ends_the_start_quickly(tmp_path: Path, where: str) -> None:
    """No row fails."""
    with black_hole() as hole:
        url = {
            "nobody listens": "http://127.0.0.1:9/v1",
            "no such name": "https://nowhere.invalid/v1",
            "a black hole": f"http://127.0.0.1:{hole}/v1",
        }[where]
        begun = time.monotonic()
        told = ask(tmp_path, url, speed=100, endpoint={"connect_timeout_s": 2.0})
        assert time.monotonic() - begun < 10
    assert told.exit_code == 5
    assert "the endpoint was never reached for 15 seconds" in str(told.summary.reason)
    assert (told.summary.pending, told.summary.by_status, told.summary.possibly_billed_count) == (12, {}, 0)


@pytest.mark.parametrize("hole", [False, True], ids=["refused", "black hole"])
def test_a_minute_without_server_fails_no_row(tmp_path: Path, hole: bool) -> None:
    """An outage in mid run; every row is answered after it."""

    async def slowly(exchange: Exchange) -> None:
        await asyncio.sleep(0.005)
        await answers(exchange)

    with serving_aside(slowly, gap=Gap(after_requests=30, for_s=0.3, hole=hole)) as server:
        told = ask(tmp_path, server.url, 100, speed=200, endpoint={"connect_timeout_s": 4.0})
    assert told.exit_code == 0
    assert [row["status"] for row in told.rows] == ["ok"] * 100
    repeated = sum(asked_for(server).values()) - 100
    assert repeated <= 64, "only what was in flight when the server went away is asked again"
    assert told.summary.possibly_billed_count <= 64, "of those, what may have been read before the server went away"


# ── 15, 17, 18: answers that never come, or in pieces ─────────────────────────────────────────────────────────────────

PACKER = zlib.compressobj(9, zlib.DEFLATED, 31)
BOMB = b"".join([*(PACKER.compress(bytes(1_000_000)) for _ in range(200)), PACKER.flush()])
GOOD = answer_body("fine")
CUT = GOOD[:-40]
PAGE = b"<html><body>Welcome</body></html>"
ERROR = b'{"error": {"message": "no luck", "code": "odd"}}'


class Broken(NamedTuple):
    """An answer that may have been paid for, and what is kept of it."""

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
    "a Content-Length that is too long": Broken(sends(answer(GOOD, length=5_000), then=closes), "cut", GOOD),
    "JSON that is cut": Broken(says(CUT), "unreadable", CUT),
    "gzip that unpacks to a thousand times its size": Broken(
        sends(answer(BOMB, "Content-Encoding: gzip")), "answer_too_large", None
    ),
    "gzip that is none": Broken(sends(answer(b"no gzip", "Content-Encoding: gzip")), "bad_encoding"),
    "a thousand headers": Broken(sends(answer(GOOD, *(f"X-{n}: x" for n in range(1_000)))), "malformed_http"),
    "a header line of 20 KB": Broken(sends(answer(GOOD, "X-Long: " + "x" * 20_000)), "malformed_http"),
    "a page of HTML": Broken(says(PAGE), "unreadable", PAGE),
    "an error that calls itself 200": Broken(says(ERROR), "error_in_answer", ERROR),
    "no choices": Broken(says(choices=[]), "unreadable", answer_body("fine", choices=[])),
    "a null message": Broken(
        says(choices=[{"index": 0, "message": None, "finish_reason": "stop"}]), "unreadable", None
    ),
}
DEADLINE = {"attempt_timeout_s": 0.3, "max_answer_bytes": 1_000_000}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_answer_is_retried_once(tmp_path: Path, name: str) -> None:
    """It may have been billed, and what came of it is kept."""
    broken = BROKEN[name]
    with serving_aside(meeting(broken.script)) as server:
        told = ask(tmp_path, server.url, endpoint=DEADLINE)
    assert told.exit_code == 3
    row = told.rows[FAULTY]
    assert (row["status"], row["attempts"]) == ("error", 2)
    assert row["error"]["kind"] in broken.kind.split("|")
    assert broken.raw is None or row["raw"] == broken.raw
    assert len(row["raw"]) <= 1_000_000
    assert told.summary.by_status == {"ok": 11, "error": 1}
    assert asked_for(server) == Counter({**dict.fromkeys(range(12), 1), FAULTY: 2})
    doubts = [(doubt.row, doubt.n) for doubt in told.summary.possibly_billed]
    priced = row["prompt_tokens"] is not None  # its usage was in what came: then it is billed, not in doubt
    assert doubts == ([] if priced else [(FAULTY, 1), (FAULTY, 2)])


@pytest.mark.parametrize("name", ["silence", "a chunked body that is cut", "a reset before a byte", "a page of HTML"])
def test_a_retried_broken_answer_stays_possibly_billed(tmp_path: Path, name: str) -> None:
    """The second attempt brings the answer."""
    with serving_aside(meeting(BROKEN[name].script, times=1)) as server:
        told = ask(tmp_path, server.url, endpoint=DEADLINE)
    assert told.exit_code == 0
    assert (told.rows[FAULTY]["status"], told.rows[FAULTY]["attempts"]) == ("ok", 2)
    assert [(doubt.row, doubt.n) for doubt in told.summary.possibly_billed] == [(FAULTY, 1)]


def test_a_valid_answer_may_have_ten_megabytes(tmp_path: Path) -> None:
    content = "0123456789" * 1_000_000
    with serving_aside(meeting(says(choices=message(content)))) as server:
        told = ask(tmp_path, server.url)
    assert told.exit_code == 0
    assert told.rows[FAULTY]["content"] == content
    assert asked_for(server)[FAULTY] == 1


def test_a_compressed_answer_is_an_answer(tmp_path: Path) -> None:
    with serving_aside(meeting(sends(answer(gzip.compress(GOOD), "Content-Encoding: gzip")))) as server:
        told = ask(tmp_path, server.url)
    assert (told.exit_code, told.rows[FAULTY]["content"]) == (0, "fine")


# ── 16: connections that were closed while idle ───────────────────────────────────────────────────────────────────────


def test_closed_keep_alive_costs_no_attempt(tmp_path: Path) -> None:
    """A server that closes every connection after its answer causes no retry and no request twice."""

    async def answers_and_closes(exchange: Exchange) -> None:
        await answers(exchange)
        exchange.writer.close()

    # on the clock of the network: on a fast one, a connection counts as kept before its end can have arrived
    with serving_aside(answers_and_closes) as server:
        told = ask(tmp_path, server.url, 200, speed=1.0)
    assert told.exit_code == 0
    assert {row["attempts"] for row in told.rows} == {1}
    assert asked_for(server) == Counter(range(200))
    assert told.summary.possibly_billed_count == 0


# ── 19, 23: answers that are odd ──────────────────────────────────────────────────────────────────────────────────────


class Odd(NamedTuple):
    """An answer that is read as far as it goes: its row's status, and some of its columns."""

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
    "fields that nobody knows": Odd(says(novel={"a": [1]}, service_tier="x"), "ok", {"content": "fine"}),
    "no id, and created as text": Odd(
        says(id=None, created="today"), "ok", {"completion_id": None, "created": None, "content": "fine"}
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_answer_counts_at_first_attempt(tmp_path: Path, name: str) -> None:
    odd = ODD[name]
    with serving_aside(meeting(odd.script)) as server:
        told = ask(tmp_path, server.url)
    row = told.rows[FAULTY]
    assert (row["status"], row["attempts"]) == (odd.status, 1)
    assert {name: row[name] for name in odd.columns} == odd.columns
    assert told.exit_code == (0 if odd.status == "ok" else 3)
    assert told.summary.without_usage == (row["total_tokens"] is None)
    assert told.summary.possibly_billed_count == 0


def test_an_error_inside_200_has_its_status(tmp_path: Path) -> None:
    refused = b'{"error": {"message": "no such parameter", "code": 400}}'
    with serving_aside(meeting(says(refused))) as server:
        told = ask(tmp_path, server.url)
    row = told.rows[FAULTY]
    assert (row["status"], row["attempts"], row["error"]["kind"]) == ("error", 1, "bad_request")
    assert told.summary.possibly_billed_count == 0


def test_an_answer_of_another_model_is_kept(tmp_path: Path) -> None:
    """It is shown as it is and counted under the name it states."""
    with serving_aside(meeting(says(model="another-model"))) as server:
        told = ask(tmp_path, server.url)
    assert told.exit_code == 0
    assert {row["status"] for row in told.rows} == {"ok"}
    assert (told.rows[FAULTY]["model"], told.rows[0]["model"]) == ("another-model", MODEL)
    assert told.summary.models == {MODEL: 11, "another-model": 1}


# ── 20: the way to somebody else ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("status", ["302 Found", "307 Temporary Redirect"])
def test_a_redirect_stops_the_run(tmp_path: Path, status: str) -> None:
    """The other server sees neither the key nor a prompt."""
    with serving_aside(answers) as other, serving_aside(says(b"", f"Location: {other.url}", status=status)) as server:
        told = ask(tmp_path, server.url)
        assert other.connections == 0
    assert len(server.exchanges) <= 9, "the first eight, and the one that was to confirm"
    assert told.exit_code == 2
    assert (told.summary.pending, told.summary.by_status) == (12, {})
    assert f"HTTP {status[:3]}" in str(told.summary.reason)


def test_an_untrusted_certificate_stops_the_run(tmp_path: Path) -> None:
    """Nothing is sent before that."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(self_signed(tmp_path))
    with serving_aside(answers, context) as server:
        told = ask(tmp_path, server.url)
        assert server.exchanges == []
    assert told.exit_code == 2
    assert (told.summary.pending, told.summary.by_status) == (12, {})
    assert "certificate" in str(told.summary.reason).lower()


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
SPEED = 50.0


@pytest.mark.parametrize("name", WAITS)
def test_retry_after_is_obeyed_within_bounds(tmp_path: Path, name: str) -> None:
    """Its row waits so long, and the others don't."""
    headers, wait_s = WAITS[name]
    times: dict[bytes, list[float]] = {}

    async def refuses_once(exchange: Exchange) -> None:
        first = not times
        times.setdefault(exchange.body, []).append(time.monotonic() * SPEED)
        if first:
            await exchange.send(answer(b'{"error": {"message": "slow down"}}', *headers, status="429 Slow Down"))
        else:
            await answers(exchange)

    with serving_aside(refuses_once) as server:
        told = ask(tmp_path, server.url, speed=SPEED, limits={"max_in_flight": 1})
    assert told.exit_code == 0
    assert {row["status"] for row in told.rows} == {"ok"}
    (refused_s, again_s), *others = times.values()
    assert wait_s <= again_s - refused_s <= wait_s + 30, "asked for, jitter, and a busy machine fifty times as fast"
    assert [len(each) for each in others] == [1] * 11
    if wait_s == 20:
        assert others[0][0] < again_s


def test_an_excessive_retry_after_pauses_the_run(tmp_path: Path) -> None:
    """No row fails."""
    refusal = says(b'{"error": {"message": "slow down"}}', "Retry-After: 1000000000", status="429 Slow Down")
    with serving_aside(refusal) as server:
        told = ask(tmp_path, server.url)
    assert told.exit_code == 5
    assert "the server asks to wait 1000000000 s" in str(told.summary.reason)
    assert (told.summary.pending, told.summary.by_status) == (12, {})
    assert len(server.exchanges) <= 9


# ── 26: whose refusal it was ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_refused_last_row_pauses_once(tmp_path: Path) -> None:
    """The next start gives the row up."""
    refusal = b'{"error": {"message": "not for you"}}'
    with serving_aside(meeting(says(refusal, status="403 Forbidden"))) as server:
        first = ask(tmp_path, server.url, 6)  # the refused row is the last
        second = ask(tmp_path, server.url, 6)
    assert (first.exit_code, first.summary.pending) == (5, 1)
    assert (second.exit_code, second.summary.pending) == (3, 0)
    assert (second.rows[FAULTY]["status"], second.rows[FAULTY]["error"]["kind"]) == ("error", "forbidden")
    assert asked_for(server) == Counter({**dict.fromkeys(range(5), 1), FAULTY: 3})


# ── 22: minutes of nothing but trouble ────────────────────────────────────────────────────────────────────────────────

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
    """Requests that are out when the trouble begins are refused as well, and once more after a first storm of 429, when
    the gate lowers the rate and tries all of them: seven here, twice.
    """
    speed, served, refused, well_at_s = 200.0, 0, 0, 0.0

    async def in_trouble(exchange: Exchange) -> None:
        nonlocal served, refused, well_at_s
        served += 1
        if served == from_request:
            well_at_s = time.monotonic() + 300 / speed
        if served >= from_request and time.monotonic() < well_at_s:
            refused += 1
            await exchange.send(trouble)
        else:
            await answers(exchange)

    with serving_aside(in_trouble) as server:
        told = ask(tmp_path, server.url, 300, speed=speed, limits={"max_in_flight": 8})
    assert told.exit_code == 0
    assert told.summary.by_status == {"ok": 300}
    assert 3 <= refused < 30
    assert len(server.exchanges) == 300 + refused
    assert told.summary.possibly_billed_count == 0


@pytest.mark.heavy
def test_random_failures_of_a_third_fail_nothing(tmp_path: Path) -> None:
    chance = Random(22)

    async def fails_often(exchange: Exchange) -> None:
        await asyncio.sleep(0.002)
        await (exchange.send(FAILURE) if chance.random() < 0.3 else answers(exchange))

    with serving_aside(fails_often) as server:
        told = ask(tmp_path, server.url, 1_000, speed=50)
    assert told.exit_code == 0
    assert told.summary.by_status == {"ok": 1_000}
    assert max(row["attempts"] for row in told.rows) > 4, "four failures in a row would have failed it"
