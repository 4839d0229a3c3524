"""What a prompt cache saves, by the order of the prompt and of the requests: real runs on the simulator.

    python benchmarks/prompt_cache.py               # 2,000 rows each; about a quarter of an hour

Prints a Markdown row a run. Each request has about 1,900 tokens, of which 1,536 can be cached; the simulator has an
implicit cache (docs/simulator.md, "The prompt cache"). Costs are at the list price of the model.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from batchrun.simulator import read_ledger

RULES = " ".join(f"Rule {number}: a review that speaks of part {number} has label {number}." for number in range(120))

JOB = """
[endpoint]
url = "simulator"

[input]
path = "{rows}"

[request]
model = "vtrix-gpt-5.3-codex"
{prompt}
max_tokens = 16

[limits]
requests_per_minute = {rpm}

[simulator]
latency_s = 1.0
cache_life_s = 300
ledger = "{ledger}"
"""

FIRST = f"prompt = {json.dumps('{{ text }} ' + RULES)}"
LAST = f'system = {json.dumps(RULES)}\nprompt = "{{{{ text }}}}"'


def measured(folder: Path, prompt: str, *, rows: int, rpm: int, cache_prefix: bool) -> tuple[float, float, float]:
    """The cached share of the prompt tokens, USD, and seconds of one run."""
    folder.mkdir()
    review = "the battery of this camera lasts for two days of quiet use, and then it needs a new one " * 10
    lines = (json.dumps({"text": f"Review {row}: {review}"}) for row in range(rows))
    (folder / "rows.jsonl").write_text("\n".join(lines))
    job = JOB.format(rows=folder / "rows.jsonl", prompt=prompt, ledger=folder / "ledger.jsonl", rpm=rpm)
    (folder / "job.toml").write_text(job)
    run = [
        "run",
        str(folder / "job.toml"),
        "-o",
        str(folder / "out"),
        "--set",
        f"request.cache_prefix={cache_prefix}".lower(),
    ]
    subprocess.run(
        [sys.executable, "-c", "from batchrun.cli import main; main()", *run], check=True, capture_output=True
    )
    ledger = read_ledger(folder / "ledger.jsonl")
    summary = json.loads((folder / "out" / "summary.json").read_bytes())
    share = sum(line.cached_tokens for line in ledger) / sum(line.prompt_tokens for line in ledger)
    return share, float(summary["cost_usd"]), ledger[-1].time_s - ledger[0].arrived_s


def results(rows: int) -> Iterator[str]:
    """The table, row by row."""
    yield "| row data | `cache_prefix` | requests a minute | prompt tokens cached | cost | time |"
    yield "| --- | --- | --- | --- | --- | --- |"
    with tempfile.TemporaryDirectory(prefix="prompt-cache-") as scratch:
        for place, prompt in (("first", FIRST), ("last", LAST)):
            for rpm in (600, 3_000):
                for cache_prefix in (False, True):
                    folder = Path(scratch) / f"{place}-{rpm}-{cache_prefix}"
                    found = measured(folder, prompt, rows=rows, rpm=rpm, cache_prefix=cache_prefix)
                    share, cost_usd, seconds = found
                    on = "on" if cache_prefix else "off"
                    yield f"| {place} | {on} | {rpm:,} | {share:.0%} | ${cost_usd:.2f} | {seconds:.0f} s |"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2_000)
    for line in results(parser.parse_args().rows):
        print(line, flush=True)


if __name__ == "__main__":
    main()
