"""What is told of a run before its first request. PURE"""

from decimal import Decimal
from pathlib import Path

from batchrun.job.job import Job
from batchrun.policy import failing
from batchrun.report.wording import are, plural
from batchrun.startup.resume import Plan
from batchrun.store.totals import Totals


def told_at_start(job: Job, plan: Plan, where: Path, spent: Totals, lost: int, *, retrying: bool) -> list[str]:
    """What a person should know before the first request: `lost` of the run's requests died with the last process."""
    known, lines = plan.facts, []
    if plan.resumed:
        done, cost = spent.settled(), spent.cost_usd()
        failed = sum(spent.standing.get(status, 0) for status in failing(job.finish))
        spent_usd = f", ${cost:,.6f} spent" if cost else ""
        lines.append(f"resuming {where}: {done:,} of {plural(plan.rows, 'row')} done{spent_usd}")
        if not retrying:  # a retry says itself what it asks again
            lines.append(_rest_in_words(plan.rows - done, spent.mean_cost_usd(), failed))
    else:
        aside = f", {len(known.rejected):,} set aside" if known.rejected else ""
        files = plural(len(plan.source.files), "file")
        lines.append(f"input: {plural(known.rows, 'row')} in {files}{aside}, read as {known.dialect}")
    if plan.rows < known.rows:
        lines.append(f"only {plural(plan.rows, 'row')} of them; without --limit the run goes on")
    if lost:
        lines.append(f"{plural(lost, 'request')} in flight when the last process died: asked again")
    if not known.rows:
        lines.append("there is nothing to send: the result will be empty, as input.min_rows = 0 allows")
    unknown = [model for model, table in plan.prices.items() if table is None]
    if unknown:
        from batchrun import price_list  # here, because it takes 170 ms
    lines += [
        f"the price of {model} is unknown ({price_list.unknown_because(model, job.endpoint.url)}), "
        f'cost_usd will be null where the server states none; give it in [pricing."{model}"]'
        for model in unknown
    ]
    return lines


def _rest_in_words(pending: int, mean_cost_usd: Decimal | None, failed: int) -> str:
    """What this start will ask and about what that costs, by the rows so far; and what it leaves as it is."""
    left = f"; without --retry-failed {plural(failed, 'failed row')} will stay so" if failed else ""
    return f"{plural(pending, 'row')} {are(pending)} to be asked{about(pending, mean_cost_usd)}{left}"


def about(rows: int, mean_cost_usd: Decimal | None) -> str:
    """What so many rows will cost; nothing where no price is known."""
    return "" if mean_cost_usd is None else f", about ${mean_cost_usd * rows:,.4f}"
