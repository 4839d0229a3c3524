"""batchrun in miniature: the path of every row, through the same parts that a run uses.

    python docs/miniature.py                      # the sample input, against a simulator that fails now and then
    python docs/miniature.py INPUT [URL [OUT]]    # OUT is a new directory; the column `text` is the prompt

    source ─→ request ─→ limits ─→ transport ─→ policy ─→ store ─→ part

The numbers are those of docs/design.md, "The life of a row". Each part's own module has the details. A run adds what is
around the path: chunks, resume, the slots of requests in flight, prices, signals, progress and reports.
tests/acceptance/test_docs.py runs this file.
"""

import asyncio
import contextlib
import random
import sys
import tempfile
from pathlib import Path

from batchrun import simulated
from batchrun.job.job import Job
from batchrun.job.settings import Endpoint, Limits, RequestTemplate, Simulator
from batchrun.limits.admission import Demand, Outcome
from batchrun.limits.circuit import Circuit
from batchrun.limits.gate import Gate, GateClosed
from batchrun.limits.in_flight import InFlight
from batchrun.limits.rates import RateLimits
from batchrun.limits.shared_admission import SharedAdmission
from batchrun.policy import judge
from batchrun.records import Answer, Attempt, CompletionRecord, Request, Row, RowError, Status, Verdict
from batchrun.request.builder import RequestBuilder
from batchrun.response.answer import parse
from batchrun.row_status import settlement
from batchrun.source import find_files, open_source
from batchrun.store.checkpoint import Checkpoint
from batchrun.tables.files import write_part
from batchrun.tables.rows import OWN_COLUMNS, own_table
from batchrun.transport import transport

MAX_ATTEMPTS = 6
RETRIED = {Verdict.FREE, Verdict.MAYBE, Verdict.SLOW}  # may succeed when the request is sent again


def say(row: int, what: str) -> None:
    """The first row's way, for the reader of this page."""
    if row == 0:
        print(f"row 0: {what}")


async def send_all(job: Job, endpoint: Endpoint, rows: list[Row], checkpoint: Checkpoint) -> None:
    """Every row is settled in the checkpoint. A fixed number of workers pulls rows: there is no task per row."""
    in_flight, log = InFlight(job.limits.max_in_flight), lambda before, after: print(f"gate: {after}")
    circuit = Circuit(in_flight=in_flight, max_outage_s=60, resumed=False, uniform=random.random, on_change=log)
    loop = asyncio.get_running_loop()
    gate = Gate(circuit, SharedAdmission(loop, circuit), RateLimits(job.limits, loop.time()))
    builder = RequestBuilder(job, "columns")
    waiting = iter(rows)
    retries: list[tuple[Row, int]] = []  # rows to send again, with their attempts so far; they go before new rows

    async def work() -> None:
        while (turn := retries.pop() if retries else next(((row, 0) for row in waiting), None)) is not None:  # 3. taken
            row, attempts = turn
            request = builder.build(row)
            say(row.row, f"a body of {len(request.body)} bytes, key {request.key.hex()}")
            slot = await gate.admit(Demand(tokens=request.max_prompt_tokens))  # 4. admitted: rate, tokens and a slot
            say(row.row, f"admitted to slot {slot}, {gate.in_flight} in flight")
            attempt = await wire.send(request.body, f"miniature-{row.row}-{attempts + 1}")  # 6. sent
            answer = parse(attempt.body)
            judgement = judge(attempt, answer, job.retry)  # 7. judged
            say(row.row, f"HTTP {attempt.http_status} after {attempt.latency_s:.2f} s: verdict {judgement.verdict}")
            gate.settle(slot, None if answer.usage is None else answer.usage.total_tokens)
            gate.observe(  # 8. observed: the gate learns from every outcome
                slot, Outcome(row.row, judgement.verdict, judgement.error, judgement.retry_after_s)
            )
            if judgement.verdict in RETRIED and attempts + 1 < MAX_ATTEMPTS:  # 9. ended: retried, or settled
                retries.append((row, attempts + 1))
            else:
                good = judgement.verdict is Verdict.OK
                status = settlement(answer, request.expected, job.finish).status if good else Status.ERROR
                checkpoint.put(completion(request, attempt, answer, status, judgement.error, attempts + 1))
                say(row.row, f"{status}: {answer.content}")
            gate.release(slot, None)  # 10. a run waits for the commit first, so that a crash loses what is in flight

    key = simulated.credentials()
    async with transport.opened(transport.choose(endpoint), endpoint.full_url, endpoint, key) as wire:
        sweep = asyncio.create_task(keep_deadlines(wire))
        await asyncio.gather(*(work() for _ in range(job.limits.max_in_flight)))
        sweep.cancel()


async def keep_deadlines(wire: transport.Transport) -> None:
    """One sweep a second replaces a timer for each request."""
    while True:
        await asyncio.sleep(1)
        wire.expire()


def completion(
    request: Request, attempt: Attempt, answer: Answer, status: Status, error: RowError | None, attempts: int
) -> CompletionRecord:
    """The row's final record: the raw answer, and what is not in it."""
    return CompletionRecord(
        row=request.row,
        key=request.key,
        status=status,
        attempts=attempts,
        http_status=attempt.http_status,
        error=error,
        request_id=attempt.request_id,
        finished_at=attempt.started_at + attempt.latency_s,
        latency_s=attempt.latency_s,
        time_to_first_token_s=attempt.time_to_first_token_s,
        model=request.model,
        answered_model=answer.model,
        usage=answer.usage,
        cost_pico_usd=None,
        last_cost_pico_usd=None,
        maybe_billed=False,
        possibly_billed_pico_usd=None,
        raw=attempt.body,
    )


def run(source: str = "sample_inputs/changes.jsonl", url: str = "simulator", out: str | None = None) -> None:
    """`OUT/part.parquet` holds the answers to all rows of `source`, in input order."""
    job = Job(
        endpoint=Endpoint(url=url),
        request=RequestTemplate(model="vtrix-gpt-5.3-codex", prompt="{{ text }}", max_tokens=200),
        limits=Limits(requests_per_minute=6000, max_in_flight=8),
        simulator=Simulator(latency_s=0.05, faults="500=0.1,429=0.02", seed=5),
    )
    records = open_source(find_files(source)).records()  # 1. checked: a run also builds every request here
    rows = [Row(number, record.columns) for number, record in enumerate(records) if record.problem is None]
    place = Path(out or Path(tempfile.mkdtemp()) / "miniature")
    place.mkdir()
    with (
        simulated.started(job) if job.simulated else contextlib.nullcontext(job.endpoint) as endpoint,
        contextlib.closing(Checkpoint(place / "checkpoint.db", free_reserve=lambda: False)) as checkpoint,
    ):
        try:
            asyncio.run(send_all(job, endpoint, rows, checkpoint))
        except GateClosed as closed:  # an outage without end, a wrong key
            sys.exit(str(closed))
        table = own_table(checkpoint.completions(0, len(rows)), keep_raw=False)  # 11. sealed: all rows are one chunk
        write_part(place / "part.parquet", OWN_COLUMNS, table.to_batches(), job.output, len(rows))
    attempts = sum(table.column("attempts").to_pylist())
    print(f"{len(rows)} rows took {attempts} requests: {place / 'part.parquet'}")


if __name__ == "__main__":
    run(*sys.argv[1:])
