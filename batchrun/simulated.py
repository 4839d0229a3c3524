"""Starts a simulator process for a job with `url = "simulator"`, for the time of the run."""

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

KEY = "simulated-key"  # the simulator accepts any bearer, and treats this one as a secret

START_S = 20.0  # a process that did not start has ended by then; starting takes a second


@contextlib.contextmanager
def endpoint_of(job: Job) -> Iterator[Job]:
    """Yields the job with the simulator's real URL; any other job unchanged.

    Raises:
        JobError: the simulator did not start; the message includes its output.
    """
    if not job.simulated:
        yield job
        return
    process = subprocess.Popen(  # noqa: S603  (our own interpreter and module)
        [sys.executable, "-m", "batchrun.simulator", msgspec.json.encode(config_of(job)).decode()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C must not stop it: the run drains, and still needs answers
        encoding="utf-8",
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},  # the user's may differ
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.startswith("listening on "):
            _, problem = process.communicate(timeout=START_S)
            raise JobError(f"the simulator did not start: {problem.strip() or 'no reason given'}")
        # the endpoint's name stays: it is the same endpoint on any port
        endpoint = msgspec.structs.replace(job.endpoint, url=line.removeprefix("listening on ").strip(), name=SIMULATOR)
        yield msgspec.structs.replace(job, endpoint=endpoint)
    finally:
        process.terminate()
        process.communicate()


def credentials() -> Credentials:
    """Credentials that the simulator accepts."""
    return Credentials({"Authorization": f"Bearer {KEY}"}, frozenset({KEY}))


def config_of(job: Job) -> "SimulatorConfig":
    """The configuration of the job's simulator.

    Raises:
        JobError: simulator.faults is invalid.
    """
    from batchrun.simulator import SimulatorConfig, parse_faults  # aiohttp's server, 90 ms: only if it is used

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
        draw_by_request_id=True,  # a row's attempts continue across starts, each with a new simulator
        ledger=settings.ledger,
        parent_pid=os.getpid(),
    )
