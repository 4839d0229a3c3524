"""The bill over the runs at some paths, as `batchrun report` makes it."""

from collections.abc import Sequence
from pathlib import Path

from batchrun.report import runs
from batchrun.report.bill import Bill, Query, bill_of
from batchrun.report.keys import DaySpan


def bill_over(paths: Sequence[Path], by: tuple[str, ...], span: DaySpan = DaySpan()) -> Bill:  # noqa: B008  (frozen)
    return bill_of(runs.find_runs(paths), Query(by, span))
