"""What one row costs in each stage, in microseconds of CPU: where the time of `throughput.py` goes.

    python benchmarks/stages.py                  # about a minute

Each stage is called alone on the rows of one window, best of several rounds: the parts of batchrun that a row passes,
without the event loop, the kernel and the waiting between them. A whole run's row costs more than the sum: sockets, the
file system's share of a commit, threads that hand the interpreter's lock over. 1 KB prompts, 0.4 KB answers.
"""

import asyncio
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path

from batchrun import policy, prices, row_status
from batchrun.job.job import Job
from batchrun.job.load import from_tables
from batchrun.job.settings import Finish, Limits, Price, Retry
from batchrun.limits.admission import Demand, Outcome
from batchrun.limits.circuit import Circuit
from batchrun.limits.gate import Gate
from batchrun.limits.in_flight import InFlight
from batchrun.limits.rates import RateLimits
from batchrun.limits.shared_admission import SharedAdmission
from batchrun.records import Attempt, CompletionRecord, Row, Status, Usage, Verdict
from batchrun.request.builder import RequestBuilder
from batchrun.response import answer as answers
from batchrun.source import START, find_files, open_source
from batchrun.startup.input_check import survey
from batchrun.store import db_tables
from batchrun.store.booking import fold
from batchrun.store.checkpoint import Checkpoint
from batchrun.store.in_flight import InFlightFile
from batchrun.store.stored_window import BATCH_ROWS, StoredWindow, typed, write
from batchrun.store.totals import Totals
from batchrun.tables import files
from batchrun.tables.rows import joined, output_schema, own_table

ROWS = 8 * BATCH_ROWS
ROUNDS = 5
ANSWER = json.dumps(
    {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1_760_000_000,
        "model": "m",
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": "Fine. " * 30}, "finish_reason": "stop"},
        ],
        "usage": {"prompt_tokens": 1000, "completion_tokens": 100, "total_tokens": 1100},
    }
).encode()
PRICE = prices.stated("m", Price(input=Decimal("0.25"), output=Decimal(2)), "2026-11-28")


def best_us(work: Callable[[], object], rows: int) -> float:
    """Microseconds of CPU a row, the least of the rounds."""

    def once() -> float:
        started = time.process_time()
        work()
        return (time.process_time() - started) / rows * 1e6

    return min(once() for _ in range(ROUNDS))


def completion(row: int) -> CompletionRecord:
    """A settled row."""
    usage, cost = Usage(1000, 100, 1100), 450_000_000
    return CompletionRecord(
        row=row, key=b"k" * 16, status=Status.OK, attempts=1, http_status=200, error=None, request_id=f"run-{row}-1",
        finished_at=1.7e9, latency_s=0.1, time_to_first_token_s=None, model="m", answered_model="m", usage=usage,
        cost_pico_usd=cost, last_cost_pico_usd=cost, maybe_billed=False, possibly_billed_pico_usd=cost, raw=ANSWER,
        invocation=1,
    )  # fmt: skip


def the_input(folder: Path) -> tuple[Job, Iterator[tuple[str, float]]]:
    """The job, and what reading, checking and storing its input costs."""
    source_file = folder / "in.jsonl"
    with source_file.open("w") as file:
        for row in range(ROWS):
            file.write(json.dumps({"id": row, "text": f"review {row} " + "word " * 190, "stars": row % 5}) + "\n")
    tables_of_job = {
        "endpoint": {"url": "simulator"},
        "input": {"path": str(source_file)},
        "request": {"model": "m", "system": "You label.", "prompt": "Label this review: {{ text }}", "max_tokens": 64},
    }
    job = from_tables(tables_of_job)
    source = open_source(find_files(str(source_file)), job.input.max_line_bytes)

    def costs() -> Iterator[tuple[str, float]]:
        yield "read: lines to records", best_us(lambda: sum(1 for _ in source.records()), ROWS)
        yield "check: the whole pass, reading included", best_us(lambda: survey(source, job, folder), ROWS)
        whole = list(source.windows(START, ROWS, 2**40, frozenset()))
        yield "window: the chunk's input stored", best_us(lambda: write(folder / "window", whole[0].table), ROWS)
        window = StoredWindow(folder / "window", write(folder / "window", whole[0].table), 0)
        yield "window: rows decoded for dispatch", best_us(lambda: list(window.rows()), ROWS)
        rows: list[Row] = next(window.rows())
        builder = RequestBuilder(job, "columns")
        yield "request: body, key and sizes", best_us(lambda: [builder.build(row) for row in rows], BATCH_ROWS)

    return job, costs()


async def at_the_gate() -> float:
    """Admitted, settled, heard, observed and released, with nothing to wait for."""
    loop = asyncio.get_running_loop()
    state = Circuit(
        in_flight=InFlight(64, 64),
        max_outage_s=60.0,
        resumed=True,
        uniform=lambda: 0.5,
        on_change=lambda before, after: None,
    )
    gate = Gate(state, SharedAdmission(loop, state), RateLimits(Limits(), loop.time()))
    started, rows = time.process_time(), 20_000
    for row in range(rows):
        slot = await gate.admit(Demand(1100, 10**12, 2000, 100))
        gate.settle(slot, 1100, 100)
        gate.read_headers(slot, {})
        gate.observe(slot, Outcome(row, Verdict.OK))
        gate.release(slot, 0, 1100)
    return (time.process_time() - started) / rows * 1e6


