"""Nights that know each other, and equal rows of one input: what was answered before costs no request."""

import asyncio
import json
import random
import shutil
import signal
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import batchrun as batchrun_package
from batchrun import Completion
from batchrun.job.load import load
from batchrun.simulator import Fault, SimulatorConfig, parse_faults
from tests.cli_process import KEY, KEY_ENV, Ended, batchrun, kill_when, read_summary, start, write_job
from tests.simulator_process import RunningSimulator, running_simulator

Record = dict[str, Any]

CHUNKS_OF_50 = "[output]\nchunk_rows = 50\n"
LONG = ("--set", "request.max_tokens=4000")
"""So that no answer is truncated."""


def records(numbers: range | list[int], changed: frozenset[int] = frozenset()) -> list[Record]:
    return [{"id": n, "text": f"item {n}" + (" changed" if n in changed else "")} for n in numbers]


def write(path: Path, rows: list[Record]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def job_of(tmp_path: Path, simulator: RunningSimulator, rows: list[Record]) -> Path:
    return write_job(tmp_path / "job.toml", simulator.url, write(tmp_path / "in.jsonl", rows), CHUNKS_OF_50)


def run(job: Path, out: Path, *more: str | Path, exit_code: int = 0) -> Ended:
    ended = batchrun("run", job, "-o", out, *LONG, *more)
    assert ended.exit_code == exit_code, ended.stderr
    return ended


def rows_of(out: Path) -> list[Record]:
    return pq.read_table(out / "completions.parquet", page_checksum_verification=True).to_pylist()


def require_sums(out: Path) -> None:
    """What the rows say adds up to totals, summary, footer and report, by `verify` and by hand."""
    verified = batchrun("verify", out)
    assert verified.exit_code == 0, verified.stdout
    rows, summary = rows_of(out), read_summary(out)
    usage = pq.read_table(out / "usage.parquet").to_pylist()
    assert [row["row"] for row in rows] == list(range(summary["rows"]))
    assert Counter(row["status"] for row in rows) == summary["by_status"]
    reused = [row for row in rows if row["reused"]]
    copies = [row for row in reused if row["duplicate_of"] is not None]
    saved_usd = sum((row["reused_cost_usd"] or Decimal(0) for row in reused), Decimal(0))
    reported = {name: sum(line[name] for line in usage) for name in ("rows", "attempts", "reused", "duplicates")}
    assert reported["rows"] == len(rows)
    assert (reported["reused"], reported["duplicates"]) == (len(reused), len(copies))
    assert (summary["reused"], summary["duplicates"]) == (len(reused), len(copies))
    assert Decimal(summary["saved_usd"]) == sum(line["saved_usd"] for line in usage) == saved_usd
    billed = [line for line in usage if line["status"] not in ("discarded", "lost")]
    assert sum(line["cost_usd"] for line in billed) == sum(row["answer_cost_usd"] or 0 for row in rows)
    metadata = pq.read_metadata(out / "completions.parquet").metadata or {}
    footer = json.loads(metadata[b"batchrun"])
    assert (footer["reused"], footer["saved_usd"]) == (len(reused), summary["saved_usd"])
    bill = json.loads(batchrun("report", out, "--format", "json").stdout)
    assert bill["total"]["reused"] == len(reused)
    assert Decimal(bill["total"]["saved_usd"]) == saved_usd
    for row in reused:
        assert (row["attempts"], row["cost_usd"], row["latency_s"], row["total_tokens"], row["request_id"]) == (
            *(0, Decimal(0), None, None, None),
        )


@pytest.mark.heavy
def test_the_second_night_sends_exactly_the_changed_rows(tmp_path: Path) -> None:
    with running_simulator() as simulator:
        job = job_of(tmp_path, simulator, records(range(500)))
        run(job, tmp_path / "one")
        sent = len(simulator.ledger())
        changed = frozenset(range(0, 500, 100))
        shuffled = records(random.Random(1).sample(range(500), 500), changed)
        write(tmp_path / "in.jsonl", shuffled)
        ended = run(job, tmp_path / "two", "--reuse", tmp_path / "one")
        requested = simulator.ledger()[sent:]
    assert "to send: 5 of 500 rows; not sent: 495 reused" in ended.stderr
    assert "495 rows without a request; $" in ended.stdout
    rows = rows_of(tmp_path / "two")
    assert len(requested) == 5
    assert {row["id"] for row in rows if not row["reused"]} == changed
    before = {row["id"]: row for row in rows_of(tmp_path / "one")}
    for row in rows:
        if row["reused"]:
            assert row["content"] == before[row["id"]]["content"]
            assert row["reused_cost_usd"] == before[row["id"]]["cost_usd"] > 0
            assert row["reused_from"] == str(tmp_path / "one")
    require_sums(tmp_path / "two")


@pytest.mark.heavy
def test_a_night_without_news_sends_nothing(tmp_path: Path) -> None:
    with running_simulator() as simulator:
        job = job_of(tmp_path, simulator, records(range(120)))
        place = str(tmp_path / "runs" / "{date}")
        setting = (*LONG, "--set", 'input.reuse_from="latest"')
        outs = []
        for day in ("2026-11-01", "2026-11-02", "2026-11-03"):
            ended = batchrun("run", job, "-o", place, "--date", day, *setting)
            assert ended.exit_code == 0, ended.stderr
            outs.append(tmp_path / "runs" / day)
            assert len(simulator.ledger()) == 120
        shutil.rmtree(outs[0])
    rows = rows_of(outs[2])
    assert {row["reused_from"] for row in rows} == {str(outs[0])}
    assert all(row["reused"] and row["reused_cost_usd"] > 0 for row in rows)
    require_sums(outs[2])


@pytest.mark.heavy
def test_failed_and_truncated_answers_are_sent_again(tmp_path: Path) -> None:
    faults = parse_faults("content_policy=0.1")
    with running_simulator(SimulatorConfig(faults=faults)) as simulator:
        job = job_of(tmp_path, simulator, records(range(200)))
        short = ("--set", "request.max_tokens=12", "--max-failures", "200")
        assert batchrun("run", job, "-o", tmp_path / "one", *short).exit_code == 0
        ends = read_summary(tmp_path / "one")["by_status"]
        assert set(ends) == {"ok", "truncated", "filtered"}
        sent = len(simulator.ledger())
        again = ("run", job, *short, "--reuse", tmp_path / "one")
        assert batchrun(*again, "-o", tmp_path / "two").exit_code == 0
        assert len(simulator.ledger()) - sent == ends["truncated"]
        every = ("--set", 'input.reuse_status=["ok", "filtered", "truncated", "error"]')
        assert batchrun(*again, *every, "-o", tmp_path / "three").exit_code == 0
        assert len(simulator.ledger()) - sent == ends["truncated"]
    assert read_summary(tmp_path / "three")["by_status"] == ends
    require_sums(tmp_path / "two")
    require_sums(tmp_path / "three")


FOREIGN = ("large_binary", "hexadecimal", "prefixed", "bare", "dictionary", "floats")


@pytest.mark.heavy
@pytest.mark.parametrize("kind", FOREIGN)
def test_answers_of_other_programs_are_reused(tmp_path: Path, kind: str) -> None:
    with running_simulator() as simulator:
        job = job_of(tmp_path, simulator, records(range(60)))
        run(job, tmp_path / "one")
        sent = len(simulator.ledger())
        table = pq.read_table(tmp_path / "one" / "completions.parquet")
        keys = table.column("request_key")
        place = table.schema.get_field_index("request_key")
        match kind:
            case "hexadecimal":
                table = table.set_column(place, "request_key", pa.array([key.hex() for key in keys.to_pylist() if key]))
            case "prefixed":
                table = table.rename_columns([f"llm_{name}" for name in table.column_names])
            case "bare":
                table = pa.table({"content": table.column("content"), "request_key": keys.cast(pa.binary())})
            case "dictionary":
                at = table.schema.get_field_index("status")
                table = table.set_column(at, "status", table.column("status").dictionary_encode())
            case "floats":
                at = table.schema.get_field_index("cost_usd")
                table = table.set_column(at, "cost_usd", table.column("cost_usd").cast(pa.float64()))
            case _:
                table = table.set_column(place, "request_key", keys.cast(pa.large_binary()))
        pq.write_table(table, tmp_path / "elsewhere.parquet", row_group_size=17)
        run(job, tmp_path / "two", "--reuse", tmp_path / "elsewhere.parquet")
        assert len(simulator.ledger()) == sent
    one, two = rows_of(tmp_path / "one"), rows_of(tmp_path / "two")
    assert [row["content"] for row in two] == [row["content"] for row in one]
    assert {row["reused_from"] for row in two} == {str(tmp_path / "elsewhere.parquet")}
    assert {row["status"] for row in two} == {"ok"}
    if kind != "bare":
        assert [row["reused_cost_usd"] for row in two] == [row["cost_usd"] for row in one]
    require_sums(tmp_path / "two")


@pytest.mark.heavy
def test_sources_may_be_moved_or_missing(tmp_path: Path) -> None:
    with running_simulator(SimulatorConfig(latency_s=0.01)) as simulator:
        job = job_of(tmp_path, simulator, records(range(100)))
        old = tmp_path / "old"
        run(job, old / "parts", "--set", 'output.layout="parts"', "--limit", "30")
        run(job, old / "whole", "--limit", "50")
        budget = ("--set", "budget.max_requests=70", "--set", "output.partial=true")
        run(job, old / "stopped", *budget, exit_code=4)
        sent = len(simulator.ledger())
        moved = old.rename(tmp_path / "moved")
        ended = run(job, tmp_path / "two", "--reuse", tmp_path / "none*", "--reuse", moved, "--reuse", "latest")
        assert len(simulator.ledger()) - sent == 30
        assert f"reuse: {tmp_path}/none*: no earlier answers there yet" in ended.stderr
        assert f"reuse: latest: no earlier answers in {tmp_path}/two yet" in ended.stderr
        for source, why in (
            (tmp_path / "none", "there is no such file or directory"),
            (tmp_path / "in.jsonl", "JSON lines, which hold no types; name the run's directory, or a Parquet file"),
            (tmp_path / "three", "is the run itself"),
        ):
            (tmp_path / "three").mkdir(exist_ok=True)
            refused = batchrun("run", job, "-o", tmp_path / "three", "--reuse", source)
            assert refused.exit_code == 2, refused.stderr
            assert why in refused.stderr
        assert len(simulator.ledger()) - sent == 30
    assert Counter(row["reused_from"] for row in rows_of(tmp_path / "two")) == {
        str(moved / "whole"): 50,
        str(moved / "stopped"): 20,
        None: 30,
    }
    require_sums(tmp_path / "two")


@pytest.mark.heavy
@pytest.mark.parametrize("seed", [1, 2])
def test_kills_repeat_only_requests_in_flight(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    first = records(range(300))
    rows = records([chance.randrange(600) for _ in range(900)], frozenset(range(0, 300, 9)))
    with running_simulator(SimulatorConfig(latency_s=0.03)) as simulator:
        job = job_of(tmp_path, simulator, first)
        run(job, tmp_path / "one")
        sent = len(simulator.ledger())
        write(tmp_path / "in.jsonl", rows)
        command = ("run", job, "-o", tmp_path / "two", *LONG, "--reuse", tmp_path / "one")
        possible = 0
        for served in (40, 130, 250):
            process = start(*command, "--set", "limits.max_in_flight=16")
            kill_when(process, lambda: len(simulator.ledger()) - sent >= served)  # noqa: B023
            process.communicate()
            possible += 16
        run(job, tmp_path / "two", "--reuse", tmp_path / "one")
        requested = Counter(line.question for line in simulator.ledger()[sent:])
    known = {row["text"] for row in first}
    new = {row["text"] for row in rows} - known
    assert len(requested) == len(new)
    assert requested.total() - len(requested) <= possible
    done = rows_of(tmp_path / "two")
    assert [row["text"] for row in done] == [row["text"] for row in rows]
    by_text: dict[str, set[str]] = {}
    for row in done:
        by_text.setdefault(row["text"], set()).add(row["content"])
        if row["duplicate_of"] is not None:
            assert done[row["duplicate_of"]]["text"] == row["text"]
            assert done[row["duplicate_of"]]["duplicate_of"] is None
            assert row["duplicate_of"] < row["row"]
    assert all(len(answers) == 1 for answers in by_text.values())
    assert sum(row["duplicate_of"] is None for row in done) == len(by_text)
    require_sums(tmp_path / "two")


@pytest.mark.heavy
def test_changed_sources_are_looked_up_again(tmp_path: Path) -> None:
    with running_simulator(SimulatorConfig(latency_s=0.05)) as simulator:
        job = job_of(tmp_path, simulator, records(range(300)))
        run(job, tmp_path / "one")
        sent = len(simulator.ledger())
        write(tmp_path / "in.jsonl", records(range(200, 800)))
        reuse = ("--reuse", tmp_path / "one", "--reuse", str(tmp_path / "other*"))
        process = start("run", job, "-o", tmp_path / "two", *LONG, *reuse)
        kill_when(process, lambda: len(simulator.ledger()) > sent, signal.SIGTERM)
        process.communicate()
        (tmp_path / "one").rename(tmp_path / "other")
        (tmp_path / "one").mkdir()
        ended = run(job, tmp_path / "two", *reuse[2:])
        requested = Counter(line.question for line in simulator.ledger()[sent:])
    assert "100 reused" in ended.stderr
    assert len(requested) == 500
    require_sums(tmp_path / "two")


# ── equal rows of one input ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.heavy
def test_equal_rows_are_sent_once(tmp_path: Path) -> None:
    numbers = [0, 1, 1, 2, 0, *range(3, 160), 2, 159, *([7] * 70)]
    with running_simulator() as simulator:
        job = job_of(tmp_path, simulator, records(numbers))
        ended = run(job, tmp_path / "out")
        assert len(simulator.ledger()) == 160
        assert f"to send: 160 of {len(numbers)} rows; not sent: 74 equal to an earlier row" in ended.stderr
        run(job, tmp_path / "all", "--set", "input.dedupe=false")
        assert len(simulator.ledger()) == 160 + len(numbers)
        sampled = run(job, tmp_path / "again", "--set", "input.dedupe=false", "--reuse", tmp_path / "all")
        assert "not sent: 234 reused" in sampled.stderr
        run(job, tmp_path / "more", "--set", "input.dedupe=false", "--reuse", tmp_path / "out")
        assert len(simulator.ledger()) == 160 + len(numbers) + 74, "an answer is one sample, not many"
    rows = rows_of(tmp_path / "out")
    assert [row["id"] for row in rows] == numbers
    for row in rows:
        first = numbers.index(row["id"])
        assert row["duplicate_of"] == (None if first == row["row"] else first)
        assert row["content"] == rows[first]["content"]
        assert row["reused_from"] is None
    for name in ("out", "all", "again", "more"):
        require_sums(tmp_path / name)


@pytest.mark.heavy
def test_a_copy_fails_with_its_original(tmp_path: Path) -> None:
    numbers = [*range(80), *range(80), *range(80)]
    with running_simulator(SimulatorConfig(faults=parse_faults("400=0.2"))) as simulator:
        job = job_of(tmp_path, simulator, records(numbers))
        run(job, tmp_path / "out", exit_code=3)
        requested = Counter(line.question for line in simulator.ledger())
        assert max(requested.values()) == 1
    failed = [row for row in rows_of(tmp_path / "out") if row["status"] == "error"]
    assert len(failed) % 3 == 0
    assert len({(row["id"], row["error"]["message"]) for row in failed}) == len(failed) // 3 > 5
    require_sums(tmp_path / "out")
    with running_simulator() as simulator:
        write_job(job, simulator.url, tmp_path / "in.jsonl", CHUNKS_OF_50)
        run(job, tmp_path / "out", "--retry-failed")
        assert len(simulator.ledger()) == len(failed) // 3
    rows = rows_of(tmp_path / "out")
    assert {row["status"] for row in rows} == {"ok"}
    assert [row["content"] for row in rows[:80]] * 3 == [row["content"] for row in rows]
    require_sums(tmp_path / "out")


@pytest.mark.heavy
def test_copies_wait_for_a_retried_original(tmp_path: Path) -> None:
    slow = Fault(kind="status", status=500, share=0.1, times=2, per_question=True)
    numbers = [number % 90 for number in range(400)]
    with running_simulator(SimulatorConfig(faults=(slow,))) as simulator:
        job = job_of(tmp_path, simulator, records(numbers))
        run(job, tmp_path / "out")
        requested = Counter(line.question for line in simulator.ledger())
    assert len(requested) == 90
    assert set(requested.values()) <= {1, 2, 3}
    require_sums(tmp_path / "out")


@pytest.mark.heavy
def test_copies_survive_pilots_and_changed_input(tmp_path: Path) -> None:
    numbers = [number % 70 for number in range(260)]
    with running_simulator() as simulator:
        job = job_of(tmp_path, simulator, records(numbers))
        run(job, tmp_path / "out", "--limit", "100")
        require_sums(tmp_path / "out")
        run(job, tmp_path / "out")
        assert len(simulator.ledger()) == 70
        require_sums(tmp_path / "out")
        numbers = [500, *numbers[3:], 501, 500, 2]
        write(tmp_path / "in.jsonl", records(numbers))
        run(job, tmp_path / "out", "--accept-changes")
        assert len(simulator.ledger()) == 72
    rows = rows_of(tmp_path / "out")
    assert [row["id"] for row in rows] == numbers
    for row in rows:
        first = numbers.index(row["id"])
        assert row["duplicate_of"] == (None if first == row["row"] else first)
    assert batchrun("verify", tmp_path / "out").exit_code == 0


@pytest.mark.heavy
def test_a_program_gets_every_row_once(tmp_path: Path) -> None:
    numbers = [*range(120), *range(60), *range(200, 260)]
    with running_simulator() as simulator:
        job = job_of(tmp_path, simulator, records(range(40)))
        run(job, tmp_path / "one")
        requested = load(job)
        reuse = msgspec.structs.replace(requested.input, path=None, reuse_from=str(tmp_path / "one"))
        template = msgspec.structs.replace(requested.request, max_tokens=4000)
        requested = msgspec.structs.replace(requested, input=reuse, request=template)

        async def read() -> list[Completion]:
            environ = {KEY_ENV: KEY}
            async with batchrun_package.Runner(
                requested, records(numbers), output=tmp_path / "two", environ=environ
            ) as runner:
                return [completion async for completion in runner]

        for _ in range(2):  # the second start replays a complete run
            found = asyncio.run(read())
            assert sorted(completion.row for completion in found) == list(range(len(numbers)))
            assert Counter(bool(completion.reused) for completion in found) == {True: 100, False: 140}
        assert len(simulator.ledger()) == 40 + 140
    by_row = {completion.row: completion for completion in found}
    assert by_row[50].duplicate_of is None
    assert by_row[170].duplicate_of == 50
    assert by_row[170].content == by_row[50].content
    assert by_row[0].reused_from == str(tmp_path / "one")


@pytest.mark.heavy
def test_what_is_salvaged_keeps_reused_rows_and_copies(tmp_path: Path) -> None:
    numbers = [number % 150 for number in range(400)]
    with running_simulator(SimulatorConfig(latency_s=0.03)) as simulator:
        job = job_of(tmp_path, simulator, records(range(40)))
        run(job, tmp_path / "one")
        write(tmp_path / "in.jsonl", records(numbers))
        reuse = ("--reuse", tmp_path / "one")
        process = start("run", job, "-o", tmp_path / "two", *LONG, *reuse, "--set", "limits.max_in_flight=8")
        kill_when(process, lambda: len(list((tmp_path / "two" / "parts").glob("*.parquet"))) >= 2)
        process.communicate()
        before = {line.question for line in simulator.ledger()}
        part = min((tmp_path / "two" / "parts").glob("*.parquet"))
        content = bytearray(part.read_bytes())
        content[len(content) // 3] ^= 1
        part.write_bytes(bytes(content))
        salvaged = batchrun("verify", tmp_path / "two", "--salvage")
        assert salvaged.exit_code == 7, salvaged.stdout
        run(job, tmp_path / "two.salvaged", *reuse)
        requested = Counter(line.question for line in simulator.ledger())
    assert len(requested) == 150
    rows = rows_of(tmp_path / "two.salvaged")
    assert [row["id"] for row in rows] == numbers
    assert len({row["id"]: row["content"] for row in rows}) == len({(row["id"], row["content"]) for row in rows}) == 150
    assert sum(not row["reused"] for row in rows) == 110
    assert before <= requested.keys()
    verified = batchrun("verify", tmp_path / "two.salvaged")
    assert verified.exit_code == 0, verified.stdout


@pytest.mark.heavy
def test_check_and_estimate_say_what_is_new(tmp_path: Path) -> None:
    with running_simulator() as simulator:
        job = job_of(tmp_path, simulator, records(range(40)))
        run(job, tmp_path / "one")
        write(tmp_path / "in.jsonl", records([*range(100), *range(100)]))
        line = "to send: 60 of 200 rows; not sent: 40 reused, 100 equal to an earlier row"
        more = (*LONG, "--reuse", tmp_path / "one")
        assert line in batchrun("check", job, *more).stdout
        estimated = batchrun("estimate", job, *more).stdout
        assert line in estimated
        assert "to send      60 rows" in estimated
        run(job, tmp_path / "two", "--reuse", tmp_path / "one", "--set", "budget.max_requests=20", exit_code=4)
        rest = batchrun("estimate", job, "-o", tmp_path / "two", *more)
        assert "to send      40 rows" in rest.stdout, rest.stdout
        assert len(simulator.ledger()) == 60


# ── how much may change ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.heavy
def test_accepting_input_refuses_a_changed_prompt(tmp_path: Path) -> None:
    with running_simulator() as simulator:
        job = job_of(tmp_path, simulator, records(range(100)))
        run(job, tmp_path / "out")
        write(tmp_path / "in.jsonl", records(range(100), frozenset(range(8))))
        prompt = ("--set", 'request.prompt="Name: {{ text }}"')
        refused = run(job, tmp_path / "out", "--accept-changes=input", *prompt, exit_code=2)
        assert "--accept-changes=input accepts changed rows and not a changed job (request.prompt)" in refused.stderr
        for bound in ("7", '"7.5%"'):
            refused = run(
                job, tmp_path / "out", "--accept-changes=input", "--set", f"input.max_changed={bound}", exit_code=2
            )
            assert f"8 rows of 100 changed, and input.max_changed = {bound.strip(chr(34))} allows" in refused.stderr
        assert len(simulator.ledger()) == 100
        run(job, tmp_path / "out", "--accept-changes=input", "--set", 'input.max_changed="8%"')
        assert len(simulator.ledger()) == 108
        write(tmp_path / "in.jsonl", records(range(40), frozenset(range(8))))
        gone = run(job, tmp_path / "out", "--accept-changes", "--set", "input.max_changed=59", exit_code=2)
        assert "60 rows of 100 changed" in gone.stderr
    require_sums(tmp_path / "out")


@pytest.mark.parametrize("bound", ['"5"', '"120%"', '"x%"', "-1"])
def test_a_malformed_bound_is_refused(tmp_path: Path, bound: str) -> None:
    job = write_job(tmp_path / "job.toml", "http://127.0.0.1:9/v1", write(tmp_path / "in.jsonl", records(range(2))))
    refused = batchrun("check", job, "--set", f"input.max_changed={bound}")
    assert refused.exit_code == 2
    assert "input.max_changed" in refused.stderr
