"""How much of a rate limit a run uses, and what it does when the limit moves: real runs against a strict simulator.

    python benchmarks/limits.py                     # every scenario, one after the other; about 20 minutes
    python benchmarks/limits.py --only configured,shared  # some of them
    python benchmarks/limits.py --only outage-500 --long    # the outage lasts ten minutes

Prints a Markdown row a scenario. The simulator enforces continuous buckets of two seconds' worth. Its answers take
0.4 s (median; log-normal, 95 % within a factor of 1.5). `took` is from the arrival of the first request to the last
answer, both by the simulator's ledger. `ideal` is max(rows / rpm, tokens / tpm) − 2 s of burst + 0.4 s.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from bisect import bisect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec

from batchrun.simulator import Fault, LedgerLine, PlannedChange, SimulatorConfig, read_ledger

HERE = Path(__file__).parent

RPM, TPM = 3_000, 600_000
BURST_S = 2.0
LATENCY_S, LATENCY_SIGMA = 0.4, 0.2
SETTLING_S = 30.0  # how long a run may take to find a limit that has moved
WINDOW_S = 15.0  # over which the pace is then measured
SLACK_S = 120.0  # on top of twice the ideal time; then the run is ended and counts as failed

JOB = """
[endpoint]
url = "{url}"
name = "bench"
api_key_env = "BENCH_KEY"

[request]
model = "vtrix-gpt-5.3-codex"
prompt = "{{{{ text }}}}"
max_tokens = 40

[limits]
{limits}

