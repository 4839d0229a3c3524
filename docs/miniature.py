"""batchrun in miniature: the path of every row, through the same parts that a run uses.

    python docs/miniature.py INPUT URL OUT        # OUT is a new directory; URL such as http://127.0.0.1:8000/v1

    source ─→ request ─→ limits ─→ transport ─→ policy ─→ store ─→ part

Each part's own module has the details. A run adds what is around the path: chunks, resume, the slots of requests in
flight, prices, signals, progress and reports. tests/acceptance/test_docs.py runs this file against the simulator.
"""

import asyncio
import contextlib
import random
import sys
from pathlib import Path

from batchrun.credentials import Credentials
from batchrun.job.job import Job
from batchrun.job.settings import Endpoint, Limits, RequestTemplate
from batchrun.limits.admission import Demand, Outcome
from batchrun.limits.circuit import Circuit
from batchrun.limits.gate import Gate
from batchrun.limits.in_flight import InFlight
from batchrun.policy import judge
from batchrun.records import Answer, Attempt, Completion, Request, Row, RowError, Status, Verdict
from batchrun.request.builder import RequestBuilder
from batchrun.response.answer import read
from batchrun.row_status import settlement
from batchrun.source import find_files, open_source
from batchrun.store.checkpoint import Checkpoint
from batchrun.tables.files import write_part
from batchrun.tables.rows import OWN_COLUMNS, own_table
from batchrun.transport import transport

MAX_ATTEMPTS = 6
AGAIN = {Verdict.FREE, Verdict.MAYBE, Verdict.SLOW}  # what may succeed when it is sent once more


async def send_all(job: Job, rows: list[Row], checkpoint: Checkpoint) -> None:
    """Every row is settled in the checkpoint. A fixed number of workers pulls rows: there is no task per row."""
    in_flight, log = InFlight(job.limits.max_in_flight), lambda before, after: print(f"gate: {after}")
    circuit = Circuit(in_flight=in_flight, max_outage_s=60, resumed=False, uniform=random.random, on_change=log)
    gate = Gate(circuit, asyncio.get_running_loop(), job.limits)
    builder = RequestBuilder(job, "columns")
    waiting = iter(rows)
    again: list[tuple[Row, int]] = []  # rows to retry, with their attempts so far; they go before new rows

    async def work() -> None:
        while (turn := again.pop() if again else next(((row, 0) for row in waiting), None)) is not None:
            row, attempts = turn
            request = builder.build(row)
            slot = await gate.admit(Demand(tokens=request.max_prompt_tokens))  # waits for rate, budget and a free slot
            attempt = await wire.send(request.body, f"miniature-{row.row}-{attempts + 1}")
            answer = read(attempt.body)
            judgement = judge(attempt, answer, job.retry)
            gate.settle(slot, None if answer.usage is None else answer.usage.total_tokens)
            gate.observe(slot, Outcome(row.row, judgement.verdict, judgement.error, judgement.retry_after_s))
            if judgement.verdict in AGAIN and attempts + 1 < MAX_ATTEMPTS:
                again.append((row, attempts + 1))
            else:
                good = judgement.verdict is Verdict.OK
                status = settlement(answer, request.expected, job.finish).status if good else Status.ERROR
                checkpoint.put(completion(request, attempt, answer, status, judgement.error, attempts + 1))
            gate.release(slot, None)  # a run waits for the commit first, so that a crash loses what is in flight only

    key = Credentials({"Authorization": "Bearer any"}, frozenset())  # the simulator accepts any key
    async with transport.opened(transport.choose(job.endpoint), job.url, job.endpoint, key) as wire:
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
) -> Completion:
    """The row's final record: the raw answer, and what is not in it."""
    return Completion(
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
        cost_usd=None,
        last_cost_usd=None,
        maybe_billed=False,
        possibly_billed_usd=None,
        raw=attempt.body,
    )


def run(source: str, url: str, out: Path) -> None:
    """`out/part.parquet` holds the answers to all rows of `source`, in input order."""
    job = Job(
        endpoint=Endpoint(url=url, auth="none"),
        request=RequestTemplate(model="vtrix-gpt-5.3-codex", prompt="{{ text }}", max_tokens=200),
        limits=Limits(requests_per_minute=6000, max_in_flight=8),
    )
    records = open_source(find_files(source)).records()
    rows = [Row(number, record.columns) for number, record in enumerate(records) if record.problem is None]
    out.mkdir()
    with contextlib.closing(Checkpoint(out / "checkpoint.db", free_reserve=lambda: False)) as checkpoint:
        asyncio.run(send_all(job, rows, checkpoint))
        table = own_table(checkpoint.completions(0, len(rows)), keep_raw=False)
        write_part(out / "part.parquet", OWN_COLUMNS, table.to_batches(), job.output, len(rows))
    print(f"{len(rows)} rows in {out / 'part.parquet'}")


if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
