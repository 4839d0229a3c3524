"""Where a run stands fits one line: any terminal from 80 columns on, any figures, any limit."""

import os
import pty
import re
import struct
import termios
from datetime import UTC, datetime, timedelta
from fcntl import ioctl
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchrun.report.progress import around_bar, line, short_number
from batchrun.run_summary import Summary
from batchrun.simulator import SimulatorConfig
from tests.cli_process import finish, start, write_job, write_rows
from tests.simulator_process import running_simulator

NOW = datetime(2026, 11, 25, 22, 30, tzinfo=UTC)
LIMITS = ["rpm", "tpm", "in flight", "latency", "budget", "probing", "cooling (429) till 02:14:07"]


def summary(**changes: object) -> Summary:
    """A run of 10,000 rows that is at work, except for `changes`."""
    whole = msgspec.convert(
        {
            **dict.fromkeys(Summary.__struct_fields__),
            **{"version": 2, "job": "reviews", "run_id": "r", "state": "running", "complete": False, "rows": 10_000},
            **{"rows_in_output": 0, "rejected": 0, "by_status": {"ok": 6_117, "error": 3}, "pending": 3_880},
            **{"tags": {}, "totals": [], "cost_usd": "12.3456", "wasted_usd": "0", "unpriced": 0, "without_usage": 0},
            **{"possibly_billed": [], "possibly_billed_count": 0, "possibly_billed_usd": "0", "models": {}},
            **{
                "unknown_finish_reasons": [],
                "unpriced_tiers": [],
                "unpriced_usage": [],
                "endpoints": [],
                "budgets": [],
            },
            **{"reused": 0, "duplicates": 0, "saved_usd": "0", "merged": []},
            **{"invocation": 1, "created_at": NOW, "started_at": NOW, "updated_at": NOW, "elapsed_s": 60.0},
            **{"rows_per_minute": 0.0, "requests_per_minute": 0.0, "tokens_per_minute": 0.0},
            **{"tokens_per_second": 1234.5, "limited_by": "rpm", "pid": 1, "host": "h", "files": {}},
        },
        Summary,
    )
    return msgspec.structs.replace(whole, **changes)


SUMMARIES = st.builds(
    lambda rows, done, failed, tokens, cost, ahead, limit, job: summary(
        rows=rows,
        pending=rows - min(rows, done),
        by_status={"error": failed},
        tokens_per_second=tokens,
        cost_usd=cost,
        eta=None if ahead is None else NOW + timedelta(seconds=ahead),
        limited_by=limit,
        job=job,
    ),
    st.integers(0, 10**8),
    st.integers(0, 10**8),
    st.integers(0, 10**6),
    st.floats(0, 10**7),
    st.decimals(0, 10**6, places=6),
    st.none() | st.integers(0, 10**7),
    st.sampled_from(LIMITS),
    st.text(min_size=1, max_size=40),
)


@given(SUMMARIES, st.integers(80, 250))
def test_the_bar_fits_any_terminal(reported: Summary, columns: int) -> None:
    left, right, bar = around_bar(reported, columns)
    assert len(left) + len(right) + (3 + 8 if bar else 1) < columns
    assert re.match(r"\S+/\S+ \S+ failed (\S+ tok/s )?\$\S+ ETA ", right)
    assert right.endswith(reported.limited_by)


def test_a_narrow_terminal_shortens_figures() -> None:
    reported = summary(eta=NOW + timedelta(hours=1))
    assert around_bar(reported, 200)[1].startswith("6,120/10,000 3 failed 1,234 tok/s $12.35 ETA ")
    assert around_bar(reported, 80)[1].startswith("6.12k/10k 3 failed 1.23k tok/s $12.35 ETA ")
    cooling = summary(limited_by="cooling (429) till 02:14:07", eta=NOW)
    assert around_bar(cooling, 80) == ("61%", around_bar(cooling, 80)[1], False)


@given(st.floats(0, 1e13))
def test_a_short_number_is_short_and_near(number: float) -> None:
    text = short_number(number)
    assert len(text) <= 6
    scale = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}.get(text[-1], 1)
    assert float(text.rstrip("kMGT").replace(",", "")) * scale == pytest.approx(number, rel=0.006, abs=0.5)


def test_a_log_line_uses_full_words() -> None:
    reported = line(summary(by_deadline=0.617))
    assert reported == (
        "6,120/10,000 rows (61%), 3 failed, 1,234 tokens/s, $12.3456, ETA ?, 61 % by the deadline, limited by rpm"
    )
    assert line(summary(state="writing", limited_by="writing")).endswith(" tokens/s, $12.3456, writing")


@pytest.mark.heavy
@pytest.mark.parametrize("columns", [80, 200])
def test_the_bar_never_breaks_its_line(columns: int, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", 400)
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with running_simulator(SimulatorConfig(latency_s=0.1)) as simulator:
        job = write_job(tmp_path / "job.toml", simulator.url, source, "[limits]\nrequests_per_minute = 6000\n")
        process = start("run", job, "-o", tmp_path / "out", stderr=theirs)
        os.close(theirs)
        shown = b""
        while process.poll() is None or shown.count(b"tok/s") < 2:
            try:
                shown += os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
        ended = finish(process)
    os.close(ours)
    assert ended.exit_code == 0
    bars = [part for part in re.split(r"[\r\n]", shown.decode()) if "tok/s" in part]
    assert len(bars) >= 2
    assert all("failed" in bar and "ETA" in bar and len(bar.replace("\x1b[A", "")) < columns for bar in bars)
    assert all(bar.count("|") == 2 for bar in bars)
