"""The real command line in a process of its own, for tests that kill it, signal it and read what it left."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import prefork

KEY = "canary-key-8d1f3b7a"
KEY_ENV = "BATCHRUN_TEST_KEY"
DEADLINE_S = 120.0

JOB = """
[endpoint]
url = "{url}"
name = "test"
api_key_env = "{key_env}"

[input]
path = "{input}"

[request]
model = "vtrix-gpt-5.3-codex"
prompt = "Say: {{{{ text }}}}"
max_tokens = 40

{more}
"""


@dataclass(frozen=True)
class Ended:
    """How a process ended and what it said."""

    exit_code: int
    stdout: str
    stderr: str


def write_rows(path: Path, rows: int) -> Path:
    """A JSONL input of `rows` rows."""
    lines = [{"id": row, "text": f"item {row} " + "word " * (row % 17), "score": row / 4} for row in range(rows)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return path


def write_job(path: Path, url: str, source: Path | str, more: str = "") -> Path:
    """A job against `url`; `more` are further tables."""
    path.write_text(JOB.format(url=url, key_env=KEY_ENV, input=source, more=more), "utf-8")
    return path


def start(
    *arguments: str | Path, key: str = KEY, before: Sequence[str] = (), **options: Any
) -> "subprocess.Popen[str]":
    """The command line, running; `before` is a command that runs it."""
    environ = {**os.environ, KEY_ENV: key, "PYTHONWARNINGS": "error"}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL, **options}
    if prefork.AVAILABLE and not before and options.keys() <= {"stdin", "stdout", "stderr", "cwd"}:
        return prefork.Forked("batchrun.cli", [str(argument) for argument in arguments], environ, **options)
    command = [*before, sys.executable, "-c", "from batchrun.cli import main; main()", *map(str, arguments)]
    return subprocess.Popen(command, env=environ, text=True, **options)


def finish(process: "subprocess.Popen[str]") -> Ended:
    """The process's own end, within the deadline."""
    try:
        stdout, stderr = process.communicate(timeout=DEADLINE_S)
    finally:
        process.kill()
    return Ended(process.returncode, stdout or "", stderr or "")


def batchrun(*arguments: str | Path, key: str = KEY, **options: Any) -> Ended:
    """The command line, run to its end."""
    return finish(start(*arguments, key=key, **options))


def wait_until(condition: Any, process: "subprocess.Popen[str] | None" = None) -> None:
    """Returns when the condition holds; fails when the process ends before, or the deadline is over."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the condition never held"
        time.sleep(0.01)


def kill_when(process: "subprocess.Popen[str]", condition: Any, number: int = signal.SIGKILL) -> None:
    """Sends the signal to the running process as soon as the condition holds."""
    wait_until(condition, process)
    process.send_signal(number)


def read_summary(out: Path) -> dict[str, Any]:
    """summary.json."""
    summary: dict[str, Any] = json.loads((out / "summary.json").read_bytes())
    return summary


def snapshot(folder: Path) -> Mapping[str, tuple[int, int, int, bytes]]:
    """Every file below the folder: size, mtime, inode and content."""
    return {
        str(path.relative_to(folder)): (
            path.stat().st_size,
            path.stat().st_mtime_ns,
            path.stat().st_ino,
            path.read_bytes(),
        )
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def holds_key(folder: Path, forms: Sequence[bytes]) -> list[str]:
    """The files below the folder that hold one of the forms."""
    return [
        str(path) for path in folder.rglob("*") if path.is_file() and any(form in path.read_bytes() for form in forms)
    ]
