"""The lines a run prints before its first request. PURE."""

from pathlib import Path

from batchrun.job.job import Job
from batchrun.price_list import lookup
from batchrun.records import Notice
from batchrun.report.cost_lines import about_cost
from batchrun.report.wording import plural
from batchrun.row_status import failing
from batchrun.startup import search_fees
from batchrun.startup.resume import Plan
from batchrun.store.totals import Totals


def start_lines(job: Job, plan: Plan, where: Path, totals: Totals, lost: int, *, retrying: bool) -> list[str]:
    """`lost`: how many requests were in flight when the last process died."""
    known, lines = plan.manifest, list[str]()
    if plan.resumed:
        done, cost = totals.settled(), totals.cost_usd()
        failed = sum(totals.standing.get(status, 0) for status in failing(job.finish))
        spent_usd = f", ${cost:,.6f} spent" if cost else ""
        line = f"resuming {where}: {done:,} of {plural(plan.rows, 'row')} done{spent_usd}"
        lines.append(Notice(line, "resuming", directory=where, rows=plan.rows, done=done, cost_usd=cost))
        if not retrying:  # a retry prints a line of its own
            pending = plan.rows - done
            stay = "stays" if failed == 1 else "stay"
            left = f"; {plural(failed, 'row')} {stay} failed without --retry-failed" if failed else ""
            line = f"{plural(pending, 'row')} to send{about_cost(pending, totals.mean_cost_usd())}{left}"
            lines.append(Notice(line, "to send", pending=pending, failed=failed))
    else:
        aside = f", {len(known.rejected):,} set aside" if known.rejected else ""
        files = plural(len(plan.source.files), "file")
        line = f"input: {plural(known.rows, 'row')} in {files}{aside}, read as {known.dialect}"
        counts = {"rows": known.rows, "files": len(plan.source.files), "rejected": len(known.rejected)}
        lines.append(Notice(line, "input", dialect=known.dialect, **counts))
    if plan.rows < known.rows:
        line = f"only the first {plural(plan.rows, 'row')}; run without --limit to send the rest"
        lines.append(Notice(line, "limit", rows=plan.rows, of=known.rows))
    if lost:
        were, they = ("was", "it is") if lost == 1 else ("were", "they are")
        line = f"{plural(lost, 'request')} {were} in flight when the last process died; {they} sent again"
        lines.append(Notice(line, "lost", requests=lost))
    if not known.rows and known.share is not None:
        lines.append("this shard has no rows: the result will be empty")
    elif not known.rows:
        lines.append("there is nothing to send: the result will be empty, as input.min_rows = 0 allows")
    unknown = [model for model, table in plan.prices.items() if table is None]
    lines += [
        Notice(
            f"the price of {model} is unknown ({lookup.unknown_because(model, job.endpoint.url)}), "
            f'cost_usd will be null where the server states none; give it in [pricing."{model}"]',
            "unknown price",
            model=model,
        )
        for model in unknown
    ]
    if (fees := search_fees.warning(job, plan.prices)) is not None:
        lines.append(fees)
    return lines
