"""The process that is to be killed: the real command line, with marked points, a trace and perhaps a seeded bug.

`python -m tests.crash.launcher ORDERS ARGUMENTS…`: ORDERS is the JSON of `Orders`, the rest is for `batchrun`.
"""

import itertools
import mmap
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import msgspec

from tests.crash import bugs, points

WHERE_BYTES = 64


class Orders(msgspec.Struct, frozen=True):
    """What this process is to do to itself. `where` holds the last point passed, `trace` the order of calls."""

    where: str
    trace: str
    point: str | None = None
    passage: int = 1
    bug: str | None = None


class Spot:
    """The last point passed, in mapped memory: the page cache keeps it through the kill."""

    def __init__(self, path: str) -> None:
        Path(path).write_bytes(bytes(WHERE_BYTES))
        with open(path, "r+b") as file:
            self._map = mmap.mmap(file.fileno(), WHERE_BYTES)

    def write(self, name: str) -> None:
        self._map[:] = name.encode().ljust(WHERE_BYTES, b"\0")


def obey(orders: Orders) -> None:
    """The marks are set, with the death that was ordered at one of them."""
    spot = Spot(orders.where)
    passages = itertools.count(1)

    def passed(name: str) -> None:
        spot.write(name)
        if name == orders.point and next(passages) == orders.passage:
            os.kill(os.getpid(), signal.SIGKILL)

    for point in points.POINTS.values():
        points.mark(point, passed)


def cut_small() -> None:
    """Files of 15 rows have several pieces, so that there is a middle of them; a 429 cools for tenths of a second."""
    import batchrun.limits.circuit
    import batchrun.store.stored_window
    import batchrun.tables.files

    for module, name, value in (
        (batchrun.store.stored_window, "BATCH_ROWS", 4),
        (batchrun.tables.files, "ROW_GROUP_ROWS", 8),
        (batchrun.limits.circuit, "BACKOFF_BASE_S", 0.1),
    ):
        assert hasattr(module, name), f"{module.__name__}.{name} is gone: mend tests/crash/launcher.py"
        setattr(module, name, value)


def trace_to(path: str) -> None:
    """Each fsync, each rename, and each file that the database is handed, is a line in `path`, with its thread."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    fsync, rename = os.fsync, os.rename

    def note(*words: Any) -> None:
        thread = f"{os.getpid()}.{threading.get_native_id()}"
        os.write(file, "\t".join(map(str, (thread, *words))).encode() + b"\n")

    def traced_fsync(descriptor: int) -> None:
        note("fsync", Path(f"/proc/self/fd/{descriptor}").readlink())
        fsync(descriptor)

    def traced_rename(source: Any, target: Any, **options: Any) -> None:
        note("rename", source, target)
        rename(source, target, **options)

    for name, traced in (("fsync", traced_fsync), ("rename", traced_rename)):
        setattr(os, name, traced)
    for name in ("between part and seal", "before the chunk is on record", "between result and finished"):
        points.mark(points.POINTS[name], lambda name: note("record", name))


def main() -> None:
    orders = msgspec.json.decode(sys.argv[1], type=Orders)
    if orders.bug is not None:
        bugs.plant(bugs.BUGS[orders.bug])
    import batchrun.cli
    import batchrun.engine

    cut_small()
    trace_to(orders.trace)
    obey(orders)
    sys.argv = ["batchrun", *sys.argv[2:]]
    batchrun.cli.main()


if __name__ == "__main__":
    main()
