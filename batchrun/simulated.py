"""A job that asks for `url = "simulator"` gets a simulator process of its own, for as long as the run works."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import msgspec

from batchrun.credentials import Credentials
from batchrun.errors import JobError
from batchrun.job.job import SIMULATOR, Job

if TYPE_CHECKING:
    from batchrun.simulator import SimulatorConfig

KEY = "simulated-key"  # any bearer will do; the simulator takes it for a key that may stay in no file

START_S = 20.0


@contextlib.contextmanager
def endpoint_of(job: Job) -> Iterator[Job]:
    """The job with a real URL in the simulator's place; any other job as it is.

    Raises:
        JobError: the simulator did not start; its own words are in the message.
    """
    if not job.simulated:
        yield job
        return
    process = subprocess.Popen(  # noqa: S603  (our own interpreter and module)
        [sys.executable, "-m", "batchrun.simulator", msgspec.json.encode(config_of(job)).decode()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # a Ctrl-C is for the run, which drains; the simulator must still answer then
        encoding="utf-8",
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},  # ours may name another, for what people read
    )
    try:
        yield _pointed_at(job, _url_of(process))
    finally:
        process.terminate()
        process.communicate()


def credentials() -> Credentials:
    """What the simulator accepts."""
    return Credentials({"Authorization": f"Bearer {KEY}"}, frozenset({KEY}))


def config_of(job: Job) -> "SimulatorConfig":
    """What the job's simulator is to be like.

    Raises:
        JobError: simulator.faults names no faults.
    """
    from batchrun.simulator import SimulatorConfig, parse_faults  # aiohttp's server, 90 ms: only for a job that asks

    settings = job.simulator
    try:
        faults = parse_faults(settings.faults)
    except JobError as error:
        raise JobError(f"simulator.{error}") from error
    return SimulatorConfig(
        latency_s=settings.latency_s,
        requests_per_minute=None if settings.requests_per_minute is None else int(settings.requests_per_minute),
        tokens_per_minute=None if settings.tokens_per_minute is None else int(settings.tokens_per_minute),
        faults=faults,
        flex_latency_s=settings.flex_latency_s,
        cache_life_s=settings.cache_life_s,
        seed=settings.seed,
        draw_by_request_id=True,  # each start has a process of its own, and a row's attempts go on from one to the next
        ledger=settings.ledger,
        parent_pid=os.getpid(),
    )


def _url_of(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line.startswith("listening on "):
        _, problem = process.communicate(timeout=START_S)
        raise JobError(f"the simulator did not start: {problem.strip() or 'no reason was given'}")
    return line.removeprefix("listening on ").strip()


def _pointed_at(job: Job, url: str) -> Job:
    """The job with the simulator's address; its name stays, since answers are the simulator's wherever it listens."""
    endpoint = msgspec.structs.replace(job.endpoint, url=url, name=SIMULATOR)
    return msgspec.structs.replace(job, endpoint=endpoint)
