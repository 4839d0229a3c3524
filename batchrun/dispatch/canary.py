"""The canary: a few rows from all over the input are sent first, and decide whether the rest is sent.

The manifest keeps the chosen rows and their outcome. So a start that was killed resumes with the same rows, and a start
after a failed canary stops again without sending anything.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from decimal import Decimal

import msgspec

from batchrun.dispatch.runlog import RunLog
from batchrun.dispatch.store import CanaryRows, Store
from batchrun.errors import ExitCode, quoted
from batchrun.job.job import Job
from batchrun.job.settings import Canary
from batchrun.limits.admission import Stop
from batchrun.money import to_usd
from batchrun.records import CompletionRecord, Notice, Status
from batchrun.report.wording import are, plural
from batchrun.store.checkpoint import Checkpoint

ENTRY = "canary"
"""The manifest's entry that holds a `CanaryRecord`."""


class CanaryOutcome(msgspec.Struct, frozen=True):
    """The outcome of the canary's rows. `cost_usd` includes what may have been billed, but no `unpriced` rows."""

    by_status: dict[str, int]
    cost_usd: Decimal
    unpriced: int
    example_error: str | None

    @property
    def rows(self) -> int:
        return sum(self.by_status.values())

    @property
    def cost_per_row_usd(self) -> Decimal | None:
        """None if a row's cost is unknown."""
        return self.cost_usd / self.rows if self.rows and not self.unpriced else None


class CanaryRecord(msgspec.Struct, frozen=True):
    """`question` identifies the job's requests and the layout of the input; `seen` is None until all rows have ended.

    `accepted`: send the rest whatever the outcome.
    """

    question: str
    rows: tuple[int, ...]
    seen: CanaryOutcome | None = None
    accepted: bool = False


def run(
    job: Job,
    store: Store,
    send: Callable[[CanaryRows], Stop | None],
    note: Callable[[str], None],
    log: RunLog,
    *,
    accept: bool,
) -> Stop | None:
    """The rows of the canary are settled; why the rest is not sent, None if it may be.

    Choosing rows opens every chunk of `store`, so `send` needs another that begins at the first.
    """
    question = f"{job.fingerprint()}.{store.plan.manifest.layout}"
    entry = store.checkpoint.manifest_entries().get(ENTRY)
    record = None if entry is None else msgspec.json.decode(entry, type=CanaryRecord)
    wanted = job.canary.rows or 0
    if record is None or record.question != question:
        if store.pending <= wanted:
            return None
        rows = (row for chunk in iter(store.chunks.open_next, None) for row in chunk.to_send())
        chance = random.Random(store.plan.manifest.run_id)
        record = CanaryRecord(question, tuple(spread(rows, wanted, chance)))
        _keep(store.checkpoint, record)
        if record.rows:
            line = f"canary: {plural(len(record.rows), 'row')}, spread over the input, are sent first"
            note(Notice(line, "canary", rows=len(record.rows)))
    if not record.rows:  # every row takes an answer without a request
        return None
    if (seen := record.seen) is None:
        if (stop := send(CanaryRows(record.rows))) is not None:
            return stop
        seen = _look(store.checkpoint, record.rows)
        log.write("canary", **msgspec.to_builtins(seen))
    record = msgspec.structs.replace(record, seen=seen, accepted=record.accepted or accept)
    _keep(store.checkpoint, record)
    problems = list(judge(seen, job.canary))
    if problems and not record.accepted:
        example = f"; such as {seen.example_error}" if seen.example_error is not None else ""
        return Stop(
            ExitCode.STOPPED,
            f"the canary failed: {'; '.join(problems)}, of {_in_words(seen)}{example}. Look at its answers with "
            f"batchrun export {quoted(store.directory.path)}; then change the job, or send the rest with "
            "--accept-canary",
        )
    if store.pending:
        line = f"canary {'accepted' if problems else 'passed'}: {_in_words(seen)}; the rest is sent"
        note(Notice(line, "canary", passed=not problems, **msgspec.structs.asdict(seen)))
    return None


def _keep(checkpoint: Checkpoint, record: CanaryRecord) -> None:
    checkpoint.write_manifest({ENTRY: msgspec.json.encode(record).decode()})


def _look(checkpoint: Checkpoint, rows: Sequence[int]) -> CanaryOutcome:
    """The outcome of these rows, from their records in open chunks."""
    found = [each for row in rows for each in checkpoint.completions(row, row + 1)]
    by_status = {str(status): n for status in Status if (n := sum(each.status is status for each in found))}
    known = [cost for each in found if (cost := _cost(each)) is not None]
    errors = (each.error.text for each in found if each.status is not Status.OK and each.error is not None)
    return CanaryOutcome(by_status, to_usd(sum(known)), len(found) - len(known), next(errors, None))


def judge(seen: CanaryOutcome, wanted: Canary) -> Iterator[str]:
    """Each bound that the outcome breaks, in words; none if the rest may be sent."""
    if not seen.rows:
        return
    ok, invalid = (seen.by_status.get(status, 0) / seen.rows for status in (Status.OK, Status.INVALID))
    if ok < wanted.min_ok_share:
        yield f"{ok:.0%} are ok (canary.min_ok_share = {wanted.min_ok_share:g})"
    if wanted.max_invalid_share is not None and invalid > wanted.max_invalid_share:
        yield f"{invalid:.0%} are invalid (canary.max_invalid_share = {wanted.max_invalid_share:g})"
    if (most := wanted.max_cost_per_row_usd) is None:
        return
    if (cost := seen.cost_per_row_usd) is None:
        yield f"{plural(seen.unpriced, 'row')} {are(seen.unpriced)} of unknown cost (canary.max_cost_per_row_usd)"
    elif cost > most:
        yield f"a row costs ${cost:.6f} (canary.max_cost_per_row_usd = {most:f})"


def _in_words(seen: CanaryOutcome) -> str:
    statuses = ", ".join(f"{n:,} {status}" for status, n in seen.by_status.items())
    cost = f", ${cost_usd:.6f} a row" if (cost_usd := seen.cost_per_row_usd) is not None else ""
    return f"{plural(seen.rows, 'row')}: {statuses}{cost}"


def spread(rows: Iterable[int], count: int, chance: random.Random) -> list[int]:
    """`count` of the rows, or all if they are fewer: a random one from each of about that many equal stretches.

    One pass in bounded memory: when there are twice as many stretches as needed, pairs of them are joined.
    """
    kept: list[int] = []
    stride, place, pick, picked = 1, 0, 0, -1
    for row in rows:
        if place == pick:
            picked = row
        place += 1
        if place < stride:
            continue
        kept.append(picked)
        if len(kept) == 2 * count:
            kept = [chance.choice(pair) for pair in zip(kept[::2], kept[1::2], strict=True)]
            stride *= 2
        place, pick = 0, chance.randrange(stride)
    if place > pick:  # of the last stretch, which is cut short
        kept.append(picked)
    if len(kept) <= count:
        return kept
    return [kept[int((number + 0.5) * len(kept) / count)] for number in range(count)]


def _cost(completion: CompletionRecord) -> int | None:
    """10⁻¹² USD: the cost of all the row's attempts, including what may have been billed."""
    doubt = completion.possibly_billed_pico_usd if completion.maybe_billed else 0
    return None if completion.cost_pico_usd is None or doubt is None else completion.cost_pico_usd + doubt
