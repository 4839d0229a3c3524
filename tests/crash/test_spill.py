"""Answers that a failed database can't take are kept beside it, and taken in by the next start."""

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from batchrun.errors import CheckpointError
from batchrun.records import CompletionRecord, Discarded, Ending
from batchrun.simulator import SimulatorConfig
from batchrun.store import spill
from batchrun.store.booking import fold
from batchrun.store.checkpoint import Checkpoint
from batchrun.store.totals import Totals
from tests import level
from tests.cli_process import batchrun, finish, read_summary, start, write_job, write_rows
from tests.crash.strace import Fault, prefix
from tests.endings import completion, discarded
from tests.random_endings import ENDINGS
from tests.simulator_process import running_simulator

SHARED = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=level.amount(6, 40)
)


def opened(path: Path) -> Checkpoint:
    return Checkpoint(path, free_reserve=lambda: False)


@SHARED
@given(ENDINGS)
def test_every_field_of_a_result_round_trips(tmp_path: Path, endings: list[Ending]) -> None:
    path = tmp_path / "spill.bin"
    path.unlink(missing_ok=True)
    spill.append(path, endings, 3)
    spill.append(path, endings[:1], 4)
    first, second = spill.read(path)
    assert first.invocation == 3
    assert list(first.completions) == [e for e in endings if isinstance(e, CompletionRecord)]
    assert list(first.discarded) == [e for e in endings if isinstance(e, Discarded)]
    assert (second.invocation, [*second.completions, *second.discarded]) == (4, endings[:1])
    assert path.stat().st_mode & 0o777 == 0o600


def test_only_a_cut_last_frame_is_tolerated(tmp_path: Path) -> None:
    """It was never durable; any other damage is reported."""
    path = tmp_path / "spill.bin"
    spill.append(path, [completion(1)], 1)
    whole = path.read_bytes()
    spill.append(path, [completion(2)], 1)
    both = path.read_bytes()
    for length in range(len(whole), len(both)):
        path.write_bytes(both[:length])
        assert [frame.completions[0].row for frame in spill.read(path)] == [1]
    for place in range(8, len(whole), 7):
        path.write_bytes(both[:place] + bytes([both[place] ^ 4]) + both[place + 1 :])
        with pytest.raises(CheckpointError, match=r"spill\.bin: damaged"):
            list(spill.read(path))


def test_the_next_start_imports_the_spill_once(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.db"
    endings: list[Ending] = [completion(0), discarded(1, 1), completion(2), discarded(3, 2)]
    checkpoint = opened(path)
    checkpoint.start_invocation(0.0, 1, "here", "0")
    checkpoint.put(endings[0])
    checkpoint.put(endings[1])
    assert checkpoint.flushed()
    checkpoint.close()
    spill.append(tmp_path / "spill.bin", endings, 1)  # the failed commit had arrived in part after all
    for _ in range(2):
        checkpoint = opened(path)
        assert checkpoint.totals.booked == fold(Totals(), endings, 1).booked
        assert [kept.row for kept in checkpoint.completions(0, 10)] == [0, 2]
        checkpoint.close()
        assert not (tmp_path / "spill.bin").exists()


@pytest.mark.heavy
def test_a_failing_database_keeps_requests_in_flight(tmp_path: Path) -> None:
    """Their answers are kept and nothing is sent twice."""
    source = write_rows(tmp_path / "in.jsonl", 200)
    config = SimulatorConfig(latency_s=0.3, latency_sigma=0.6, ledger=str(tmp_path / "ledger"))
    out = tmp_path / "out"
    with running_simulator(config) as simulator:
        job = write_job(tmp_path / "job.toml", simulator.url, source)
        fault = Fault("fsync,fdatasync", ("checkpoint.db-wal",), "EIO", "12+")
        ended = finish(start("run", job, "-o", out, before=prefix(fault, out)))
        assert ended.exit_code == 5, ended.stderr
        assert "checkpoint.db: the disk refused a write" in ended.stderr
        assert (out / "spill.bin").stat().st_size > 0
        summary = read_summary(out)
        assert summary["rows"] - summary["pending"] == len(simulator.ledger())
        assert batchrun("run", job, "-o", out).exit_code == 0
        served = Counter(line.question for line in simulator.ledger())
    assert set(served.values()) == {1}
    assert len(served) == 200
    assert not (out / "spill.bin").exists()
    assert read_summary(out)["possibly_billed_count"] == 0
