"""`--log-format json`: every line of the plain format, each as one JSON object, and never the key."""

import base64
import json
import os
import pty
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from batchrun.simulator import SimulatorConfig
from tests.cli_process import KEY, Ended, batchrun, finish, read_summary, start, wait_until, write_job, write_rows
from tests.fault_server import Exchange, answer, serving_aside
from tests.simulator_process import RunningSimulator, running_simulator


@pytest.fixture(scope="module")
def simulator() -> Iterator[RunningSimulator]:
    with running_simulator(SimulatorConfig(latency_s=0.02)) as running:
        yield running


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def words(text: str) -> list[str]:
    """The plain lines as the messages that they should be: without what differs from one run to the next."""
    return [
        re.sub(r"[\d.]+", "0", line.removeprefix("warning: ").removeprefix("Error: ")) for line in text.splitlines()
    ]


def messages(text: str, *, but: tuple[str, ...] = ("ended", "progress")) -> list[str]:
    return [re.sub(r"[\d.]+", "0", line["message"]) for line in lines(text) if line["event"] not in but]


def both(folder: Path, url: str, *arguments: str, more: str = "", rows: int = 4) -> tuple[Ended, Ended]:
    """The same run with plain lines and with JSON."""
    ends = []
    for kind in ("plain", "json"):
        (folder / kind).mkdir(exist_ok=True)
        job = write_job(folder / kind / "night.toml", url, write_rows(folder / kind / "in.jsonl", rows), more)
        ends.append(batchrun("run", job.name, "-o", "out", "--log-format", kind, *arguments, cwd=folder / kind))
    plain, in_json = ends
    assert plain.exit_code == in_json.exit_code
    return plain, in_json


MANY_LINES = '[telemetry]\nprometheus_dir = "nowhere"\n[canary]\nrows = 2\n[pricing."other"]\ninput = 1\noutput = 1\n'


def test_each_plain_line_is_an_object(simulator: RunningSimulator, tmp_path: Path) -> None:
    # long enough for each answer: the canary takes random rows
    plain, in_json = both(tmp_path, simulator.url, "--set", "request.max_tokens=4000", more=MANY_LINES, rows=9)
    assert messages(in_json.stderr) == words(plain.stderr)
    assert len(messages(in_json.stderr)) >= 4
    account = [(line["label"], line["message"]) for line in lines(in_json.stdout)]
    assert len(account) == len(plain.stdout.splitlines())
    for (label, message), line in zip(account, plain.stdout.splitlines(), strict=True):
        assert re.sub(r"[\d.]+", "0", f"{label:<13}{message}") == re.sub(r"[\d.]+", "0", line)
    events = [line["event"] for line in lines(in_json.stderr)]
    assert {"input", "canary", "telemetry"} <= set(events)
    assert events[-1] == "ended"
    summary = read_summary(tmp_path / "json" / "out")
    last = lines(in_json.stderr)[-1]
    assert last["run"] == summary["run_id"]
    assert (last["rows"], last["exit_code"], last["by_status"]) == (9, in_json.exit_code, summary["by_status"])
    assert last["cost_usd"] == float(summary["cost_usd"])
    assert {line["job"] for line in lines(in_json.stderr + in_json.stdout)} == {"night"}


@pytest.mark.parametrize(
    ("arguments", "exit_code"),
    [
        (["--set", "input.path=nowhere.jsonl"], 2),
        (["--no-such-option"], 2),
        (["--set", "nonsense"], 2),
        (["--deadline", "yesterday"], 2),
    ],
)
def test_refused_starts_are_objects_too(tmp_path: Path, arguments: list[str], exit_code: int) -> None:
    plain, in_json = both(tmp_path, "http://127.0.0.1:9", *arguments)
    assert in_json.exit_code == exit_code
    assert in_json.stdout == ""
    (line,) = lines(in_json.stderr)
    assert (line["level"], line["event"], line["exit_code"]) == ("error", "error", exit_code)
    assert line["message"] in plain.stderr


def test_invalid_records_are_a_line_each(tmp_path: Path) -> None:
    for kind in ("plain", "json"):
        (tmp_path / f"{kind}.jsonl").write_text('{"text": "a"}\nnot json\n{"text": 1')
    job = write_job(tmp_path / "night.toml", "http://127.0.0.1:9", tmp_path / "plain.jsonl")
    plain = batchrun("run", job, "-o", tmp_path / "a")
    in_json = batchrun("run", job, "-o", tmp_path / "b", "--log-format", "json")
    assert plain.exit_code == in_json.exit_code == 2
    assert messages(in_json.stderr) == words(plain.stderr)


def test_a_signal_is_an_event_with_figures(simulator: RunningSimulator, tmp_path: Path) -> None:
    more = "[limits]\nrequests_per_minute = 300\n"
    job = write_job(tmp_path / "night.toml", simulator.url, write_rows(tmp_path / "in.jsonl", 300), more)
    process = start("run", job, "-o", tmp_path / "out", "--log-format", "json")
    wait_until(
        lambda: (tmp_path / "out/summary.json").exists() and read_summary(tmp_path / "out")["by_status"], process
    )
    process.send_signal(signal.SIGTERM)
    ended = finish(process)
    assert ended.exit_code == 143
    in_json = {line["event"]: line for line in lines(ended.stderr)}
    assert in_json["signal"]["name"] == "SIGTERM"
    assert in_json["signal"]["grace_s"] == 20
    assert in_json["ended"]["exit_code"] == 143
    assert in_json["ended"]["pending"] == read_summary(tmp_path / "out")["pending"] > 0


def test_a_terminal_shows_no_bar(simulator: RunningSimulator, tmp_path: Path) -> None:
    job = write_job(tmp_path / "night.toml", simulator.url, write_rows(tmp_path / "in.jsonl", 20))
    ours, theirs = pty.openpty()
    process = start("run", job, "-o", tmp_path / "out", "--log-format", "json", stderr=theirs)
    os.close(theirs)
    shown = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        shown += piece
    os.close(ours)
    assert finish(process).exit_code in (0, 3)
    assert [line["event"] for line in lines(shown.decode())][-1] == "ended"


def test_the_key_is_in_no_line(tmp_path: Path) -> None:
    """A server that repeats it in its refusal, and then in each answer's finish_reason."""

    async def repeats(exchange: Exchange) -> None:
        if exchange.connection % 2:
            await exchange.send(answer(json.dumps({"error": {"message": f"bad key {KEY}"}}).encode(), status="400 Bad"))
        else:
            body = {"choices": [{"message": {"content": "x"}, "finish_reason": f"because {KEY}"}]}
            await exchange.send(answer(json.dumps(body).encode()))

    with serving_aside(repeats) as server:
        _, in_json = both(tmp_path, server.url, rows=20)
    assert "finish_reason" in in_json.stderr, "the message is missing, so nothing was tested"
    assert "bad key" in in_json.stdout
    forms = KEY, base64.b64encode(KEY.encode()).decode().rstrip("=")
    assert not [form for form in forms if form in in_json.stderr + in_json.stdout]
