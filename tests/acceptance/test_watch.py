"""`batchrun watch`: a run at work in a terminal of any width, without torn lines, until it ends."""

import fcntl
import os
import pty
import struct
import sys
import termios
import time
import unicodedata
from pathlib import Path

import pytest

from batchrun.report import watch_screen
from batchrun.simulator import SimulatorConfig
from tests.cli_process import batchrun, finish, start, wait_until, write_job, write_rows
from tests.run.test_progress import summary
from tests.simulator_process import running_simulator

HOSTILE = "\x1b[2J模型\r\n" * 30


@pytest.mark.parametrize("columns", [1, 2, 10, 39, 80, 200])
def test_no_frame_line_exceeds_the_terminal(columns: int) -> None:
    reported = watch_screen.frame(summary(example_error=HOSTILE), [HOSTILE, "plain"], columns, 24)
    lines = reported.removeprefix(watch_screen.HOME).removesuffix(watch_screen.REST_OF_SCREEN).split("\r\n")
    assert lines.pop() == ""
    assert 0 < len(lines) < 24
    for line in lines:
        assert line.endswith(watch_screen.REST_OF_LINE)
        text = line.removesuffix(watch_screen.REST_OF_LINE)
        assert text.isprintable()
        assert sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text) < max(columns, 2)


def drawn(frame: str) -> list[str]:
    """The lines of a frame, without what the command says behind the last one."""
    return frame.partition(watch_screen.REST_OF_SCREEN)[0].split("\r\n")


@pytest.mark.heavy
def test_watch_follows_a_run_to_its_end(tmp_path: Path) -> None:
    """With and without a terminal."""
    with running_simulator(SimulatorConfig(latency_s=0.3)) as simulator:
        job = write_job(tmp_path / "job.toml", simulator.url, write_rows(tmp_path / "in.jsonl", 200))
        process = start("run", job, "-o", tmp_path / "out", "--set", "limits.max_in_flight=16")
        wait_until((tmp_path / "out" / "summary.json").exists, process)
        main, side = pty.openpty()
        fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 20, 60, 0, 0))
        before = [sys.executable, "-c", "import runpy, sys; sys.exit(__import__('subprocess').call(sys.argv[1:]))"]
        watcher = start("watch", tmp_path / "out", "--every", "0.2", before=before, stdout=side)
        os.close(side)
        plain = start("watch", tmp_path / "out", "--every", "0.2")
        shown = b""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                shown += os.read(main, 65_536)
            except OSError:
                break
        assert finish(process).exit_code == 0
        assert finish(watcher).exit_code == 0
        reported = finish(plain)
    os.close(main)
    assert reported.exit_code == 0
    assert "\x1b" not in reported.stdout
    assert reported.stdout.splitlines()[-1].startswith("200/200 rows (100%), 0 failed")
    frames = shown.decode().split(watch_screen.HOME)
    assert len(frames) > 2
    lines = [line.replace(watch_screen.REST_OF_LINE, "") for frame in frames[1:] for line in drawn(frame)]
    assert max(len(line.replace(watch_screen.REST_OF_SCREEN, "").strip("\r")) for line in lines) < 60
    assert "200 of 200 done" in frames[-1]


def test_watch_refuses_what_is_not_a_run(tmp_path: Path) -> None:
    """For a run that has ended it ends at once."""
    assert batchrun("watch", tmp_path).exit_code == 2
