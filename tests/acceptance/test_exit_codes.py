"""Every way out: its exit code, and the summary.json that it leaves."""

import os
import resource
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest

from batchrun.errors import ExitCode
from batchrun.run_summary import Summary
from batchrun.simulator import Fault, SimulatorConfig, parse_faults, read_ledger
from tests.cli_process import Ended, batchrun, finish, kill_when, start, wait_until, write_job, write_rows
from tests.simulator_process import RunningSimulator, running_simulator

ROWS = 60
KILLED = -signal.SIGKILL


class Place(NamedTuple):
    """A folder with an input of 60 rows; what is started for it ends with it."""

    folder: Path
    until_the_end: ExitStack

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def source(self) -> Path:
        return self.folder / "in.jsonl"

    @property
    def job(self) -> Path:
        return self.folder / "job.toml"

    def simulator(self, *faults: Fault, latency_s: float = 0.0, more: str = "") -> RunningSimulator:
        """An endpoint of this kind, and a job that asks it."""
        config = SimulatorConfig(
            faults=faults, latency_s=latency_s, latency_sigma=0, ledger=str(self.folder / "ledger")
        )
        simulator = self.until_the_end.enter_context(running_simulator(config))
        write_job(self.job, simulator.url, self.source, more)
        return simulator

    def served(self) -> int:
        """How many requests the endpoints have served."""
        ledger = self.folder / "ledger"
        return len(read_ledger(ledger)) if ledger.exists() else 0

    def run(self, *more: str) -> Ended:
        return batchrun("run", self.job, "-o", self.out, *more)

    def begin(self, *more: str, latency_s: float = 0.3) -> "subprocess.Popen[str]":
        """A run whose first requests are in flight; it would take eight times the latency."""
        self.simulator(latency_s=latency_s, more="[limits]\nmax_in_flight = 8\n")
        process = self.until_the_end.enter_context(start("run", self.job, "-o", self.out, *more))
        self.until_the_end.callback(process.kill)
        flying = self.out / "inflight.bin"
        wait_until(lambda: flying.exists() and any(flying.read_bytes()), process)
        return process


@contextmanager
def place_in(folder: Path) -> Iterator[Place]:
    with ExitStack() as stack:
        yield Place(folder, stack)


# ── the ways ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def all_rows_are_answered(place: Place) -> Ended:
    place.simulator()
    return place.run()


def a_complete_run_is_started_again(place: Place) -> Ended:
    all_rows_are_answered(place)
    return place.run()


def there_is_nothing_to_send(place: Place) -> Ended:
    place.source.write_text("\n")
    place.simulator()
    return place.run("--set", "input.min_rows=0")


def the_input_is_empty(place: Place) -> Ended:
    place.source.write_text("\n")
    place.simulator()
    return place.run()


def more_rows_fail_than_allowed(place: Place) -> Ended:
    place.simulator(Fault(kind="status", status=400, match="item 7 "))
    return place.run()


def content_is_blocked(place: Place) -> Ended:
    place.simulator(*parse_faults("content_policy=0.2"))
    return place.run()


def batchrun_has_a_bug(place: Place) -> Ended:
    broken = place.folder / "broken" / "aiohttp"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise RuntimeError('an unforeseen case')")
    place.simulator()
    return batchrun("run", place.job, "-o", place.out, before=["env", f"PYTHONPATH={broken.parent}"])


def the_job_is_wrong(place: Place) -> Ended:
    place.simulator(more="[limits]\nmax_in_flihgt = 4\n")
    return place.run()


def a_flag_is_wrong(place: Place) -> Ended:
    place.simulator()
    return place.run("--limit", "none")


def a_record_is_wrong(place: Place) -> Ended:
    place.source.write_text('{"text": "a"}\n{"other": 1}\n')
    place.simulator()
    return place.run()


def the_key_is_missing(place: Place) -> Ended:
    place.simulator()
    return batchrun("run", place.job, "-o", place.out, key="")


def the_route_is_wrong(place: Place) -> Ended:
    place.simulator(Fault(kind="status", status=404, message="no such route"))
    return place.run()


def the_first_rows_all_fail_alike(place: Place) -> Ended:
    place.simulator(Fault(kind="status", status=400, message="no such parameter"))
    return place.run()


def the_job_has_changed(place: Place) -> Ended:
    a_signal(signal.SIGTERM)(place)
    return place.run("--set", "request.temperature=0.5")


def a_file_is_in_the_way(place: Place) -> Ended:
    place.simulator()
    ended = batchrun("run", place.job, "-o", place.source)
    assert place.served() == 0
    return ended