def the_answer() -> Iterator[tuple[str, float]]:
    """What an answer costs from its bytes to its price."""
    attempt = Attempt(1.7e9, 0.1, 200, {}, ANSWER)
    read = answers.parse(ANSWER)
    retry, finish, usage = Retry(), Finish(), Usage(1000, 100, 1100)
    many = range(BATCH_ROWS)
    builder_expected = RequestBuilder(
        from_tables({"endpoint": {"url": "simulator"}, "request": {"model": "m", "prompt": "x"}}), "columns"
    )
    expected = builder_expected.build(Row(0, {})).expected

    def judge() -> None:
        for _ in many:
            policy.judge(attempt, read, retry)
            row_status.settlement(read, expected, finish, 200)

    yield "answer: read, typed", best_us(lambda: [answers.parse(ANSWER) for _ in many], BATCH_ROWS)
    yield (
        "answer: read, carefully (others)",
        best_us(lambda: [answers.parse_carefully(ANSWER) for _ in many], BATCH_ROWS),
    )
    yield "policy: judged and settled", best_us(judge, BATCH_ROWS)
    yield "price: cost", best_us(lambda: [prices.cost(usage, PRICE) for _ in many], BATCH_ROWS)


def durable(folder: Path) -> Iterator[tuple[str, float]]:
    """What durability costs in this process, in commits of 32 rows."""
    settled = [completion(row) for row in range(BATCH_ROWS)]
    records = [db_tables.completion_record(each, 1) for each in settled]
    slots = InFlightFile(folder / "inflight.bin", 64)

    def take_and_clear() -> None:
        for row in range(BATCH_ROWS):
            slots.occupy(row % 64, row, 1, b"k" * 16, 10**10, 2000)
            slots.clear(row % 64)

    def commits() -> None:
        path = folder / "checkpoint.db"
        for left in folder.glob("checkpoint.db*"):
            left.unlink()
        checkpoint = Checkpoint(path, free_reserve=lambda: False)
        for start in range(0, BATCH_ROWS, 32):
            for each in settled[start : start + 32]:
                checkpoint.put(each)
            checkpoint.flushed()
        checkpoint.close()

    yield "slot: written and cleared", best_us(take_and_clear, BATCH_ROWS)
    slots.close()
    yield (
        "commit: one blob a row, encoded",
        best_us(lambda: [db_tables.completion_record(each, 1) for each in settled], BATCH_ROWS),
    )
    yield (
        "commit: totals",
        best_us(lambda: [fold(Totals(), settled[at : at + 32], 1) for at in range(0, BATCH_ROWS, 32)], BATCH_ROWS),
    )
    yield "commit: all of it, SQLite and the kernel included", best_us(commits, BATCH_ROWS)
    yield "seal: blobs decoded", best_us(lambda: [db_tables.completion(record) for record in records], BATCH_ROWS)


def sealed(job: Job, folder: Path) -> Iterator[tuple[str, float]]:
    """What the result costs."""
    source = open_source(find_files(str(folder / "in.jsonl")), job.input.max_line_bytes)
    types = survey(source, job, folder).types
    assert types is not None
    (window,) = source.windows(START, BATCH_ROWS, 2**40, frozenset(range(BATCH_ROWS, ROWS)))
    batch = window.table.combine_chunks().to_batches()[0]
    settled = [completion(row) for row in range(BATCH_ROWS)]
    schema = output_schema(types.schema(), job.output)
    table, own = typed([batch], types), own_table(settled, keep_raw=False)
    whole = joined(table, own, schema)
    part = folder / "part.parquet"
    yield "seal: input as typed columns", best_us(lambda: typed([batch], types), BATCH_ROWS)
    yield "seal: our columns, answers read again", best_us(lambda: own_table(settled, keep_raw=False), BATCH_ROWS)
    yield "seal: the part written", best_us(lambda: files.write_part(part, schema, [whole] * 8, job.output, ROWS), ROWS)
    yield "result: a part read for it", best_us(lambda: list(files.batches_of(part)), ROWS)


def main() -> None:
    print("| stage | µs of CPU a row |\n| --- | --- |")
    with tempfile.TemporaryDirectory(prefix="batchrun-bench-", dir=".") as made:
        folder = Path(made).resolve()
        job, costs = the_input(folder)
        gate_us = min(asyncio.run(at_the_gate()) for _ in range(ROUNDS))
        at_gate = ("gate: in and out, nothing to wait for", gate_us)
        for stage, cost_us in (*costs, at_gate, *the_answer(), *durable(folder), *sealed(job, folder)):
            print(f"| {stage} | {cost_us:.1f} |", flush=True)


if __name__ == "__main__":
    main()
