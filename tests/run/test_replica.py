"""A run whose machine is lost: with `output.keep_parts_remote` another one resumes it from the object store."""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from batchrun.errors import RunLockedError
from batchrun.simulator import SimulatorConfig
from batchrun.storage.folder import CONTROL
from tests.cli_process import batchrun as command
from tests.cli_process import finish, kill_when, start
from tests.run.test_publish import Machine
from tests.s3_server import BUCKET, S3Server, environ_for, environment, fails, proxy_before
from tests.simulator_process import RunningSimulator, running_simulator

pytestmark = pytest.mark.sampled(0)  # a server of its own: in `make test-rest`

ROWS, CHUNK = 60, 10
MORE = "[limits]\nmax_in_flight = 4\n"
OUTPUT = f"keep_parts_remote = true\nchunk_rows = {CHUNK}\n"


@pytest.fixture
def api() -> Iterator[RunningSimulator]:
    with running_simulator(SimulatorConfig(latency_s=0.05)) as simulator:
        yield simulator


def parts_there(s3: S3Server, place: str) -> int:
    return sum(name.endswith(".part") for name in s3.names(f"{BUCKET}/{place}"))


def settled(api: RunningSimulator) -> int:
    """How many requests were served, once those of a killed client have ended."""
    while (before := len(api.ledger())) >= 0:
        time.sleep(0.3)
        if len(api.ledger()) == before:
            break
    return before


def expire_claims(s3: S3Server, place: str) -> None:
    """What five minutes without a sign of life come to."""
    for name in s3.names(f"{BUCKET}/{place}/{CONTROL}/claims"):
        s3.filesystem.delete_file(f"{BUCKET}/{place}/{CONTROL}/claims/{name}")


SLOWLY = ("--set", "limits.max_in_flight=1")
"""A run whose parts are counted in the store is not over before it is killed, however long a listing takes."""


def test_yesterdays_run_is_found_in_the_store(s3: S3Server, api: RunningSimulator, tmp_path: Path) -> None:
    one = Machine(tmp_path / "one", api, "night/{job}/x-{date}/y", MORE, rows=ROWS, output=OUTPUT)
    process = start("run", one.job, "--state-dir", one.state, "--date", "2026-11-20", *SLOWLY)
    kill_when(process, lambda: parts_there(s3, "night") >= 2)
    finish(process)
    expire_claims(s3, "night/job/x-2026-11-20/y")
    two = Machine(tmp_path / "two", api, "night/{job}/x-{date}/y", MORE, rows=ROWS, output=OUTPUT)
    shown = command("run", two.job, "--state-dir", two.state)
    assert shown.exit_code == 0, shown.stderr
    assert "resuming the unfinished run of 2026-11-20" in shown.stderr
    assert "summary.json" in s3.names(f"{BUCKET}/night/job/x-2026-11-20/y")


@pytest.mark.parametrize("layout", ["file", "parts"])
def test_another_machine_resumes_a_lost_run(s3: S3Server, api: RunningSimulator, tmp_path: Path, layout: str) -> None:
    place = f"lost-{layout}"
    output = OUTPUT + f"layout = '{layout}'\n"
    one = Machine(tmp_path / "one", api, place, MORE, rows=ROWS, output=output)
    process = start("run", one.job, "--state-dir", one.state, *SLOWLY)
    kill_when(process, lambda: parts_there(s3, place) >= 3)
    finish(process)
    sent_before = settled(api)
    shutil.rmtree(one.state)

    two = Machine(tmp_path / "two", api, place, MORE, rows=ROWS, output=output)
    locked = command("run", two.job, "--state-dir", two.state)
    assert (locked.exit_code, "another run works there" in locked.stderr) == (6, True), locked.stderr
    assert len(api.ledger()) == sent_before
    expire_claims(s3, place)
    shown = command("run", two.job, "--state-dir", two.state)
    assert shown.exit_code == 0, shown.stderr
    assert "this machine has nothing of the run; " in shown.stderr
    assert "are sent again, and listed as possibly billed" in shown.stderr

    ledger = api.ledger()
    repeated = len(ledger) - ROWS
    assert 0 <= repeated <= ROWS - 3 * CHUNK  # the sealed parts are not sent again
    summary = two.run()
    assert summary.rows_in_output == sum(summary.by_status.values()) == ROWS
    assert summary.possibly_billed_count >= repeated
    assert sum(line.attempts for line in summary.totals) + summary.possibly_billed_count >= len(ledger)
    assert sum(line.rows for line in summary.totals) == ROWS
    names = s3.names(f"{BUCKET}/{place}")
    assert [name for name in names if name.startswith(CONTROL)] == [f"{CONTROL}/run.json"]
    assert len(ledger) == len(api.ledger())


def test_a_taken_over_run_is_not_continued(s3: S3Server, api: RunningSimulator, tmp_path: Path) -> None:
    """By the machine that comes back."""
    one = Machine(tmp_path / "one", api, "back", MORE, rows=ROWS, output=OUTPUT)
    process = start("run", one.job, "--state-dir", one.state, *SLOWLY)
    kill_when(process, lambda: parts_there(s3, "back") >= 2)
    finish(process)
    expire_claims(s3, "back")
    two = Machine(tmp_path / "two", api, "back", MORE, rows=ROWS, output=OUTPUT)
    second = start("run", two.job, "--state-dir", two.state, *SLOWLY)
    kill_when(second, lambda: parts_there(s3, "back") >= 4)
    finish(second)
    expire_claims(s3, "back")
    before = settled(api)
    with pytest.raises(RunLockedError, match="another machine has taken over this run"):
        one.run()
    assert len(api.ledger()) == before
    assert two.run().complete
    before = len(api.ledger())
    assert one.run().complete  # it finds the result that the other machine published
    assert len(api.ledger()) == before


def test_a_store_away_only_delays_the_run(s3: S3Server, api: RunningSimulator, tmp_path: Path) -> None:
    with (
        proxy_before(s3, fails(r"\.part", "503", times=4)) as proxy,
        environment(environ_for(proxy.url)),
    ):
        machine = Machine(tmp_path, api, "away", MORE, rows=ROWS, output=OUTPUT)
        began = time.monotonic()
        assert machine.run().complete
        assert time.monotonic() - began < 60
    assert len(api.ledger()) == ROWS
