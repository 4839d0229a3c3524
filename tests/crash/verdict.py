"""What a run that was killed and resumed must look like, by the simulator's ledger. PURE: evidence → violations."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import pyarrow as pa

from batchrun.durable import TEMP_SUFFIX
from batchrun.money import to_usd
from batchrun.prices import PriceTable, Tier, cost
from batchrun.records import Usage
from batchrun.report.bill import Bill
from batchrun.simulator import LedgerLine
from batchrun.store.in_flight import NamedRequest

SAME = ["id", "text", "score", "row", "request_key", "status", "content", "finish_reason"]
"""The columns in which a disturbed run equals an undisturbed one: the rest names attempts, times and ids."""

LEFT_BEHIND = frozenset({"checkpoint.db", "run.log", "summary.json", "usage.parquet"})
"""The files of a finished run beside its result."""

LIST_PRICE = PriceTable(
    "vtrix-gpt-5.3-codex", (Tier(0, Decimal("1.75"), Decimal("0.175"), Decimal("14")),), "test", "2026-01-01"
)

Exchange = tuple[int, int]
"""A row and the number of its attempt, as the request's own id names them."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is left of a run after its last process. `in_flight` is what inflight.bin held after each kill.

    `asked_again` are rows that failed for good and were sent once more because the user wanted it.
    """

    rows: int
    max_in_flight: int
    ledger: Sequence[LedgerLine]
    summary: dict[str, Any]
    output: pa.Table
    usage: pa.Table
    reported: Bill
    undisturbed: pa.Table
    in_flight: Sequence[Sequence[NamedRequest]]
    files: frozenset[str]
    asked_again: int = 0


def violations(evidence: Evidence) -> Iterator[str]:
    """Every broken promise, in words."""
    yield from _answers(evidence)
    yield from _exchanges(evidence)
    yield from _attempts(evidence)
    yield from _money(evidence)
    yield from _files(evidence)


def _answers(evidence: Evidence) -> Iterator[str]:
    """Each row is there once, with the answer that an undisturbed run brings, and from an exchange that was served."""
    if evidence.output.select(SAME) != evidence.undisturbed.select(SAME):
        yield f"the output is not that of an undisturbed run ({evidence.output.num_rows} rows)"
    served = {line.request_id: _exchange(line) for line in evidence.ledger}
    own = zip(*(evidence.output.column(name).to_pylist() for name in ("request_id", "row", "attempts")), strict=True)
    for request_id, row, attempts in own:
        if served.get(request_id) != (row, attempts):
            yield f"row {row}: its answer {request_id} is not the exchange ({row}, {attempts}) of the ledger"


def _exchanges(evidence: Evidence) -> Iterator[str]:
    """Only rows that were in flight at a kill, and counted retries, are sent again."""
    times = Counter(_exchange(line) for line in evidence.ledger)
    for exchange, number in times.items():
        if number > 1:
            yield f"{exchange} was sent {number} times under one number: the first was forgotten"
    flying = {(entry.row, entry.n) for entries in evidence.in_flight for entry in entries}
    doubts = evidence.summary["possibly_billed"]
    aborted = sum(entry["cause"] == "aborted" for entry in doubts)  # a process that could, named them itself
    retries = sum(line["attempts"] for line in evidence.summary["totals"] if line["status"] == "discarded")
    served, lost = len(evidence.ledger), len(flying) + aborted
    rows = evidence.rows + evidence.asked_again
    if served > rows + lost + retries:
        yield f"{served} served: {rows} rows, {lost} lost in flight, {retries} retries"
    for entries in evidence.in_flight:
        if len(entries) > evidence.max_in_flight:
            yield f"{len(entries)} in flight at one kill, {evidence.max_in_flight} are allowed"
    crashed = [entry for entry in doubts if entry["cause"] == "crash"]
    for invocation, number in Counter(entry["invocation"] for entry in crashed).items():
        if number > evidence.max_in_flight:
            yield f"{number} lost by process {invocation}, {evidence.max_in_flight} are allowed"
    if invented := {(entry["row"], entry["n"]) for entry in crashed} - flying:
        yield f"named as lost, but not in flight at any kill: {sorted(invented)}"


def _attempts(evidence: Evidence) -> Iterator[str]:
    """Every count of attempts is the rows' own: lost ones have a line of their own."""
    by_rows = sum(row["attempts"] for row in evidence.output.select(["attempts"]).to_pylist())
    counts = {
        "summary.json": sum(line["attempts"] for line in evidence.summary["totals"]),
        "usage.parquet": sum(row["attempts"] for row in evidence.usage.to_pylist()),
        "the report": evidence.reported.total.attempts,
    }
    for where, attempts in counts.items():
        if attempts != by_rows:
            yield f"attempts: the rows say {by_rows}, {where} says {attempts}"
    lost = sum(line["attempts"] for line in evidence.summary["totals"] if line["status"] == "lost")
    named = sum(entry["cause"] in ("crash", "aborted") for entry in evidence.summary["possibly_billed"])
    if not lost == named == evidence.reported.lost:
        yield f"{named} attempts are named as lost, {lost} are counted, the report says {evidence.reported.lost}"


