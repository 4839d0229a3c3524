"""Means over the rows of a job's newest earlier run, to estimate its next one."""

import re
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path

import msgspec
import pyarrow as pa

from batchrun import arrow_files
from batchrun import compute as pc
from batchrun.job.job import Job
from batchrun.limits import capacity
from batchrun.prices import PriceTable
from batchrun.report import summary as summaries
from batchrun.report.cost_lines import prices_in_words
from batchrun.run_summary import Summary, cached_share
from batchrun.store import result_files, run_path
from batchrun.store.rundir import RunDirectory


class Means(msgspec.Struct, frozen=True):
    """Of a row: tokens, the share of its prompt that was cached, USD by the prices of then (None: unknown; retries
    included), and seconds of its last attempt (None: unknown). `price` is the prices in words, without their date.
    """

    basis: str
    prompt_tokens: float
    completion_tokens: float
    cached_share: float
    cost_usd: Decimal | None = None
    latency_s: float | None = None
    price: str = ""

    def cost_by(self, tables: Mapping[str, PriceTable | None]) -> Decimal | None:
        """USD of a row, where the prices are still those of then."""
        return self.cost_usd if self.price == _undated("; ".join(prices_in_words(tables))) else None


def newest_means(job: Job, besides: Path | None = None) -> Means | None:
    """The means of the job's newest run in `output.path`, not counting `besides`; None where no run has answers."""
    for path in run_path.directories(job):
        if besides is not None and path.resolve() == besides.resolve():
            continue
        directory = RunDirectory(path)
        summary = summaries.read_or_none(directory)
        if summary is None or summary.job != job.name:
            continue
        if (means := means_of(summary, f"the newest run, {path}")) is not None:
            return msgspec.structs.replace(means, latency_s=_latency_s(directory, job.output.prefix))
    return None


def means_of(summary: Summary, whose: str) -> Means | None:
    """The means of a run's rows; None where no answer stated its usage."""
    size = capacity.size_of(summary.totals)
    if not size.answers:
        return None
    rows = sum(line.rows - line.reused for line in summary.totals if line.cost_usd)
    return Means(
        basis=f"{'the one answer' if size.answers == 1 else f'the mean of {size.answers:,} answers'} of {whose}",
        prompt_tokens=size.prompt_tokens,
        completion_tokens=size.completion_tokens,
        cached_share=cached_share(summary.totals) or 0.0,
        cost_usd=None if summary.unpriced or summary.without_usage or not rows else summary.cost_usd / rows,
        price=_undated(summary.price or ""),
    )


def _undated(price: str) -> str:
    return re.sub(r"\d{4}-\d{2}-\d{2}", "", price)


def _latency_s(directory: RunDirectory, prefix: str) -> float | None:
    """The mean latency of the result's rows; None where there is no result that can be read."""
    name = f"{prefix}latency_s"
    total, rows = 0.0, 0
    try:
        for part in result_files.of(directory.path):
            with arrow_files.parquet(part) as file:
                column = file.read(columns=[name]).column(name)
            total, rows = total + float(pc.sum(column).as_py() or 0.0), rows + len(column)
    except (OSError, KeyError, pa.ArrowException):
        return None
    return total / rows if rows else None
