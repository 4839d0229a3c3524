"""The ledger survives kills: what is in it is whole, and what was torn is left out."""

import json
import os
from pathlib import Path

import pytest

from batchrun.simulator import LedgerLine, read_ledger
from batchrun.simulator.ledger import RequestLedger


def _line(ordinal: int, *, status: int | None = 200, billed: bool = True) -> LedgerLine:
    return LedgerLine(
        ordinal=ordinal,
        arrived_s=1_000.25,
        time_s=1_000.5,
        request_id=f"req_{ordinal}",
        client_request_id="run-1-1",
        question="ab" * 16,
        status=status,
        fault=None,
        billed=billed,
        prompt_tokens=10 if billed else 0,
        cached_tokens=4 if billed else 0,
        completion_tokens=5 if billed else 0,
        reasoning_tokens=2 if billed else 0,
        connection=1,
        connection_request=ordinal,
    )


def _written(path: Path, *ordinals: int) -> None:
    ledger = RequestLedger(str(path))
    for ordinal in ordinals:
        ledger.write(_line(ordinal))
    ledger.close()


def test_what_was_written_is_read_back_in_order(tmp_path: Path) -> None:
    _written(tmp_path / "l", 1, 2, 3)
    assert read_ledger(tmp_path / "l") == [_line(1), _line(2), _line(3)]


def test_a_ledger_that_is_not_there_is_empty(tmp_path: Path) -> None:
    assert read_ledger(tmp_path / "none") == []


def test_a_torn_last_line_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "l"
    _written(path, 1, 2)
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for end in range(first, len(whole)):
        path.write_bytes(whole[:end])
        assert read_ledger(path) == [_line(1)]


def test_a_new_simulator_continues_a_torn_ledger(tmp_path: Path) -> None:
    path = tmp_path / "l"
    _written(path, 1, 2)
    os.truncate(path, path.stat().st_size - 7)
    _written(path, 3)
    assert read_ledger(path) == [_line(1), _line(3)]


def test_a_written_line_is_on_disk(tmp_path: Path) -> None:
    ledger = RequestLedger(str(tmp_path / "l"))
    for ordinal in range(1, 4):
        ledger.write(_line(ordinal))
        assert len(read_ledger(tmp_path / "l")) == ordinal
    ledger.close()


def test_the_ledgers_file_is_private(tmp_path: Path) -> None:
    _written(tmp_path / "l", 1)
    assert (tmp_path / "l").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("path", [None, "l"])
def test_totals_count_billed_and_refused(tmp_path: Path, path: str | None) -> None:
    ledger = RequestLedger(None if path is None else str(tmp_path / path))
    for line in (_line(1), _line(2), _line(3, status=429, billed=False), _line(4, status=None, billed=False)):
        ledger.write(line)
    assert json.loads(ledger.totals()) == {
        "exchanges": 4,
        "billed": 2,
        "prompt_tokens": 20,
        "cached_tokens": 8,
        "completion_tokens": 10,
        "reasoning_tokens": 4,
        "refused": {"429": 1, "unanswered": 1},
    }
    ledger.close()