def the_directory_is_read_only(place: Place) -> Ended:
    place.simulator()
    disk = place.folder / "disk"
    disk.mkdir(mode=0o500)
    if not os.geteuid():  # whom only a read-only disk keeps from writing
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", str(disk)], capture_output=True).returncode:
            pytest.skip("root may write everywhere, and mounting is not allowed here")
        place.until_the_end.callback(subprocess.run, ["umount", str(disk)], check=True)
    ended = batchrun("run", place.job, "-o", disk / "out")
    assert place.served() == 0
    return ended


def the_budget_is_used_up(place: Place) -> Ended:
    place.simulator()
    return place.run("--max-cost", "0.01")


def the_requests_are_used_up(place: Place) -> Ended:
    place.simulator()
    return place.run("--set", "budget.max_requests=20")


def the_tokens_are_used_up(place: Place) -> Ended:
    place.simulator()
    return place.run("--set", "budget.max_tokens=3000")


def the_deadline_has_come(place: Place) -> Ended:
    place.simulator(latency_s=0.1, more="[limits]\nrequests_per_minute = 60\n")
    return place.run("--deadline", "2s")


def the_deadline_is_over(place: Place) -> Ended:
    place.simulator()
    return place.run("--deadline", "2020-01-01T06:00")


def the_key_is_revoked(place: Place) -> Ended:
    place.simulator(Fault(kind="status", status=401, message="Incorrect API key provided", from_request=20))
    return place.run()


def no_server_listens(place: Place) -> Ended:
    write_job(place.job, "http://127.0.0.1:9/v1", place.source, "[retry]\nmax_outage_s = 1.5\n")
    return place.run()


def the_disk_is_full(place: Place) -> Ended:
    place.simulator()

    def small_files() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (90_000, 90_000))

    return batchrun("run", place.job, "-o", place.out, preexec_fn=small_files)


def another_process_works_here(place: Place) -> Ended:
    place.begin(latency_s=30)
    return place.run()


def the_checkpoint_is_damaged(place: Place) -> Ended:
    a_signal(signal.SIGTERM)(place)
    database = place.out / "checkpoint.db"
    content = bytearray(database.read_bytes())
    content[content.index(b"chat.completion")] ^= 0x10
    database.write_bytes(content)
    served = place.served()
    ended = place.run()
    assert place.served() == served
    return ended


def the_checkpoint_is_lost(place: Place) -> Ended:
    a_signal(signal.SIGTERM)(place)
    (place.out / "checkpoint.db").unlink()
    return place.run()


def a_signal(number: signal.Signals, *again: signal.Signals) -> Callable[[Place], Ended]:
    def way(place: Place) -> Ended:
        process = place.begin(latency_s=30 if again else 0.3)
        process.send_signal(number)
        for following in again:
            kill_when(process, lambda: '"signal"' in (place.out / "run.log").read_text(), following)
        return finish(process)

    return way


def the_grace_is_over(place: Place) -> Ended:
    process = place.begin("--grace", "0.3", latency_s=30)
    process.send_signal(signal.SIGTERM)
    return finish(process)


def stdout_is_closed(place: Place) -> Ended:
    place.simulator()
    process = start("run", place.job, "-o", place.out)
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    return finish(process)


def stdout_is_closed_of_a_run_that_is_stopped(place: Place) -> Ended:
    process = place.begin()
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    process.send_signal(signal.SIGTERM)
    return finish(process)


class Way(NamedTuple):
    """How a process ends, and what summary.json says then: `state` None, nothing; `reported`, its exit code where
    that is not the process's; `reason`, words of its reason, or of the error line where it has none of its own.
    """

    act: Callable[[Place], Ended]
    exit_code: int
    state: str | None
    reason: str | None = None
    reported: int | None = None


