"""The simulator as tests use it: a real process on a port of its own, ended with the block that started it."""

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from batchrun.simulator import LedgerLine, SimulatorConfig, read_ledger
from tests import prefork

_PREFIX = "listening on "


@dataclass(frozen=True, slots=True)
class RunningSimulator:
    """`url` is the base, such as `http://127.0.0.1:40123/v1`; the ledger's file outlives the process, not the block."""

    url: str
    ledger_path: Path
    pid: int

    def ledger(self) -> list[LedgerLine]:
        """What was served up to now."""
        return read_ledger(self.ledger_path)


@contextmanager
def running_simulator(config: SimulatorConfig | None = None) -> Iterator[RunningSimulator]:
    """A simulator that serves until the block ends, with a ledger of its own unless `config` names one."""
    config = config or SimulatorConfig()
    with tempfile.TemporaryDirectory(prefix="simulator-") as directory:
        ledger = config.ledger or f"{directory}/ledger.jsonl"
        process = start(msgspec.structs.replace(config, ledger=ledger))
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith(_PREFIX), f"the simulator did not start: {line!r}"
            yield RunningSimulator(line.removeprefix(_PREFIX).strip(), Path(ledger), process.pid)
        finally:
            process.terminate()
            process.communicate(timeout=10)


def start(config: SimulatorConfig) -> subprocess.Popen[str]:
    """The process itself, for tests that end it their own way; its stdout is a pipe."""
    settings = msgspec.json.encode(config).decode()
    return prefork.start("batchrun.simulator.__main__", [settings], os.environ, stdout=subprocess.PIPE)