[output]
path = "{out}"
"""

CONFIGURED = f"requests_per_minute = {RPM}\ntokens_per_minute = {TPM}"


@dataclass(frozen=True)
class Served:
    """What one run of the command line did, by the ledger of what was served to it."""

    lines: list[LedgerLine]
    other: list[LedgerLine]
    """The second client's."""
    started_s: float
    """When the simulator was started, Unix time."""
    failed: int
    pending: int

    @property
    def accepted(self) -> list[LedgerLine]:
        """In the order of their arrival."""
        return sorted((line for line in self.lines if line.billed), key=lambda line: line.arrived_s)

    @property
    def took_s(self) -> float:
        """From the first request's arrival to the last answer."""
        return max(line.time_s for line in self.accepted) - min(line.arrived_s for line in self.lines)

    @property
    def tokens(self) -> int:
        return sum(line.prompt_tokens + line.completion_tokens for line in self.accepted)

    @property
    def refused_percent(self) -> float:
        return 100 * sum(line.status == 429 for line in self.lines) / len(self.lines)

    def accepted_between(self, from_s: float, until_s: float) -> int:
        """How many requests were accepted between two ages of the run."""
        begin_s = min(line.arrived_s for line in self.lines)
        return sum(from_s <= line.arrived_s - begin_s < until_s for line in self.accepted)

    def out_at_once(self) -> float:
        """The median number of requests at the server, over the arrivals of the second half."""
        later = self.accepted[len(self.accepted) // 2 :]
        ends = sorted(line.time_s for line in self.accepted)
        out = sorted(i + len(self.accepted) // 2 - bisect(ends, line.arrived_s) for i, line in enumerate(later))
        return out[len(out) // 2]

    @property
    def median_latency_s(self) -> float:
        latencies = sorted(line.time_s - line.arrived_s for line in self.accepted)
        return latencies[len(latencies) // 2]

    def per_minute(self, from_s: float) -> float:
        """Requests accepted a minute, over `WINDOW_S` from that age of the simulator on."""
        begin_s = self.started_s + from_s
        return sum(begin_s <= line.arrived_s < begin_s + WINDOW_S for line in self.accepted) * 60 / WINDOW_S


@dataclass(frozen=True)
class Scenario:
    """A simulator, a run against it, and its targets."""

    name: str
    server: SimulatorConfig
    limits: str
    """The job's `[limits]`."""
    prompts: Sequence[int]
    """The words of each row's prompt; a word is five bytes, and four bytes are a token."""
    target: str
    met: Callable[[Served, float], bool]
    """Judges by what was served, and by the share of the ideal in percent."""
    rpm: float = RPM
    lost_s: float = 0.0
    """What the ideal run loses, seconds: an outage."""
    second_client_rpm: float = 0.0
    retry_ideal: int = 0
    """In flight: the ideal is what a client takes that only sends a refused row again, with so many at once."""
    fixed_ideal_s: float | None = None
    notes: Callable[[Served], str] = field(default=lambda served: "")

    def ideal_s(self, tokens: int) -> float:
        """For rows and tokens at full speed from the first second."""
        if self.fixed_ideal_s is not None:
            return self.fixed_ideal_s
        return 60 * max(len(self.prompts) / self.rpm, tokens / TPM) - BURST_S + LATENCY_S + self.lost_s


def server(**settings: object) -> SimulatorConfig:
    """The simulator that every scenario starts from."""
    common = SimulatorConfig(
        requests_per_minute=RPM, tokens_per_minute=TPM, latency_s=LATENCY_S, latency_sigma=LATENCY_SIGMA
    )
    return msgspec.structs.replace(common, **settings)


def full_speed(percent: float, refused_percent: float) -> Callable[[Served, float], bool]:
    return lambda served, ideal: ideal >= percent and served.refused_percent <= refused_percent


# ── the scenarios ─────────────────────────────────────────────────────────────────────────────────────────────────────


def plain(name: str, limits: str, percent: float, refused_percent: float, **settings: object) -> Scenario:
    """3,000 short rows against fixed limits."""
    return Scenario(
        name=name,
        server=server(**settings),
        limits=limits,
        prompts=[60] * 3_000,
        target=f"≥ {percent:g} %, ≤ {refused_percent:g} % 429",
        met=full_speed(percent, refused_percent),
    )


def mixed_tokens() -> Scenario:
    """Prompts of 50 to 20,000 tokens, evenly over the orders of magnitude, for two minutes at the token limit."""
    rng = random.Random(4)
    prompts = [int(50 * 400 ** rng.random() * 4 / 5) for _ in range(360)]
    big = [row for row, words in enumerate(prompts) if words >= 8_000]

    def latest(served: Served) -> int:
        """How many rows that come after it in the input were sent before a big one, at most."""
        order = list(dict.fromkeys(row_of(line) for line in sorted(served.lines, key=lambda line: line.arrived_s)))
        return max(sum(later > row for later in order[: order.index(row)]) for row in big if row in order)

    return Scenario(
        name="tokens",
        server=server(),
        limits=CONFIGURED,
        prompts=prompts,
        target="≥ 97 %, big ones in their turn",
        met=lambda served, ideal: ideal >= 97 and latest(served) <= 2,
        notes=lambda served: f"{len(big)} prompts ≥ 10,000 tokens, overtaken by {latest(served)} at most",
    )


def moved_limits(name: str, limits: str, **settings: object) -> Scenario:
    """The limits are halved at 40 s and restored at 95 s."""
    down_s, up_s = 40.0, 95.0
    changes = (
        PlannedChange(at_s=down_s, requests_per_minute=RPM // 2, tokens_per_minute=TPM // 2),
        PlannedChange(at_s=up_s, requests_per_minute=RPM, tokens_per_minute=TPM),
    )

    def paces(served: Served) -> tuple[float, float]:
        return served.per_minute(down_s + SETTLING_S), served.per_minute(up_s + SETTLING_S)

    def met(served: Served, ideal: float) -> bool:
        halved, restored = paces(served)
        return abs(halved - RPM / 2) <= RPM / 20 and abs(restored - RPM) <= RPM / 10

    return Scenario(
        name=name,
        server=server(limit_changes=changes, **settings),
        limits=limits,
        prompts=[60] * (2_000 + 1_375 + 2_600),
        target="within 10 % of the new limit after 30 s",
        met=met,
        lost_s=(up_s - down_s) / 2,
        notes=lambda served: "{:,.0f} then {:,.0f} rpm".format(*paces(served)),
    )


def shared_key() -> Scenario:
    """A second client sends at half of the limit all the time."""

    def second(served: Served) -> float:
        """What share of its own pace the second client got while both were there, in percent."""
        begin_s, end_s = served.accepted[0].arrived_s, served.accepted[-1].arrived_s
        got = sum(line.billed and begin_s <= line.arrived_s <= end_s for line in served.other)
        return 100 * got / ((end_s - begin_s) * RPM / 2 / 60)

    return Scenario(
        name="shared",
        server=server(),
        limits=CONFIGURED,
        prompts=[60] * 2_250,
        target="≤ 3 % 429, both get ≥ 85 % of their half",
        met=lambda served, ideal: served.refused_percent <= 3 and ideal >= 85 and second(served) >= 85,
        rpm=RPM / 2,
        second_client_rpm=RPM / 2,
        notes=lambda served: f"the second client got {second(served):.0f} % of its pace",
    )


def outage(name: str, fault: Fault, length_s: float) -> Scenario:
    """Nothing but failures for a while, 20 s after the start. One minute sees about ten probes fewer than ten do."""
    fewer_than = 30 if length_s >= 600 else 20
    begin_s = 20.0
    fault = msgspec.structs.replace(fault, after_s=begin_s, until_s=begin_s + length_s)

    def sent(served: Served) -> int:
        return sum(line.fault is not None for line in served.lines)

    return Scenario(
        name=name,
        server=server(faults=(fault,)),
        limits=CONFIGURED,
        prompts=[60] * 2_000,
        target=f"< {fewer_than} requests in {length_s:g} s, all rows done",
        met=lambda served, ideal: sent(served) < fewer_than,
        lost_s=length_s,
        notes=lambda served: f"{sent(served)} requests in the outage",
    )


def by_chance(
    name: str, share: float, percent: float, *, retry_after: str | None = "1", until_s: float | None = None
) -> Scenario:
    """A share of everything is refused, whatever the pace; 32 in flight, answers of 0.1 s. `until_s`: from 5 s on."""
    fault = Fault(
        kind="status", status=429, code="rate_limit_exceeded", share=share, retry_after=retry_after, message="Slow down"
    )
    if until_s is not None:
        fault = msgspec.structs.replace(fault, after_s=5.0, until_s=until_s)

    def back(served: Served) -> float:
        """The rate in the ten seconds after it ended, in percent of the rate before it began."""
        before = served.accepted_between(2.0, 5.0) / 3
        return 100 * served.accepted_between((until_s or 0) + 5, (until_s or 0) + 10) / 5 / before

    return Scenario(
        name=name,
        server=SimulatorConfig(latency_s=0.1, latency_sigma=0.2, headers=False, faults=(fault,)),
        limits="max_in_flight = 32",
        prompts=[2] * 3_000 if until_s is None else [2] * 8_000,
        target=f"≥ {percent:g} %" + ("" if until_s is None else ", back within 10 s"),
        met=lambda served, ideal: ideal >= percent and (until_s is None or back(served) >= 90),
        retry_ideal=32,
        notes=lambda served: "" if until_s is None else f"{back(served):.0f} % of the rate before",
    )


def crowded() -> Scenario:
    """Refuses above 16 at once, and says nothing of when to come back."""
    rows, latency_s = 3_000, 0.2
    return Scenario(
        name="crowded",
        server=SimulatorConfig(latency_s=latency_s, latency_sigma=0.2, headers=False, refuse_above=16),
        limits="max_in_flight = 64",
        prompts=[2] * rows,
        target="≥ 90 % of what 16 give, ≤ 2 % 429",
        met=full_speed(90, 2),
        fixed_ideal_s=rows / 16 * latency_s * 1.02 + latency_s,  # the mean of the log-normal is 2 % above its median
    )


def queueing() -> Scenario:
    """Refuses nothing, and works on 16 at a time."""
    rows, latency_s = 3_000, 0.2

    def met(served: Served, ideal: float) -> bool:
        return ideal >= 97 and served.out_at_once() <= 40 and served.median_latency_s <= 2.5 * latency_s

    return Scenario(
        name="queueing",
        server=SimulatorConfig(latency_s=latency_s, latency_sigma=0.1, headers=False, work_on=16),
        limits="max_in_flight = 64",
        prompts=[2] * rows,
        target="≥ 97 %, ≤ 40 in flight, p50 ≤ 0.5 s",
        met=met,
        fixed_ideal_s=rows / 16 * latency_s * 1.005 + latency_s,
        notes=lambda served: f"{served.out_at_once():.0f} in flight, p50 {served.median_latency_s:.2f} s",
    )


CHANCE_OF_ONE = Fault(
    kind="status", status=429, code="rate_limit_exceeded", share=0.01, retry_after="1", message="Slow down"
)

FAILING = Fault(kind="status", status=500)
OVERLOADED = Fault(kind="status", status=503, code="overloaded", message="The server is overloaded")


def scenarios(outage_s: float) -> list[Scenario]:
    return [
        plain("configured", CONFIGURED, 99.5, 0.1),
        plain("configured-no-headers", CONFIGURED, 98, 0.1, headers=False),
        plain("headers", "", 97, 0.5),
        plain("no-headers", "", 92, 2, headers=False),
        mixed_tokens(),
        moved_limits("moved", CONFIGURED),
        moved_limits("moved-no-headers", "", headers=False),
        shared_key(),
        by_chance("chance-0.5", 0.005, 90),
        by_chance("chance-1", 0.01, 90),
        by_chance("chance-5", 0.05, 90),
        by_chance("chance-20", 0.20, 80),
        by_chance("chance-0.5-no-retry-after", 0.005, 90, retry_after=None),
        by_chance("chance-1-no-retry-after", 0.01, 90, retry_after=None),
        by_chance("chance-5-no-retry-after", 0.05, 90, retry_after=None),
        by_chance("chance-20-no-retry-after", 0.20, 80, retry_after=None),
        by_chance("chance-5-for-10-s", 0.05, 90, until_s=15.0),
        plain("configured-chance-1", CONFIGURED, 95, 3, faults=(CHANCE_OF_ONE,)),
        plain("no-headers-chance-1", "", 95, 4, headers=False, faults=(CHANCE_OF_ONE,)),
        crowded(),
        queueing(),
        outage("outage-500", FAILING, outage_s),
        outage("outage-503", OVERLOADED, outage_s),
    ]


# ── running them ──────────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def process(*command: str) -> Iterator[str]:
    """The first line that the process prints, which runs until the block ends."""
    started = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True)
    try:
        assert started.stdout is not None
        yield started.stdout.readline().strip().removeprefix("listening on ")
    finally:
        started.terminate()
        started.wait()


@contextmanager
def second_client(url: str, requests_per_minute: float) -> Iterator[None]:
    """It sends until the block ends; there is none at a rate of 0."""
    if not requests_per_minute:
        yield
        return
    started = subprocess.Popen([sys.executable, str(HERE / "second_client.py"), url, str(requests_per_minute)])
    time.sleep(3)  # it has found its pace
    try:
        yield
    finally:
        ended = started.poll()
        started.terminate()
        started.wait()
        if ended is not None:
            raise SystemExit("the second client ended before the run")


def write_input(path: Path, prompts: Sequence[int]) -> None:
    with path.open("w") as file:
        for row, words in enumerate(prompts):
            file.write(json.dumps({"text": f"row {row} " + "word " * words}) + "\n")


def retry_ideal_s(scenario: Scenario, folder: Path) -> float:
    """What a client takes that only sends a refused row again, against the same server."""
    ledger = folder / "ideal.jsonl"
    config = msgspec.structs.replace(scenario.server, ledger=str(ledger))
    with process("-m", "batchrun.simulator", msgspec.json.encode(config).decode()) as url:
        client = [
            sys.executable,
            str(HERE / "retry_client.py"),
            url,
            str(len(scenario.prompts)),
            str(scenario.retry_ideal),
        ]
        subprocess.run(client, check=True)
    return Served(list(read_ledger(ledger)), [], 0.0, 0, 0).took_s


def serve(scenario: Scenario, folder: Path) -> Served:
    """One run of the command line in `folder`, against a simulator of its own."""
    source, job, out, ledger = (folder / name for name in ("in.jsonl", "job.toml", "out", "ledger.jsonl"))
    write_input(source, scenario.prompts)
    config = msgspec.structs.replace(scenario.server, ledger=str(ledger))
    with process("-m", "batchrun.simulator", msgspec.json.encode(config).decode()) as url:
        started_s = time.time()
        job.write_text(JOB.format(url=url, limits=scenario.limits, out=out))
        with second_client(url, scenario.second_client_rpm):
            run(job, source, 2 * scenario.ideal_s(sum(scenario.prompts) * 5 // 4) + SLACK_S)
    summary = json.loads((out / "summary.json").read_bytes())
    ours, others = list[LedgerLine](), list[LedgerLine]()
    for line in read_ledger(ledger):
        (others if line.client_request_id is None else ours).append(line)
    failed = sum(summary["by_status"].get(status, 0) for status in ("error", "invalid", "empty"))
    return Served(ours, others, started_s, failed, summary["pending"])


def run(job: Path, source: Path, timeout_s: float) -> None:
    """The command line has ended; after `timeout_s` it was stopped, and the pending rows show it."""
    started = subprocess.Popen(
        [sys.executable, "-c", "from batchrun.cli import main; main()", "run", str(job), "-i", str(source)],
        env={**os.environ, "BENCH_KEY": "bench-key-000000"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        started.wait(timeout_s)
    except subprocess.TimeoutExpired:
        started.terminate()
        started.wait()


def row_of(line: LedgerLine) -> int:
    """The row that an exchange was for: requests are named run-row-attempt."""
    return int(str(line.client_request_id).rsplit("-", 2)[1])


def table_row(scenario: Scenario, served: Served) -> str:
    """The scenario's line of the table."""
    ideal_s = scenario.ideal_s(served.tokens)
    percent = 100 * ideal_s / served.took_s
    done = not served.failed and not served.pending
    cells = [
        scenario.name,
        f"{ideal_s:.1f}",
        f"{served.took_s:.1f}",
        f"{percent:.2f}",
        f"{len(served.lines):,}",
        f"{served.refused_percent:.2f}",
        f"{served.failed}" + (f" ({served.pending} pending)" if served.pending else ""),
        scenario.target,
        "yes" if done and scenario.met(served, percent) else "**no**",
        scenario.notes(served),
    ]
    return "| " + " | ".join(cells) + " |"


HEADER = """\
| scenario | ideal s | took s | % of ideal | requests served | 429 % | rows failed | target | met | |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"""


def paces(served: Served, step_s: float = 5.0) -> Iterator[str]:
    """How a run found its pace: what was accepted and refused, a line for every five seconds."""
    begin_s = min(line.arrived_s for line in served.lines)
    for step in range(int(served.took_s / step_s) + 1):
        lines = [line for line in served.lines if step == (line.arrived_s - begin_s) // step_s]
        billed = [line for line in lines if line.billed]
        tokens = sum(line.prompt_tokens + line.completion_tokens for line in billed)
        refused = sum(line.status == 429 for line in lines)
        failed = sum(line.fault is not None for line in lines)
        yield (
            f"{step * step_s:>6.0f} s  {len(billed) * 60 / step_s:>6,.0f} rpm  {tokens * 60 / step_s:>9,.0f} tpm"
            f"  {refused:>4} refused  {failed:>4} failed"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="NAMES", help="scenarios, with commas between them")
    parser.add_argument("--long", action="store_true", help="outages of ten minutes instead of one")
    parser.add_argument("--paces", action="store_true", help="also show each run, five seconds a line, on stderr")
    arguments = parser.parse_args()
    known = scenarios(600.0 if arguments.long else 60.0)
    wanted = arguments.only.split(",") if arguments.only else [scenario.name for scenario in known]
    if unknown := set(wanted) - {scenario.name for scenario in known}:
        parser.error(f"no such scenario: {', '.join(sorted(unknown))}")
    print(HEADER, flush=True)
    for scenario in known:
        if scenario.name in wanted:
            with tempfile.TemporaryDirectory(prefix="batchrun-bench-", dir=".") as folder:
                if scenario.retry_ideal:
                    ideal_s = retry_ideal_s(scenario, Path(folder).resolve())
                    scenario = replace(scenario, fixed_ideal_s=ideal_s)
                served = serve(scenario, Path(folder).resolve())
            print(table_row(scenario, served), flush=True)
            if arguments.paces:
                print(*paces(served), sep="\n", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
