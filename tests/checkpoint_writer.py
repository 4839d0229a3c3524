"""A process that puts endings into a checkpoint and prints each row that is durable, until killed or out of room.

MAX_FILE_BYTES in the environment is the size beyond which its files can't grow; RESERVE a file to give back.
"""

import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from batchrun.errors import BatchrunError
from batchrun.records import Ending
from batchrun.store.checkpoint import Checkpoint
from tests import prefork
from tests.endings import completion

IN_FLIGHT = 64


def start(path: Path, **limits: str) -> "subprocess.Popen[str]":
    """The process."""
    environ, pipes = {**os.environ, **limits}, {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return prefork.start("tests.checkpoint_writer", [str(path)], environ, **pipes)


def main() -> None:
    path = Path(sys.argv[1])
    reserve = Path(os.environ["RESERVE"]) if "RESERVE" in os.environ else None
    if reserve is not None:
        reserve.write_bytes(bytes(500_000))
    if limit := int(os.environ.get("MAX_FILE_BYTES", 0)):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    def free_reserve() -> bool:
        if reserve is None or not reserve.exists():
            return False
        reserve.unlink()
        print("reserve freed", file=sys.stderr)
        return True

    checkpoint = Checkpoint(path, free_reserve=free_reserve)
    slots = threading.Semaphore(IN_FLIGHT)
    failed = threading.Event()

    def durable(endings: Sequence[Ending]) -> None:
        print(" ".join(str(ending.row) for ending in endings), flush=True)
        slots.release(len(endings))

    def failure(error: BatchrunError) -> None:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        if checkpoint.failed:
            failed.set()

    checkpoint.listen(durable, failure)
    checkpoint.start_invocation(0.0, 1, "here", "0")
    row = checkpoint.totals.settled()
    while not failed.is_set():
        if slots.acquire(timeout=0.1):
            checkpoint.put(completion(row))
            row += 1
    checkpoint.close()


if __name__ == "__main__":
    main()
