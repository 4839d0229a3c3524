"""Answers and refusals as other servers send them, through a whole run: what becomes of the rows and of the run."""

import asyncio
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from batchrun import credentials, engine
from batchrun.dispatch.hooks import Hooks
from batchrun.job.settings import Endpoint
from batchrun.report.closing import in_words
from batchrun.run_summary import Summary
from batchrun.startup.run_options import RunOptions
from batchrun.store import chunks
from batchrun.store.rundir import RunDirectory
from tests.cli_process import KEY, KEY_ENV
from tests.crash.test_network_faults import requests_by_row, row_of
from tests.endings import answer_body
from tests.fault_server import Exchange, FaultServer, Script, answer, serving_moved
from tests.jobs import job_over, write_lines

FIRST = RunOptions()


def run(
    folder: Path,
    server: FaultServer,
    rows: int = 12,
    *,
    notes: list[str] | None = None,
    requested: RunOptions = FIRST,
    **tables: Any,
) -> tuple[Summary, list[dict[str, Any]]]:
    """The run over rows `item 0`, `item 1` … on the server's clock, and its result if it is complete."""
    source = write_lines(folder / "in.jsonl", [{"text": f"item {row}."} for row in range(rows)])
    endpoint = {"url": server.url, "api_key_env": KEY_ENV}
    job = job_over(source, **{"endpoint": endpoint, "retry": {}, **tables})
    key = credentials.read(job.endpoint, {KEY_ENV: KEY})
    messages: list[str] = [] if notes is None else notes
    hooks = Hooks(note=messages.append)
    directory = RunDirectory(folder / "out")
    summary = engine.run(job, directory, key, options=requested, hooks=hooks, runtime=engine.Runtime(server.new_loop))
    result = pq.read_table(directory.completions).to_pylist() if summary.complete else []
    return summary, result


def says(said: Callable[[int, int], bytes]) -> Script:
    """A server that answers with the response that `said` gives for a row and how often it came."""
    times: dict[int, int] = {}

    async def script(exchange: Exchange) -> None:
        row = row_of(exchange)
        times[row] = times.get(row, 0) + 1
        await asyncio.sleep(row / 1_000)  # not all at one moment: rows before this one are answered before it
        await exchange.send(said(row, times[row]))

    return script


def refused(status: str, said: object, *headers: str) -> bytes:
    return answer(said if isinstance(said, bytes) else json.dumps(said).encode(), *headers, status=status)


def choice(content: str | None = "Fine.", reason: str | None = "stop", **more: object) -> bytes:
    message = {"role": "assistant", "content": content, **{k: v for k, v in more.items() if k == "refusal"}}
    own = {k: v for k, v in more.items() if k != "refusal"}
    return answer(answer_body(choices=[{"index": 0, "message": message, "finish_reason": reason, **own}]))


def events(*chunks: object) -> bytes:
    body = b"".join(b"data: " + json.dumps(each).encode() + b"\n\n" for each in chunks) + b"data: [DONE]\n\n"
    return answer(body).replace(b"application/json", b"text/event-stream")


def delta(content: dict[str, object], reason: str | None = None, **more: object) -> dict[str, object]:
    return {"model": "m", "choices": [{"index": 0, "delta": content, "finish_reason": reason, **more}]}


OUTAGES = [
    {"error": {"message": "No available workers (all circuits open or unhealthy)"}},
    {"detail": "Worker died"},
    {"error": {"message": "Engine is dead", "code": 503}},
    b"upstream connect error or disconnect/reset before headers",
]


OTHER_APIS: dict[str, tuple[object, str]] = {
    "Ollama's own API": (
        {"model": "llama3.2", "message": {"role": "assistant", "content": "Hi"}, "done": True, "eval_count": 9},
        "http://HOST:11434/v1",
    ),
    "Anthropic's Messages API": (
        {
            **{"id": "msg_1", "type": "message", "role": "assistant", "content": [{"type": "text", "text": "Hi"}]},
            **{"stop_reason": "end_turn", "usage": {"input_tokens": 20, "output_tokens": 5}},
        },
        "https://api.anthropic.com/v1",
    ),
    "Google's Gemini API": (
        {
            "candidates": [{"content": {"parts": [{"text": "Hi"}], "role": "model"}, "finishReason": "STOP"}],
            "usageMetadata": {"promptTokenCount": 4, "candidatesTokenCount": 3, "totalTokenCount": 7},
        },
        "https://generativelanguage.googleapis.com/v1beta/openai",
    ),
    "Cohere's own API": (
        {
            **{"id": "c", "finish_reason": "COMPLETE"},
            "message": {"role": "assistant", "content": [{"type": "text", "text": "Hi"}]},
        },
        "https://api.cohere.ai/compatibility/v1",
    ),
    "a list of models": ({"object": "list", "data": [{"id": "m", "object": "model"}]}, "without /models"),
}


