"""The simulator's process: strict at its door, faulty on demand, and honest in its ledger."""

import contextlib
import http.client
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import pytest

from batchrun.simulator import Fault, PlannedChange, SimulatorConfig, parse_faults, question_of, read_ledger
from tests.cli_process import batchrun, write_job, write_rows
from tests.simulator_process import RunningSimulator, running_simulator, start
from tests.timing import TIMER_S

HEADERS = {"Authorization": "Bearer sk-canary-1", "Content-Type": "application/json"}


@dataclass(frozen=True)
class Reply:
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


def _body(text: str = "Hello", **fields: Any) -> dict[str, Any]:
    return {"model": "vtrix-x", "messages": [{"role": "user", "content": text}], **fields}


def _connect(simulator: RunningSimulator, timeout_s: float = 60) -> http.client.HTTPConnection:
    address = urlsplit(simulator.url)
    assert address.hostname is not None
    return http.client.HTTPConnection(address.hostname, address.port, timeout=timeout_s)


def _send(
    connection: http.client.HTTPConnection, body: Any, headers: dict[str, str], path: str = "/v1/chat/completions"
) -> Reply:
    payload = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", path, payload, headers)
    response = connection.getresponse()
    return Reply(response.status, response.headers, response.read())


def _ask(simulator: RunningSimulator, body: Any = None, headers: dict[str, str] = HEADERS, **options: str) -> Reply:
    connection = _connect(simulator)
    try:
        return _send(connection, _body() if body is None else body, headers, **options)
    finally:
        connection.close()


@pytest.fixture(scope="module")
def simulator() -> Iterator[RunningSimulator]:
    with running_simulator() as running:
        yield running


# Each applies to the question that is its name.
FAULTS: dict[str, Fault] = {
    "500": Fault(kind="status", status=500, message="boom"),
    "content_policy": parse_faults("content_policy=1")[0],
    "empty": Fault(kind="body", status=503),
    "headers": Fault(
        kind="status",
        status=429,
        retry_after="-1",
        headers=(("Retry-After", "7"), ("retry-after-ms", "abc"), ("X-Long", "x" * 20_000)),
    ),
    "error_200": Fault(kind="status", status=200),
    "body": Fault(kind="body", body='{"choices": []}'),
    "bytes": Fault(kind="body", status=418, body_base64=b"\xff\x00"),
    "reset": Fault(kind="reset"),
    "reset_billed": Fault(kind="reset", billed=True),
    "cut": Fault(kind="cut"),
    "hang": Fault(kind="hang"),
}


@pytest.fixture(scope="module")
def faulty() -> Iterator[RunningSimulator]:
    faults = tuple(msgspec.structs.replace(fault, match=f'"{name}"') for name, fault in FAULTS.items())
    with running_simulator(SimulatorConfig(faults=faults)) as running:
        yield running


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({"Content-Type": "application/json"}, 401, "invalid_api_key"),
        ({**HEADERS, "Authorization": "Bearer "}, 401, "invalid_api_key"),
        ({**HEADERS, "Authorization": "Basic abc"}, 401, "invalid_api_key"),
        ({"Authorization": "Bearer k"}, 415, "unsupported_media_type"),
        ({**HEADERS, "Content-Type": "text/plain"}, 415, "unsupported_media_type"),
    ],
)
def test_the_simulator_refuses_malformed_requests(
    simulator: RunningSimulator, headers: dict[str, str], status: int, code: str
) -> None:
    reply = _ask(simulator, headers=headers)
    assert (reply.status, reply.json()["error"]["code"]) == (status, code)
    line = simulator.ledger()[-1]
    assert (line.status, line.billed, line.request_id) == (status, False, reply.headers["x-request-id"])


def test_invalid_bodies_get_a_400(simulator: RunningSimulator) -> None:
    assert _ask(simulator, b"{").json()["error"]["code"] == "invalid_json"
    reply = _ask(simulator, _body(temperature=3))
    assert reply.status == 400
    assert set(reply.json()["error"]) == {"message", "type", "code", "param"}
    assert reply.json()["error"]["param"] == "temperature"


def test_a_body_whose_encoding_is_broken_is_400(simulator: RunningSimulator) -> None:
    assert (
        _ask(simulator, b"not gzip", {**HEADERS, "Content-Encoding": "gzip"}).json()["error"]["code"] == "invalid_body"
    )


def test_a_client_leaving_early_sent_nothing(simulator: RunningSimulator) -> None:
    before = simulator.ledger()
    address = urlsplit(simulator.url)
    with socket.create_connection((address.hostname, address.port)) as raw:
        raw.sendall(_request()[:-5])
    _ask(simulator)
    assert len(simulator.ledger()) == len(before) + 1