WAYS = {
    "all rows are answered": Way(all_rows_are_answered, 0, "complete"),
    "a complete run is started again": Way(a_complete_run_is_started_again, 0, "complete"),
    "there is nothing to send": Way(there_is_nothing_to_send, 0, "complete"),
    "content is blocked": Way(content_is_blocked, 0, "complete"),
    "batchrun has a bug": Way(batchrun_has_a_bug, 1, "failed", "RuntimeError: an unforeseen case"),
    "the job is wrong": Way(the_job_is_wrong, 2, None, "limits.max_in_flihgt"),
    "a flag is wrong": Way(a_flag_is_wrong, 2, None, "--limit"),
    "the key is missing": Way(the_key_is_missing, 2, None, "BATCHRUN_TEST_KEY"),
    "a record is wrong": Way(a_record_is_wrong, 2, "failed", "1 of 2 input records make no valid request"),
    "the input is empty": Way(the_input_is_empty, 2, "failed", "the input has no rows"),
    "the route is wrong": Way(the_route_is_wrong, 2, "stopped", "no such route"),
    "the first rows all fail alike": Way(the_first_rows_all_fail_alike, 2, "stopped", "all failed alike"),
    "the job has changed": Way(the_job_has_changed, 2, "failed", "request.temperature"),
    "more rows fail than allowed": Way(more_rows_fail_than_allowed, 3, "complete"),
    "a file is in the way": Way(a_file_is_in_the_way, 2, None, "a file is in the way"),
    "the directory is read-only": Way(the_directory_is_read_only, 2, None, "can't be written"),
    "the budget is used up": Way(the_budget_is_used_up, 4, "stopped", "budget"),
    "the requests are used up": Way(the_requests_are_used_up, 4, "stopped", "raise budget.max_requests"),
    "the tokens are used up": Way(the_tokens_are_used_up, 4, "stopped", "raise budget.max_tokens"),
    "the deadline has come": Way(the_deadline_has_come, 4, "stopped", "the deadline"),
    "the deadline is over": Way(the_deadline_is_over, 2, None, "is in the past"),
    "the key is revoked": Way(the_key_is_revoked, 5, "stopped", "Incorrect API key provided"),
    "no server listens": Way(no_server_listens, 5, "stopped", "never reached"),
    "the disk is full": Way(the_disk_is_full, 5, "failed", "run the same command again"),
    "another process works here": Way(another_process_works_here, 6, "running", "another run works here"),
    "the checkpoint is damaged": Way(the_checkpoint_is_damaged, 7, "failed", "checkpoint.db"),
    "the checkpoint is lost": Way(the_checkpoint_is_lost, 7, "failed", "checkpoint.db is missing"),
    "SIGHUP": Way(a_signal(signal.SIGHUP), 129, "stopped", "SIGHUP: drained"),
    "SIGINT": Way(a_signal(signal.SIGINT), 130, "stopped", "SIGINT: drained"),
    "SIGTERM": Way(a_signal(signal.SIGTERM), 143, "stopped", "SIGTERM: drained"),
    "SIGINT twice": Way(a_signal(signal.SIGINT, signal.SIGINT), 130, "stopped", "SIGINT"),
    "the grace is over": Way(the_grace_is_over, 143, "stopped", "SIGTERM"),
    "stdout is closed": Way(stdout_is_closed, 141, "complete", reported=0),
    "stdout is closed of a run that is stopped": Way(
        stdout_is_closed_of_a_run_that_is_stopped, 141, "stopped", "SIGTERM: drained", reported=143
    ),
    "SIGKILL": Way(a_signal(signal.SIGKILL), KILLED, "running"),
}


def test_every_exit_code_has_a_way() -> None:
    assert {way.exit_code for way in WAYS.values()} == {*ExitCode} - {ExitCode.DRIFT} | {KILLED}


@pytest.mark.heavy
@pytest.mark.sampled(12)
@pytest.mark.parametrize("name", WAYS)
def test_every_exit_code_leaves_its_summary(name: str, tmp_path: Path) -> None:
    way = WAYS[name]
    write_rows(tmp_path / "in.jsonl", ROWS)
    with place_in(tmp_path) as place:
        ended = way.act(place)
        assert ended.exit_code == way.exit_code, ended
        assert "Traceback" not in ended.stderr
        path = place.out / "summary.json"
        assert path.exists() == (way.state is not None)
        summary = strict(path.read_bytes()) if path.exists() else None
    if way.reason is not None and (summary is None or summary.reason is None):
        assert way.reason in ended.stderr.splitlines()[-1]
    if summary is None:
        return
    running = way.state == "running"
    assert summary.state == way.state
    assert summary.exit_code == (None if running else way.exit_code if way.reported is None else way.reported)
    assert (summary.reason is None) == (running or summary.complete)
    assert (way.reason or "") in (summary.reason or way.reason or "")
    assert summary.reason is None or way.reported is not None or summary.reason in ended.stdout + ended.stderr
    holds_together(summary)


def strict(content: bytes) -> Summary:
    """The summary, which has all the documented fields, in their types, and no other."""
    summary = msgspec.json.decode(content, type=Summary)
    assert msgspec.json.decode(msgspec.json.encode(summary)) == msgspec.json.decode(content)
    return summary


def holds_together(summary: Summary) -> None:
    """What one field says, the others say too."""
    done = sum(summary.by_status.values())
    assert summary.complete == (summary.state == "complete") == ("completions" in summary.files)
    assert summary.pending == summary.rows - done >= 0
    assert summary.rows_in_output == (summary.rows if summary.complete else 0)
    assert summary.pending == 0 or not summary.complete
    assert all(Path(file).is_file() for file in summary.files.values())
    assert summary.cost_usd == sum(line.cost_usd for line in summary.totals)
    assert len(summary.possibly_billed) == summary.possibly_billed_count
    assert summary.created_at <= summary.updated_at >= summary.started_at
    assert all(
        moment.utcoffset() is not None for moment in (summary.created_at, summary.started_at, summary.updated_at)
    )
