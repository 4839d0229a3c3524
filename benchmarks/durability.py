"""What durability costs: the same run with every commit synced to the disk, and with none.

    python benchmarks/durability.py            # five pairs of 30,000 rows at 256 in flight; about two minutes

Prints each pair, the median ratio, and the disk's own fdatasync beside it. A promise of the project: at most 15 %.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

from throughput import fixed_answer_server, whole_run

UNSYNCED = """
import batchrun.store.database as module
opened = module.Database.open.__func__
def unsynced(cls, *arguments):
    database = opened(cls, *arguments)
    database.query("PRAGMA synchronous = OFF")
    return database
module.Database.open = classmethod(unsynced)
"""


def fdatasync_ms(folder: Path, writes: int = 300) -> float:
    """The median time of a 4 KB write and its fdatasync, in milliseconds."""
    descriptor = os.open(folder / "probe", os.O_WRONLY | os.O_CREAT)
    times = []
    for _ in range(writes):
        os.write(descriptor, bytes(4096))
        started = time.perf_counter()
        os.fdatasync(descriptor)
        times.append((time.perf_counter() - started) * 1000)
    os.close(descriptor)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=30_000)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--in-flight", type=int, default=256)
    arguments = parser.parse_args()
    ratios = []
    with fixed_answer_server() as url, tempfile.TemporaryDirectory(prefix="batchrun-bench-", dir=".") as root:
        print(f"fdatasync p50 {fdatasync_ms(Path(root)):.2f} ms", flush=True)
        for pair in range(arguments.pairs):
            rates = []
            for prelude in ("", UNSYNCED) if pair % 2 else (UNSYNCED, ""):
                with tempfile.TemporaryDirectory(dir=root) as folder:
                    measured = whole_run(url, arguments.rows, arguments.in_flight, Path(folder).resolve(), prelude)
                rates.append((prelude == "", measured.rows / measured.asking_s))
            durable, unsynced = (rate for _, rate in sorted(rates, reverse=True))
            ratios.append(durable / unsynced)
            print(f"durable {durable:,.0f} rows/s, unsynced {unsynced:,.0f} rows/s: {ratios[-1]:.3f}", flush=True)
    print(f"median: durability costs {(1 - statistics.median(ratios)) * 100:.1f} % of the rows/s")


if __name__ == "__main__":
    main()