@pytest.mark.parametrize("api", OTHER_APIS)
def test_another_api_stops_the_run_after_two_answers(tmp_path: Path, api: str) -> None:
    """No row fails; each request that was answered so is named as possibly billed, or has its cost."""
    body, url = OTHER_APIS[api]
    with serving_moved(says(lambda row, time: answer(json.dumps(body).encode()))) as server:
        summary, _ = run(tmp_path, server, rows=400)
    assert (summary.exit_code, summary.pending, summary.by_status) == (2, 400, {})
    assert len(server.exchanges) <= 9, "those in flight at the first answer, and the row that is sent next"
    priced = sum(line.attempts for line in summary.totals if line.cost_usd or line.unpriced)
    assert summary.possibly_billed_count + priced == len(server.exchanges)
    closing = in_words(summary, requests_per_minute=None, max_failures=0, endpoint=Endpoint(url=server.url))
    said = list(closing)
    assert any(line.startswith("stopped") and f"comes from {api}" in line for line in said)
    assert any(line.startswith("fix") and "endpoint.url: " in line and url in line for line in said)


BLOCKED: dict[str, dict[str, Any]] = {
    "no choice": {
        "choices": [],
        "prompt_filter_results": [{"content_filter_results": {"hate": {"filtered": True, "severity": "high"}}}],
    },
    "no candidate": {"promptFeedback": {"blockReason": "PROHIBITED_CONTENT"}},
    "no message": {"choices": [{"index": 0, "finish_reason": "content_filter", "message": None}]},
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("form", BLOCKED)
def test_a_question_blocked_with_a_200_is_filtered(tmp_path: Path, form: str, stream: bool) -> None:
    """At once: no retry changes that. The filter's results of a question that passed block nothing."""
    usage = {"prompt_tokens": 9, "completion_tokens": 0, "total_tokens": 9}
    body = {**BLOCKED[form], "usage": usage}
    passed: dict[str, Any] = {"prompt_filter_results": [{"content_filter_results": {"hate": {"filtered": False}}}]}
    whole = answer(answer_body(**passed)), answer(json.dumps(body).encode())
    streamed = events({**passed, "choices": []}, delta({"content": "Fine."}, "stop")), events(body)
    good, blocked = streamed if stream else whole
    with serving_moved(says(lambda row, time: blocked if row % 3 == 0 else good)) as server:
        summary, rows = run(tmp_path, server, rows=30)
    assert summary.by_status == {"ok": 20, "filtered": 10}
    assert len(server.exchanges) == 30
    assert summary.possibly_billed_count == 0
    assert {row["error"]["kind"] for row in rows if row["error"]} == {"content_policy"}
    assert sum(line.prompt_tokens for line in summary.totals if line.status == "filtered") == 90


def test_a_gateway_mixing_apis_stops_no_run(tmp_path: Path) -> None:
    """Once a row was answered, such an answer is like any other that can't be read: its row is sent again."""
    body, _ = OTHER_APIS["Ollama's own API"]
    foreign = answer(json.dumps(body).encode())
    with serving_moved(says(lambda row, time: foreign if row in (30, 31, 32) and time == 1 else choice())) as server:
        summary, _ = run(tmp_path, server, rows=60)
    assert (summary.exit_code, summary.by_status) == (0, {"ok": 60})
    assert summary.possibly_billed_count == 3


@pytest.mark.parametrize("said", OUTAGES)
def test_a_503_storm_is_not_blocked_content(said: object, tmp_path: Path) -> None:
    """A server that answers everything with 503 has an outage."""
    with serving_moved(says(lambda row, n: refused("503 Service Unavailable", said))) as server:
        summary, _ = run(tmp_path, server, 40, retry={"max_outage_s": 60})
    assert (summary.exit_code, summary.complete, summary.by_status) == (5, False, {})
    assert len(server.exchanges) < 60


@pytest.mark.heavy
def test_a_503_that_ends_leaves_no_trace(tmp_path: Path) -> None:
    out = iter([True] * 25)
    with serving_moved(says(lambda row, n: refused("503 Out", OUTAGES[0]) if next(out, False) else choice())) as server:
        summary, rows = run(tmp_path, server, 40)
    assert (summary.exit_code, {row["status"] for row in rows}) == (0, {"ok"})
    assert sum(requests_by_row(server).values()) >= 65


def test_a_run_of_filtered_rows_stops_once(tmp_path: Path) -> None:
    """A resume sends the rest."""
    blocked = refused("503 Service Unavailable", {"error": {"message": "Content Policy Violation"}})
    with serving_moved(says(lambda row, n: blocked if row else choice())) as server:
        summary, _ = run(tmp_path, server, 300)
        assert (summary.exit_code, summary.complete) == (2, False)
        assert "of the first 40 rows were filtered (HTTP 503: Content Policy Violation)" in (summary.reason or "")
        assert summary.by_status["filtered"] < 40 + 64
        summary, _ = run(tmp_path, server, 300)
    assert (summary.exit_code, summary.by_status) == (0, {"ok": 1, "filtered": 299})
    assert set(requests_by_row(server).values()) == {1}


def test_an_outage_mentioning_content_stops_midway(tmp_path: Path) -> None:
    """No answer is lost. One request at a time, as the last rows are counted in the order of their answers."""
    blocked, out = refused("503 Service Unavailable", {"error": {"message": "Content Policy Violation"}}), [True]
    truly = range(0, 300, 10)

    def said(row: int, n: int) -> bytes:
        return blocked if row in truly or (out[0] and row >= 100) else choice()

    with serving_moved(says(said)) as server:
        summary, _ = run(tmp_path, server, 300, limits={"max_in_flight": 1})
        assert (summary.exit_code, summary.complete) == (2, False)
        assert "38 of the last 40 rows were filtered (HTTP 503: Content Policy Violation)" in (summary.reason or "")
        assert "--retry-failed --status filtered" in (summary.reason or "")
        assert summary.by_status["filtered"] == 10 + 38
        out[0] = False
        summary, _ = run(tmp_path, server, 300)
        assert (summary.exit_code, summary.complete) == (0, True)
        assert summary.by_status["filtered"] > len(truly)
        summary, rows = run(tmp_path, server, 300, requested=RunOptions(retry=frozenset({"filtered"})))
    assert (summary.exit_code, summary.by_status) == (0, {"ok": 270, "filtered": 30})
    assert [place for place, row in enumerate(rows) if row["status"] == "filtered"] == list(truly)


def test_a_half_blocked_input_runs_through(tmp_path: Path) -> None:
    blocked = choice(None, "content_filter")
    with serving_moved(says(lambda row, n: blocked if row % 2 else choice())) as server:
        summary, _ = run(tmp_path, server, 100)
    assert (summary.exit_code, summary.by_status) == (0, {"ok": 50, "filtered": 50})


def test_a_single_403_is_its_rows_error(tmp_path: Path) -> None:
    """It counts as blocked only where the body says so."""
    said = {3: {"error": {"message": "No access"}}, 5: {"error": {"message": "Your input was flagged by moderation"}}}
    with serving_moved(says(lambda row, n: refused("403 Forbidden", said[row]) if row in said else choice())) as server:
        # enough rows that some are sent after the 403 came: only those show that the key still works
        summary, rows = run(tmp_path, server, 200)
    assert (rows[3]["status"], rows[3]["error"]["kind"]) == ("error", "forbidden")
    assert (rows[5]["status"], rows[5]["error"]["kind"]) == ("filtered", "content_policy")
    assert summary.by_status == {"ok": 198, "filtered": 1, "error": 1}


BROKEN = {"code": 502, "message": "Provider disconnected"}
FAILURES: dict[str, bytes] = {
    "whole, with an error": choice("Fi", "error", error=BROKEN),
    "whole, without": choice("Fi", "error"),
    "whole, aborted": choice("Fi", "abort"),
    "stream, with an error": events(delta({"content": "Fi"}), delta({"content": ""}, "error", error=BROKEN)),
    "stream, without": events(delta({"content": "Fi"}), delta({}, "error")),
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("said", FAILURES.values(), ids=FAILURES.keys())
@pytest.mark.parametrize("times", [1, 100])
def test_a_choice_reporting_failure_is_retried(said: bytes, times: int, tmp_path: Path) -> None:
    """It never counts as ok."""
    with serving_moved(says(lambda row, n: said if row == 5 and n <= times else choice())) as server:
        summary, rows = run(tmp_path, server)
    failed = rows[5]
    assert failed["attempts"] == requests_by_row(server)[5] == 2
    assert failed["status"] == ("ok" if times == 1 else "error")
    if times > 1:
        assert (failed["content"], failed["error"]["http_status"]) == ("Fi", 200)
        assert summary.exit_code == 3


MEANINGS = {
    "max_tokens": "truncated",
    "MAX_TOKENS": "truncated",
    "model_length": "truncated",
    "SAFETY": "filtered",
    "sensitive": "filtered",
    "content-filter": "filtered",
    "content_filter: RECITATION": "filtered",
    "eos_token": "ok",
    "COMPLETE": "ok",
    "end_turn": "ok",
    "refusal": "refused",
    "quux": "ok",
    None: "ok",
}


def test_foreign_finish_reasons_are_understood(tmp_path: Path) -> None:
    """They are judged by their meaning; unknown ones are reported once."""
    reasons = list(MEANINGS)
    notes: list[str] = []
    with serving_moved(says(lambda row, n: choice("Fi", reasons[row % len(reasons)]))) as server:
        summary, rows = run(tmp_path, server, 2 * len(reasons), notes=notes)
    assert [row["status"] for row in rows] == list(MEANINGS.values()) * 2
    assert [row["finish_reason"] for row in rows] == reasons * 2
    assert [note for note in notes if "finish_reason" in note] == [
        "warning: answers ended with the finish_reason 'quux', which batchrun does not know: "
        "finish.other decides on them"
    ]
    logged = [json.loads(line) for line in (tmp_path / "out" / "run.log").read_text().splitlines()]
    assert [line["finish_reason"] for line in logged if line["event"] == "unknown finish_reason"] == ["quux"]
    assert summary.unknown_finish_reasons == ["quux"]
    assert any("'quux'" in line for line in in_words(summary, requests_per_minute=None, max_failures=0))


@pytest.mark.parametrize(("setting", "rows_refused"), [("length", 3), ("content_filter", 4), ("other", 2)])
def test_the_settings_of_finish_go_by_the_meaning(setting: str, rows_refused: int, tmp_path: Path) -> None:
    reasons = list(MEANINGS)
    with serving_moved(says(lambda row, n: choice("Fi", reasons[row]))) as server:
        summary, rows = run(tmp_path, server, len(reasons), finish={setting: "fail"})
    assert summary.exit_code == 3
    assert sum(row["error"] is not None for row in rows) == rows_refused


REFUSAL = "I can't help with that."
REFUSALS: dict[str, bytes] = {
    "whole": choice(None, "stop", refusal=REFUSAL),
    "a part": choice([{"type": "refusal", "refusal": REFUSAL}]),  # type: ignore[arg-type]
    "stream": events(delta({"refusal": REFUSAL[:7]}), delta({"refusal": REFUSAL[7:]}), delta({}, "stop")),
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("said", REFUSALS.values(), ids=REFUSALS.keys())
@pytest.mark.parametrize(("action", "exit_code", "attempts"), [("accept", 0, 1), ("fail", 3, 1), ("retry", 3, 6)])
def test_a_refusal_is_a_status_with_its_text(
    said: bytes, action: str, exit_code: int, attempts: int, tmp_path: Path
) -> None:
    with serving_moved(says(lambda row, n: said if row == 5 else choice('{"a":1}'))) as server:
        summary, rows = run(
            tmp_path,
            server,
            finish={"refusal": action},
            request={"response_format": {"type": "json_object"}},
        )
    assert (summary.exit_code, summary.by_status) == (exit_code, {"ok": 11, "refused": 1})
    refusal = rows[5]
    assert (refusal["status"], refusal["refusal"], refusal["attempts"]) == ("refused", REFUSAL, attempts)
    assert not refusal["content"]
    assert (refusal["parsed"], rows[4]["refusal"]) == (None, None)


ODD_USAGE = [
    {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 99, "cost": 0.000012345678901234567},
    {"prompt_tokens": 3, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 0}},
    {"input_tokens": 3, "output_tokens": 4},
    {},
]
AGAIN = [
    *REFUSALS.values(),
    *map(choice, MEANINGS, MEANINGS),
    *(answer(answer_body(usage=usage)) for usage in ODD_USAGE),
    *(events(delta({"content": "\ud800Fi"}), delta({}, "stop", usage=usage)) for usage in ODD_USAGE),
    choice('{"a": 1}\u0000\ufffd', logprobs=None),
    choice(None, "tool_calls"),
    answer(b"\xef\xbb\xbf" + answer_body()),
    answer(b'{"choices": [{"message": {"content": "caf\xe9"}, "finish_reason": "stop"}]}'),
    answer(answer_body(choices=[json.loads(choice("two").partition(b"\r\n\r\n")[2])["choices"][0]] * 2)),
]


def test_answers_in_memory_are_those_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part made of answers that stayed in memory equals one made from the database, for answers of any form."""

    own = {"finished_at", "latency_s", "time_to_first_token_s", "request_id", "request_key"}  # of time, run and port

    def comparable(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        assert len(rows) == 2 * len(AGAIN)
        return [{name: value for name, value in row.items() if name not in own} for row in rows]

    results = []
    for kept_bytes in (chunks.KEPT_BYTES, 0):
        monkeypatch.setattr(chunks, "KEPT_BYTES", kept_bytes)
        with serving_moved(says(lambda row, n: AGAIN[row % len(AGAIN)])) as server:
            folder = tmp_path / str(kept_bytes)
            folder.mkdir()
            results.append(run(folder, server, 2 * len(AGAIN), finish={"length": "retry"}, output={"raw": "always"})[1])
    for one, other in zip(*map(comparable, results), strict=True):
        assert one == other


QUOTA = refused("429 Too Many Requests", {"error": {"message": "Quota exceeded, check quota"}})


def test_a_quota_that_time_lifts_is_waited_for(tmp_path: Path) -> None:
    out = iter([True] * 6)
    with serving_moved(says(lambda row, n: QUOTA if next(out, False) else choice())) as server:
        summary, rows = run(tmp_path, server)
    assert (summary.exit_code, {row["status"] for row in rows}) == (0, {"ok"})
    assert len(server.exchanges) == 12 + 6


def test_a_lasting_quota_pauses_the_run(tmp_path: Path) -> None:
    with serving_moved(says(lambda row, n: QUOTA if row > 2 else choice())) as server:
        summary, _ = run(tmp_path, server, retry={"max_wait_s": 120})
        assert (summary.exit_code, summary.by_status) == (5, {"ok": 3})
        assert "minutes: Quota exceeded" in (summary.reason or "")
        assert len(server.exchanges) < 40


DAILY = [
    {"error": {"message": "Rate limit reached on requests per day (RPD): Limit 3", "code": "rate_limit_exceeded"}},
    {"error": {"message": "Rate limit exceeded: free-models-per-day. Add 10 credits to unlock more", "code": 429}},
    {"message": "Too many tokens per day, please wait before trying again."},
    {"error": {"message": "RPD limit reached"}},
]


@pytest.mark.parametrize("said", DAILY)
def test_a_daily_limit_fails_no_row(said: object, tmp_path: Path) -> None:
    """Although it is worded like a pace and no wait is named: the run probes for `retry.max_wait_s`, then it pauses."""
    over = refused("429 Too Many Requests", said)
    with serving_moved(says(lambda row, n: over if row > 2 else choice())) as server:
        summary, _ = run(tmp_path, server)
    assert (summary.exit_code, summary.by_status) == (5, {"ok": 3})
    assert re.search("no answer for 1[56] minutes: ", summary.reason or "")
    assert len(server.exchanges) < 60


@pytest.mark.parametrize(
    ("status", "said"),
    [
        ("429 Too Many Requests", {"error": {"message": "No.", "code": "insufficient_quota"}}),
        ("400 Bad Request", {"error": {"message": "Your credit balance is too low to access the API"}}),
        ("402 Payment Required", {"status": {"code": 402, "message": "no", "error_code": 40201}, "data": None}),
        ("200 OK", {"status": {"code": 402, "message": "insufficient credits", "error_code": 40201}, "data": None}),
        ("200 OK", {"base_resp": {"status_code": 1008, "status_msg": "insufficient balance"}}),
        ("403 Forbidden", "insufficient balance"),
    ],
)
def test_an_empty_account_pauses_the_run(status: str, said: object, tmp_path: Path) -> None:
    """Whatever the error's envelope; no row fails."""
    with serving_moved(says(lambda row, n: refused(status, said))) as server:
        summary, _ = run(tmp_path, server)
    assert (summary.exit_code, summary.by_status) == (5, {})
    assert len(server.exchanges) <= 9


WRONG_KEYS = {
    "401": refused("401 Unauthorized", {"error": {"message": "invalid api key"}}),
    "xAI": refused("400 Bad Request", {"code": "invalid-argument", "error": "Incorrect API key provided: xa***id."}),
    "Google": refused(
        "400 Bad Request",
        {"error": {"code": 400, "message": "API key not valid. Please pass a valid API key.", "status": "INVALID"}},
    ),
    "403": refused("403 Forbidden", {"error": {"message": "Invalid API Key"}}),
}
"""How servers reject a key."""

each_wrong_key = pytest.mark.parametrize("wrong_key", WRONG_KEYS.values(), ids=WRONG_KEYS)


@each_wrong_key
def test_a_gateways_own_bad_key_fails_no_row(tmp_path: Path, wrong_key: bytes) -> None:
    """One request in eight is refused; one row gets nothing else, and fails alone."""
    bad = {(row, 1) for row in range(20, 200, 8)}
    with serving_moved(says(lambda row, n: wrong_key if (row, n) in bad or row == 100 else choice())) as server:
        summary, result = run(tmp_path, server, 200, limits={"max_in_flight": 8})
    assert (summary.exit_code, summary.by_status) == (3, {"ok": 199, "error": 1})
    assert [(row["row"], row["error"]["kind"]) for row in result if row["error"]] == [(100, "authentication")]
    assert len(server.exchanges) < 250


@each_wrong_key
def test_a_third_refused_from_the_start_completes(tmp_path: Path, wrong_key: bytes) -> None:
    """One of three keys is bad: a refusal comes at once, an answer later. Two refusals in a row stop nothing."""
    draws = random.Random(5)

    async def script(exchange: Exchange) -> None:
        is_refused = draws.random() < 1 / 3
        if not is_refused:
            await asyncio.sleep(0.02)
        await exchange.send(wrong_key if is_refused else choice())

    with serving_moved(script) as server:
        summary, _ = run(tmp_path, server, 60, limits={"max_in_flight": 16})
    assert (summary.exit_code, summary.by_status) == (0, {"ok": 60})


def test_one_server_with_a_bad_key_fails_no_row(tmp_path: Path) -> None:
    """Every third connection meets it, from the first one on."""
    wrong_key = refused("401 Unauthorized", {"error": {"message": "invalid api key"}})

    async def script(exchange: Exchange) -> None:
        if exchange.connection % 3:
            await asyncio.sleep(0.2)
        await exchange.send(choice() if exchange.connection % 3 else wrong_key)

    with serving_moved(script) as server:
        summary, _ = run(tmp_path, server, 100)
    assert (summary.exit_code, summary.by_status) == (0, {"ok": 100})
    assert len(server.exchanges) < 150


def test_a_login_page_ends_the_start_within_minutes(tmp_path: Path) -> None:
    """It is no completion, and each one may have been billed."""
    page = answer(b"<html>Please log in</html>").replace(b"application/json", b"text/html")
    with serving_moved(says(lambda row, n: page)) as server:
        summary, _ = run(tmp_path, server, 40)
    assert (summary.exit_code, summary.by_status) == (5, {})
    assert "not a chat completion, but a web page: Please log in" in str(summary.reason)
    assert len(server.exchanges) < 25
    assert summary.possibly_billed is not None
    assert len(summary.possibly_billed) == len(server.exchanges)


SPENT = {
    "error": {"message": "Budget has been exceeded! Current cost: 10.01", "type": "budget_exceeded", "code": "400"}
}


@pytest.mark.parametrize(
    ("status", "said", "exit_code"),
    [("400 Bad Request", SPENT, 5), ("407 Proxy Authentication Required", b"<html>", 2)],
    ids=["LiteLLM", "proxy"],
)
def test_a_gateways_budget_pauses_the_run(status: str, said: object, exit_code: int, tmp_path: Path) -> None:
    """And a proxy that wants a password ends it: neither is any row's fault, in mid-run either."""
    with serving_moved(says(lambda row, n: choice() if row < 12 else refused(status, said))) as server:
        summary, _ = run(tmp_path, server, 60)
    assert (summary.exit_code, summary.by_status) == (exit_code, {"ok": 12})


def test_a_glued_stream_end_is_ignored(tmp_path: Path) -> None:
    glued = answer(answer_body("Fine.") + b"\n\ndata: [DONE]\n\n")
    with serving_moved(says(lambda row, n: glued)) as server:
        summary, rows = run(tmp_path, server)
    assert (summary.exit_code, {row["status"] for row in rows}) == (0, {"ok"})
    assert {row["error"]["kind"] for row in rows} == {"not_strict_json"}
    assert set(requests_by_row(server).values()) == {1}
