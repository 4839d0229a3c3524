"""Lines as JSON: whatever a line says, it is one object on one line of ASCII, and reads back as it was."""

import json
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchrun.records import Notice
from batchrun.run_summary import Live
from batchrun.telemetry.log_lines import LogLines
from batchrun.terminal import Progress, choose_format, is_json
from tests.run.test_progress import NOW, summary

BASE = ["time", "level", "event", "message", "job", "run"]


@given(st.text(), st.dictionaries(st.text(), st.text() | st.integers()), st.text(min_size=1))
def test_any_text_is_one_line_that_reads_back(text: str, fields: dict[str, object], job: str) -> None:
    lines = LogLines()
    lines.job = job
    line = lines.note(Notice(text, "x", fields=fields), NOW)
    assert line.isascii()
    assert line.isprintable()
    read = json.loads(line)
    assert list(read)[:6] == BASE
    message = text.removeprefix("warning: ").encode("utf-8", "replace").decode()
    assert [read["message"], read["job"]] == [message, job.encode("utf-8", "replace").decode()]


def test_a_line_has_its_level_event_and_fields() -> None:
    lines = LogLines()
    lines.job, lines.run = "night", "0123456789ab"
    at = NOW.astimezone(timezone(timedelta(hours=5)))
    fields = {"usd": Decimal("0.25"), "at": NOW, "path": Path("/x"), "level": "no field replaces these"}
    line = json.loads(lines.note(Notice("warning: careful", "behind", **fields), at))
    assert line == {
        "time": "2026-11-25T22:30:00.000Z",
        **{"level": "warning", "event": "behind", "message": "careful", "job": "night", "run": "0123456789ab"},
        **{"usd": 0.25, "at": "2026-11-25T22:30:00+00:00", "path": "/x"},
    }
    assert json.loads(lines.note("plain", NOW))["event"] == "note"
    failed = json.loads(lines.error("Error: no key", 2, NOW))
    assert (failed["level"], failed["event"], failed["message"], failed["exit_code"]) == ("error", "error", "no key", 2)


def test_progress_has_the_figures_of_its_line() -> None:
    known = summary(live=Live(7, 8, 2.5, 1, 0.1, "open"), eta=NOW)
    read = json.loads(LogLines().progress(known, NOW))
    assert read["event"] == "progress"
    assert read["message"].startswith("6,120/10,000 rows (61%), 3 failed, 1,234 tokens/s, $12.3456")
    wanted = {"rows": 10_000, "done": 6_120, "failed": 3, "cost_usd": 12.3456, "in_flight": 7, "circuit": "open"}
    assert wanted.items() <= read.items()
    unpriced = msgspec.structs.replace(known, cost_usd=Decimal(0), unpriced=9)
    assert json.loads(LogLines().progress(unpriced, NOW))["cost_usd"] is None, "unknown is not 0"


def test_the_last_line_has_code_and_reason() -> None:
    ended = summary(state="stopped", exit_code=4, reason="the budget is used up")
    read = json.loads(LogLines().ended(ended, NOW))
    assert (read["event"], read["level"], read["exit_code"]) == ("ended", "warning", 4)
    assert read["message"] == read["reason"] == "the budget is used up"
    good = msgspec.structs.replace(ended, state="complete", exit_code=0, reason=None)
    complete = json.loads(LogLines().ended(good, NOW))
    assert complete["level"] == "info"
    assert complete["message"] == "complete: 6,120 of 10,000 rows done, 3 failed, $12.345600"


@pytest.mark.parametrize(
    ("words", "environ", "json_wanted"),
    [
        ("run a.toml", {}, False),
        ("run a.toml --log-format json", {}, True),
        ("run --log-format=json a.toml", {}, True),
        ("run --log-format json a.toml --log-format=plain", {}, False),
        ("run a.toml", {"BATCHRUN_LOG_FORMAT": "json"}, True),
        ("run a.toml --log-format plain", {"BATCHRUN_LOG_FORMAT": "json"}, False),
        ("run a.toml --log-format", {}, False),
    ],
)
def test_the_format_is_known_before_arguments(words: str, environ: dict[str, str], json_wanted: bool) -> None:
    """Errors of the command line are written in it, too."""
    try:
        choose_format(words.split(), environ)
        assert is_json() == json_wanted
    finally:
        choose_format([], {})


def test_progress_is_a_line_every_half_minute(capsys: pytest.CaptureFixture[str]) -> None:
    known = summary(elapsed_s=29.0)
    try:
        choose_format(["--log-format", "json"], {})
        with Progress() as progress:
            for elapsed_s in (1.0, 29.9, 30.1, 45.0, 60.2):
                progress.show(msgspec.structs.replace(known, elapsed_s=elapsed_s))
    finally:
        choose_format([], {})
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [(line["event"], line["elapsed_s"], line["job"]) for line in lines] == [
        ("progress", 30.1, "reviews"),
        ("progress", 60.2, "reviews"),
    ]


def test_a_time_of_another_zone_is_utc() -> None:
    at = datetime(2026, 11, 25, 23, 0, tzinfo=timezone(timedelta(hours=1)))
    assert json.loads(LogLines().note("x", at))["time"] == "2026-11-25T22:00:00.000Z"
