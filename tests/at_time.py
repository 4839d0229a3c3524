"""`batchrun` at another time: its wall clock starts at the time that the test sets, and runs from there.

The days and months in which money is spent go by that clock. Waits, limits and deadlines don't: theirs never jumps.
"""

import importlib
import os
import subprocess
import sys
import time
from datetime import datetime, tzinfo
from pathlib import Path
from typing import Any

from tests import prefork
from tests.cli_process import DEADLINE_S, KEY, KEY_ENV, Ended

_READ_THE_CLOCK = ("batchrun.dispatch.shared_budget", "batchrun.dispatch.run_status", "batchrun.api")


class _Shifted:
    """The class `datetime`, whose `now` is so many seconds off."""

    def __init__(self, by_s: float) -> None:
        self._by_s = by_s

    def now(self, zone: tzinfo | None = None) -> datetime:
        return datetime.fromtimestamp(_REAL() + self._by_s, zone)

    def __getattr__(self, name: str) -> Any:
        return getattr(datetime, name)


_REAL = time.time


def main() -> None:
    """The command line in the arguments behind the first, which is the moment."""
    moment, sys.argv = sys.argv[1], [sys.argv[0], *sys.argv[2:]]
    by_s = datetime.fromisoformat(moment).timestamp() - _REAL()
    time.time = lambda: _REAL() + by_s
    for name in _READ_THE_CLOCK:
        vars(importlib.import_module(name))["datetime"] = _Shifted(by_s)
    from batchrun.cli import main as command_line

    command_line()


def batchrun_at(moment: datetime, *arguments: str | Path, key: str = KEY) -> Ended:
    """The command line, run to its end from that moment on."""
    environ = {**os.environ, KEY_ENV: key}
    words = [moment.isoformat(), *map(str, arguments)]
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
    process = prefork.start("tests.at_time", words, environ, **options)
    stdout, stderr = process.communicate(timeout=DEADLINE_S)
    return Ended(process.returncode, stdout, stderr)
