"""What the rows that settle one after another show: a run in which nearly all is refused for its content stops."""

from collections.abc import Iterable

import pytest

from batchrun.dispatch.anomalies import Anomalies
from batchrun.errors import ExitCode
from batchrun.policy import CONTENT_POLICY
from batchrun.records import RowError, Status

REFUSED = RowError(CONTENT_POLICY, 503, None, "Content Policy Violation")
"o: answered; r: refused for its content; f: filtered by a finish_reason; e: failed otherwise"
SETTLED: dict[str, tuple[Status, RowError | None]] = {
    "o": (Status.OK, None),
    "r": (Status.FILTERED, REFUSED),
    "f": (Status.FILTERED, None),
    "e": (Status.ERROR, RowError("bad_request", 400, None, "no")),
}


def stops(anomalies: Anomalies, rows: Iterable[str]) -> list[int]:
    """After how many rows the run would have stopped."""
    return [number for number, row in enumerate(rows, 1) if anomalies.settled(*SETTLED[row]) is not None]


CASES: dict[str, tuple[dict[str, bool], str, list[int]]] = {
    # how the start began, the rows, after which of them it stops
    "in the midst": ({}, "o" * 150 + "r" * 100, [188]),
    "from the third row on": ({}, "oo" + "r" * 60, [40]),
    "after a few": ({}, "o" * 10 + "r" * 60, [48]),
    "with some answers between": ({}, "o" * 60 + "rrrrrrrrrrrrrrrrrrro" * 5, [99]),
    "an eighth of the file": ({}, "ooooooor" * 60, []),
    "half of the file": ({}, "or" * 200, []),
    "37 in a row": ({}, ("o" * 20 + "r" * 37) * 5, []),
    "a finish_reason in the midst": ({}, "o" * 60 + "f" * 100, []),
    "a finish_reason from the start": ({}, "f" * 100, [40]),
    "failures": ({}, "o" * 60 + "e" * 100, []),
    "all of the file, once": ({}, "r" * 500, [40]),
    "nearly all of the file, once": ({}, ("o" + "r" * 30) * 40, [40]),
    "a resume where all is so": ({"resumed": True}, "r" * 500, []),
    "a resume where it is over and begins again": ({"resumed": True}, "r" * 50 + "o" * 60 + "r" * 60, [148]),
    "filtered rows that are sent again": ({"resumed": True, "retried": True}, "o" * 60 + "r" * 100, []),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_mostly_blocked_recent_rows_stop_the_run(
    case: tuple[dict[str, bool], str, list[int]],
) -> None:
    start, rows, expected = case
    anomalies = Anomalies(
        quota_patience_s=60.0, resumed=start.get("resumed", False), retried=start.get("retried", False)
    )
    assert stops(anomalies, rows) == expected


def test_the_stop_explains_how_to_continue() -> None:
    anomalies = Anomalies(quota_patience_s=60.0, resumed=False)
    found = [stop for row in "o" * 40 + "r" * 40 if (stop := anomalies.settled(*SETTLED[row])) is not None]
    assert [stop.exit_code for stop in found] == [ExitCode.USAGE]
    assert "38 of the last 40 rows were filtered (HTTP 503: Content Policy Violation)" in found[0].why
    assert "--retry-failed --status filtered" in found[0].why
