"""Which Python functions a row passes in the event loop's thread while rows are sent, and the bytecodes of each.

    python benchmarks/bytecodes.py               # some ten seconds, whatever else the machine does
    python benchmarks/bytecodes.py --most 200

The slope between two short runs as in `row.py`, by `sys.settrace`. It does not see what happens in C: there, a
property, `min`, a member of an enum or a search of bytes in bytes costs as much as twenty bytecodes and more
(docs/benchmarks.md).
"""

import argparse
import collections
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from row import Target, command, environ
from throughput import fixed_answer_server

FEW, MANY = 500, 1_500

COUNTED = """
import collections, json, os, sys
from batchrun.dispatch.dispatch import Dispatch
bytecodes, calls = collections.Counter(), collections.Counter()
def on_event(frame, event, argument):
    if event == "opcode":
        bytecodes[frame.f_code] += 1
    return on_event
def on_call(frame, event, argument):
    frame.f_trace_opcodes, frame.f_trace_lines = True, False
    calls[frame.f_code] += 1
    return on_event
def name(code):
    file = code.co_filename.split("site-packages/")[-1]
    return f"{os.path.relpath(file) if os.path.isabs(file) else file} {code.co_qualname}:{code.co_firstlineno}"
send_all = Dispatch._send_all
async def counted(self, *arguments):
    sys.settrace(on_call)
    try:
        return await send_all(self, *arguments)
    finally:
        sys.settrace(None)
        found = [(name(code), count, calls[code]) for code, count in bytecodes.items()]
        with open(os.environ["COUNTED_TO"], "w") as file:
            json.dump(found, file)
Dispatch._send_all = counted
from batchrun.cli import main; main()
"""

Counts = dict[str, tuple[float, float]]
"""(bytecodes, calls) by function."""


def counted(to: Target, rows: int, folder: Path) -> Counts:
    """Those of one run."""
    counted_to = folder / f"counted-{rows}.json"
    whole = [sys.executable, "-c", COUNTED, *command(to, rows, folder)]
    subprocess.run(whole, check=True, capture_output=True, env={**environ(), "COUNTED_TO": str(counted_to)})
    found: Counts = {}
    for name, bytecodes, calls in json.loads(counted_to.read_text()):
        before = found.get(name, (0, 0))
        found[name] = before[0] + bytecodes, before[1] + calls
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, default=40, help="how many functions are printed")
    parser.add_argument("--in-flight", type=int, default=64)
    arguments = parser.parse_args()
    with fixed_answer_server() as url, tempfile.TemporaryDirectory(prefix="batchrun-bench-", dir=".") as folder:
        to, made = Target(url, arguments.in_flight), Path(folder).resolve()
        few, many = counted(to, FEW, made), counted(to, MANY, made)
    a_row = {
        name: [(after - before) / (MANY - FEW) for after, before in zip(counts, few.get(name, (0, 0)), strict=True)]
        for name, counts in many.items()
    }
    packages: dict[str, float] = collections.defaultdict(float)
    for name, (bytecodes, _) in a_row.items():
        packages["/".join(name.split(" ")[0].split("/")[:2])] += bytecodes
    totals = [sum(figures) for figures in zip(*a_row.values(), strict=True)]
    print(f"{totals[0]:,.0f} bytecodes and {totals[1]:.0f} calls of Python functions a row\n")
    for package, bytecodes in sorted(packages.items(), key=lambda each: -each[1])[:12]:
        print(f"{bytecodes:8.0f}        {package}")
    print()
    for name, (bytecodes, calls) in sorted(a_row.items(), key=lambda each: -each[1][0])[: arguments.most]:
        print(f"{bytecodes:8.1f} {calls:6.2f} {name}")


if __name__ == "__main__":
    main()