def test_a_body_that_is_too_large_is_413(simulator: RunningSimulator) -> None:
    assert _ask(simulator, b" " * 64_000_001).status == 413


def test_only_chat_completions_paths_are_served(simulator: RunningSimulator) -> None:
    assert _ask(simulator, path="/llm/chat/completions").status == 200
    assert _ask(simulator, path="/v1/embeddings").status == 404


def test_an_answer_has_the_documented_shape(simulator: RunningSimulator) -> None:
    completion = _ask(simulator, _body(n=2)).json()
    assert completion["object"] == "chat.completion"
    assert abs(completion["created"] - time.time()) < 60
    assert [choice["index"] for choice in completion["choices"]] == [0, 1]
    assert {choice["message"]["role"] for choice in completion["choices"]} == {"assistant"}
    usage = completion["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0}


def test_equal_questions_differ_by_id_only(simulator: RunningSimulator) -> None:
    first, second = (_ask(simulator).json() for _ in range(2))
    assert first.pop("id") != second.pop("id")
    first.pop("created"), second.pop("created")
    assert first == second


def test_the_ledger_names_question_connection_and_reuse(simulator: RunningSimulator) -> None:
    connection = _connect(simulator)
    for number in range(3):
        _send(connection, _body(f"Row {number}"), HEADERS)
    connection.close()
    _ask(simulator, _body("Row 3", stream=True))
    lines = simulator.ledger()[-4:]
    assert [line.question for line in lines] == [question_of(_body(f"Row {number}")).hex() for number in range(4)]
    assert [line.connection_request for line in lines] == [1, 2, 3, 1]
    assert [line.connection - lines[0].connection for line in lines] == [0, 0, 0, 1]
    assert [line.ordinal - lines[0].ordinal for line in lines] == [0, 1, 2, 3]


def test_the_totals_can_be_read(simulator: RunningSimulator) -> None:
    connection = _connect(simulator)
    connection.request("GET", "/ledger")
    totals = json.loads(connection.getresponse().read())
    connection.close()
    billed = [line for line in simulator.ledger() if line.billed]
    assert totals["exchanges"] == len(simulator.ledger())
    assert totals["billed"] == len(billed)
    assert totals["completion_tokens"] == sum(line.completion_tokens for line in billed)


def test_a_client_leaving_before_answers_is_billed() -> None:
    with running_simulator(SimulatorConfig(latency_s=0.6, latency_sigma=0)) as simulator:
        connection = _connect(simulator, timeout_s=0.05)
        with pytest.raises(TimeoutError):
            _send(connection, _body(), HEADERS)
        connection.close()
        assert simulator.ledger() == []
        _ask(simulator)
        assert [line.billed for line in simulator.ledger()] == [True, True]


def test_answers_take_their_latency_and_pace() -> None:
    config = SimulatorConfig(latency_s=0.1, latency_sigma=0, tokens_per_second=200)
    with running_simulator(config) as simulator:
        started_s = time.monotonic()
        _ask(simulator)
        plain_s = time.monotonic() - started_s
        _ask(simulator, _body(stream=True))
        streamed_s = time.monotonic() - started_s - plain_s
        tokens = simulator.ledger()[-1].completion_tokens
    assert plain_s >= 0.1 - TIMER_S
    assert streamed_s >= 0.1 + (tokens - 4) / 200 - TIMER_S


def test_limits_change_at_their_time() -> None:
    """After 2 s of the simulator's life; the ledger has the time of each request."""
    change = PlannedChange(at_s=2, requests_per_minute=60)
    config = SimulatorConfig(requests_per_minute=6_000, limit_changes=(change,), latency_s=0.2, latency_sigma=0)
    with running_simulator(config) as running:
        replies = [_ask(running)]
        while (reply := _ask(running)).headers["x-ratelimit-limit-requests"] == "6000":
            replies.append(reply)
        ledger = running.ledger()
    assert {reply.headers["x-ratelimit-limit-requests"] for reply in replies} == {"6000"}
    assert reply.headers["x-ratelimit-limit-requests"] == "60"
    assert all(line.time_s - line.arrived_s >= 0.2 - TIMER_S for line in ledger)


def test_a_cached_prefix_shows_in_usage() -> None:
    """And in the ledger."""
    with running_simulator(SimulatorConfig(cache_life_s=60)) as simulator:
        text = "word " * 1_000
        replies = [_ask(simulator, _body(f"{text} row {row}")).json() for row in range(2)]
        cached = [reply["usage"]["prompt_tokens_details"]["cached_tokens"] for reply in replies]
        assert cached[0] == 0
        assert cached[1] >= 1_024
        assert [line.cached_tokens for line in simulator.ledger()] == cached


def test_an_answer_names_its_tier() -> None:
    config = SimulatorConfig(
        faults=parse_faults("flex_unavailable=0.5"), latency_s=0.01, flex_latency_s=0.3, latency_sigma=0
    )
    with running_simulator(config) as simulator:
        default = _ask(simulator, _body("Hello", service_tier="auto"))
        flex = [_ask(simulator, _body(f"Row {row}", service_tier="flex")) for row in range(12)]
        ledger = simulator.ledger()
    assert default.json()["service_tier"] == "default"
    answered = [reply for reply in flex if reply.status == 200]
    refused = [reply for reply in flex if reply.status == 429]
    assert answered
    assert refused
    assert len(answered) + len(refused) == 12
    assert {reply.json()["service_tier"] for reply in answered} == {"flex"}
    assert {reply.json()["error"]["code"] for reply in refused} == {"resource_unavailable"}
    assert [line.service_tier for line in ledger if line.billed] == ["default", *["flex"] * len(answered)]
    assert all(line.time_s - line.arrived_s >= 0.3 - TIMER_S for line in ledger if line.service_tier == "flex")


@pytest.mark.parametrize(
    ("name", "status", "part"),
    [
        ("500", 500, b'"message":"boom"'),
        ("content_policy", 503, b"Content Policy Violation"),
        ("empty", 503, b""),
        ("error_200", 200, b'{"error":'),
        ("body", 200, b'{"choices": []}'),
        ("bytes", 418, b"\xff\x00"),
    ],
)
def test_an_answering_fault_is_not_billed(faulty: RunningSimulator, name: str, status: int, part: bytes) -> None:
    reply = _ask(faulty, _body(name))
    line = faulty.ledger()[-1]
    assert reply.status == status
    assert part in reply.body
    assert name != "empty" or reply.body == b""
    assert (line.status, line.fault, line.billed, line.completion_tokens) == (status, FAULTS[name].kind, False, 0)
    assert line.question == question_of(_body(name)).hex()


def test_a_question_without_its_fault_is_answered(faulty: RunningSimulator) -> None:
    assert _ask(faulty).status == 200
    assert (faulty.ledger()[-1].fault, faulty.ledger()[-1].billed) == (None, True)


def test_a_fault_sends_the_headers_it_was_given(faulty: RunningSimulator) -> None:
    head = _raw_exchange(faulty, "headers", until=b"\r\n\r\n")
    assert head.count(b"Retry-After: ") == 2
    assert b"retry-after-ms: abc\r\n" in head
    assert b"X-Long: " + b"x" * 20_000 in head


@pytest.mark.parametrize("name", ["reset", "reset_billed"])
def test_a_reset_is_one_without_a_byte(faulty: RunningSimulator, name: str) -> None:
    with pytest.raises(ConnectionResetError) as caught:
        _ask(faulty, _body(name))
    assert not isinstance(caught.value, http.client.RemoteDisconnected)  # that is FIN, not RST
    line = faulty.ledger()[-1]
    assert (line.status, line.fault, line.billed) == (None, "reset", name == "reset_billed")
    assert bool(line.completion_tokens) == line.billed


@pytest.mark.parametrize("stream", [False, True])
def test_a_cut_answer_is_billed_and_incomplete(faulty: RunningSimulator, stream: bool) -> None:
    with pytest.raises(http.client.IncompleteRead) as caught:
        _ask(faulty, _body("cut", stream=stream))
    assert caught.value.partial
    assert faulty.ledger()[-1].billed


def test_a_hang_is_silent_and_free(faulty: RunningSimulator) -> None:
    served = len(faulty.ledger())
    address = urlsplit(faulty.url)
    with socket.create_connection((address.hostname, address.port)) as raw:
        raw.sendall(_request("hang"))
        while len(faulty.ledger()) == served:
            time.sleep(0.005)
        raw.settimeout(0.2)
        with pytest.raises(TimeoutError):
            raw.recv(1)
    line = faulty.ledger()[-1]
    assert (line.status, line.fault, line.billed) == (None, "hang", False)


def test_a_fault_ends_after_its_times() -> None:
    fault = Fault(kind="status", status=500, times=2)
    with running_simulator(SimulatorConfig(faults=(fault,))) as simulator:
        assert [_ask(simulator).status for _ in range(3)] == [500, 500, 200]


def test_it_announces_its_port_and_stops() -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        process = start(SimulatorConfig(faults=parse_faults("hang=1")))
        assert process.stdout is not None
        url = process.stdout.readline().removeprefix("listening on ").strip()
        address = urlsplit(url)
        with socket.create_connection((address.hostname, address.port)) as raw:
            raw.sendall(_request())
            process.send_signal(number)
            rest, _ = process.communicate(timeout=60)
        assert (process.returncode, rest) == (0, "")


def test_a_killed_simulator_has_written_its_ledger(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    process = start(SimulatorConfig(ledger=str(path)))
    assert process.stdout is not None
    address = urlsplit(process.stdout.readline().removeprefix("listening on ").strip())
    seen: list[str] = []

    def ask_until_killed(worker: int) -> None:
        assert address.hostname is not None
        connection = http.client.HTTPConnection(address.hostname, address.port, timeout=60)
        with contextlib.suppress(OSError, http.client.HTTPException):
            for number in itertools.count():
                seen.append(_send(connection, _body(f"{worker}-{number}"), HEADERS).headers["x-request-id"])
        connection.close()

    workers = [threading.Thread(target=ask_until_killed, args=(worker,)) for worker in range(4)]
    for worker in workers:
        worker.start()
    while len(seen) < 200:
        time.sleep(0.001)
    process.kill()
    process.communicate()
    for worker in workers:
        worker.join()
    assert set(seen) <= {line.request_id for line in read_ledger(path) if line.billed}


def test_wrong_settings_are_one_line_and_exit_2() -> None:
    command = [sys.executable, "-m", "batchrun.simulator", '{"port": -1}']
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "Error: simulator: port = -1 is not within 0 to 65535\n"


@pytest.mark.heavy
def test_startup_errors_are_one_line_exit_2() -> None:
    """A port that is in use, a ledger that can't be written."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for settings, complaint in (({"port": port}, "can't listen"), ({"ledger": "/none/l"}, "can't be opened")):
            command = [sys.executable, "-m", "batchrun.simulator", json.dumps(settings)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert (done.returncode, done.stderr.count("\n")) == (2, 1)
            assert complaint in done.stderr


@pytest.mark.heavy
@pytest.mark.parametrize("follows", [True, False])
def test_it_ends_with_its_parent_on_request(follows: bool) -> None:
    parent = "import os, subprocess, sys; settings = sys.argv[1].replace('\"PARENT\"', str(os.getpid()))\n"
    parent += "subprocess.Popen([sys.executable, '-m', 'batchrun.simulator', settings]); input()"
    settings = '{"parent_pid": "PARENT"}' if follows else "{}"
    starter = subprocess.Popen(
        [sys.executable, "-c", parent, settings], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert starter.stdout is not None
    url = starter.stdout.readline().removeprefix("listening on ").strip()
    child = _only_child(starter.pid)
    starter.kill()
    ended = _ends_within(child, 10.0 if follows else 1.5)
    if not ended:
        os.kill(child, signal.SIGTERM)
    starter.communicate()
    assert url.startswith("http://127.0.0.1:")
    assert ended == follows


def _raw_exchange(simulator: RunningSimulator, text: str, until: bytes | None) -> bytes:
    address = urlsplit(simulator.url)
    with socket.create_connection((address.hostname, address.port)) as raw:
        raw.sendall(_request(text))
        return _read_until(raw, until)


def _request(text: str = "Hello") -> bytes:
    body = json.dumps(_body(text)).encode()
    lines = [
        "POST /v1/chat/completions HTTP/1.1",
        "Host: x",
        f"Content-Length: {len(body)}",
        *(f"{name}: {text}" for name, text in HEADERS.items()),
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def _read_until(raw: socket.socket, end: bytes | None) -> bytes:
    """What comes up to `end`, or up to the close."""
    raw.settimeout(5)
    got = b""
    while end is None or end not in got:
        piece = raw.recv(65_536)
        if not piece:
            break
        got += piece
    return got


def test_a_complete_run_starts_no_simulator(tmp_path: Path) -> None:
    """With `url = "simulator"` one starts, and opens its ledger, only where a request is to be sent."""
    ledger, source = tmp_path / "ledger", write_rows(tmp_path / "in.jsonl", 3)
    job = write_job(tmp_path / "job.toml", "simulator", source, f'[simulator]\nlatency_s = 0.01\nledger = "{ledger}"\n')
    assert batchrun("run", job, "-o", tmp_path / "out").exit_code == 0
    assert len(read_ledger(ledger)) == 3
    ledger.unlink()
    assert batchrun("run", job, "-o", tmp_path / "out").exit_code == 0
    assert not ledger.exists()


def _only_child(pid: int) -> int:
    with open(f"/proc/{pid}/task/{pid}/children") as children:
        return int(children.read())


def _ends_within(pid: int, seconds: float) -> bool:
    deadline_s = time.monotonic() + seconds
    while time.monotonic() < deadline_s:
        try:
            with open(f"/proc/{pid}/stat") as stat:
                if stat.read().rpartition(")")[2].split()[0] == "Z":
                    return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False
