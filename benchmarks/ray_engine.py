"""What a row costs the driver with `--engine ray`, and rows per second, against a fixed answer on this machine.

    python benchmarks/ray_engine.py                     # one round; some three minutes
    python benchmarks/ray_engine.py --in-flight 1024 --actors 1 2 4

The CPU is that of the driver alone, all its threads: the slope between a short run and a long one, as in row.py. It
decides where one driver ends, because actors can be on other machines. Rows per second from the first request to the
last commit depend on the cores here, which driver, actors, Ray and the target share.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from datetime import datetime
from pathlib import Path

from row import BY_THREAD, LONG, SHORT, Target, command, environ, slope
from throughput import fixed_answer_server


def run(url: str, rows: int, in_flight: int, flags: list[str]) -> tuple[float, float]:
    """Seconds of CPU of the driver, and seconds from the first request to the end."""
    with tempfile.TemporaryDirectory(prefix="batchrun-bench-", dir=".") as folder:
        arguments = [*command(Target(url, in_flight), rows, Path(folder).resolve()), *flags]
        ended = subprocess.run(
            [sys.executable, "-c", BY_THREAD, *arguments], check=True, capture_output=True, text=True, env=environ()
        )
        (log,) = Path(folder).glob("out-*/run.log")
        lines = [json.loads(line) for line in log.read_text().splitlines()]
    used = json.loads(ended.stdout.splitlines()[-1])
    times = {line["event"]: datetime.fromisoformat(line["at"]).timestamp() for line in lines}
    return used["user"] + used["system"], times["complete"] - times["transport"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--in-flight", type=int, nargs="*", default=[64, 1024])
    parser.add_argument("--actors", type=int, nargs="*", default=[1, 2])
    arguments = parser.parse_args()
    engines = {"local": list[str]()}
    for actors in arguments.actors:
        engines[f"ray, {actors}"] = ["--engine", "ray", "--set", f"engine.actors={actors}"]
    print("| engine | in flight | driver: µs of CPU a row | rows/s here | rows/s that the driver's core allows |")
    print("| --- | --- | --- | --- | --- |", flush=True)
    with fixed_answer_server() as url:
        for in_flight in arguments.in_flight:
            for name, flags in engines.items():
                (few, _), (many, seconds) = (run(url, rows, in_flight, flags) for rows in (SHORT, LONG))
                each_s, _ = slope(few, many, (SHORT, LONG))
                rate = LONG / seconds
                print(f"| {name} | {in_flight} | {each_s * 1e6:.0f} | {rate:,.0f} | {1 / each_s:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