def _money(evidence: Evidence) -> Iterator[str]:
    """The certain cost is the ledger's for the answers in the output; all else that it billed is named, and covered."""
    final = {(row["row"], row["attempts"]) for row in evidence.output.select(["row", "attempts"]).to_pylist()}
    named = Counter((entry["row"], entry["n"]) for entry in evidence.summary["possibly_billed"])
    billed = [line for line in evidence.ledger if line.billed]
    for exchange in {_exchange(line) for line in billed if not _is_answer(line, final)} - named.keys():
        yield f"{exchange} was billed, is no answer in the output, and is not named as possibly billed"
    for exchange, times in named.items():
        if times > 1:
            yield f"{exchange} is named as possibly billed {times} times"
    if len(billed) > (most := sum(_is_answer(line, final) for line in billed) + named.total()):
        yield f"{len(billed)} exchanges were billed, {most} are confirmed or named"
    certain, possible = (Decimal(evidence.summary[name]) for name in ("cost_usd", "possibly_billed_usd"))
    answers = sum((_cost(line) for line in billed if _is_answer(line, final)), Decimal(0))
    if certain != answers:
        yield f"cost_usd is {certain}, the ledger bills {answers} for the answers in the output"
    total = sum(map(_cost, billed), Decimal(0))
    if not certain <= total <= certain + possible:
        yield f"the ledger bills {total}, which is not within {certain} and {certain + possible}"


def _files(evidence: Evidence) -> Iterator[str]:
    """Nothing is left in the run directory but the result and what a finished run keeps."""
    results = {name for name in evidence.files if name == "completions.parquet" or name.startswith("completions/")}
    if orphans := evidence.files - LEFT_BEHIND - results:
        yield f"left behind: {sorted(orphans)}"
    if missing := LEFT_BEHIND - evidence.files:
        yield f"missing: {sorted(missing)}"


def wrong_order(trace: Sequence[str]) -> Iterator[str]:
    """Where a thread's own record of calls breaks: fsync of the content, rename, fsync of the directory, record."""
    synced: set[tuple[str, str]] = set()
    names: set[tuple[str, str]] = set()
    for line in trace:
        thread, what, *paths = line.split("\t")
        match what, paths:
            case "fsync", [path]:
                synced.add((thread, path))
                names = {(mine, name) for mine, name in names if mine != thread or parent(name) != path}
            case "rename", [source, target]:
                if source.endswith(TEMP_SUFFIX) and (thread, source) not in synced:
                    yield f"{target} got its name before its content was on disk"
                synced.discard((thread, source))
                names.add((thread, target))
            case "record", [point]:
                for name in sorted(name for mine, name in names if mine == thread):
                    yield f"{point}: the name {name} was not on disk yet"


def parent(name: str) -> str:
    """The directory of a file."""
    return name.rpartition("/")[0]


def _exchange(line: LedgerLine) -> Exchange:
    _, row, n = str(line.client_request_id).rsplit("-", 2)
    return int(row), int(n)


def _is_answer(line: LedgerLine, final: set[Exchange]) -> bool:
    return line.fault is None and _exchange(line) in final


def _cost(line: LedgerLine) -> Decimal:
    total = line.prompt_tokens + line.completion_tokens
    usage = Usage(line.prompt_tokens, line.completion_tokens, total, line.cached_tokens, line.reasoning_tokens)
    return to_usd(cost(usage, LIST_PRICE) or 0)
