"""Starts a simulator process for a job with `url = "simulator"`, when its first request is to be sent."""

import contextlib
import functools
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import TYPE_CHECKING

import msgspec

from batchrun.credentials import Credentials
from batchrun.errors import JobError
from batchrun.job.job import Job
from batchrun.job.settings import Endpoint

if TYPE_CHECKING:
    from batchrun.dispatch.endpoints import OpenTransports
    from batchrun.simulator import SimulatorConfig
    from batchrun.transport.transport import Opened, Wanted

KEY = "simulated-key"  # the simulator accepts any bearer, and treats this one as a secret

START_S = 20.0  # a process that did not start has ended by then; starting takes a second


@contextlib.contextmanager
def opened(job: Job, open_transports: "OpenTransports | None") -> "Iterator[OpenTransports | None]":
    """Yields what opens transports to the job's simulator, which starts at the first call: a start that sends nothing
    needs none. For any other job it is `open_transports`. None: this process sends.
    """
    if not job.simulated:
        yield open_transports
        return
    with contextlib.ExitStack() as running:
        endpoint = functools.cache(lambda: running.enter_context(started(job)))

        @contextlib.asynccontextmanager
        async def to_simulator(wanted: "Wanted") -> "AsyncIterator[Sequence[Opened]]":
            from batchrun.transport.transport import opened_here  # loads aiohttp

            async with (open_transports or opened_here)(wanted._replace(endpoints=(endpoint(),))) as transports:
                yield transports

        yield to_simulator


@contextlib.contextmanager
def started(job: Job) -> Iterator[Endpoint]:
    """Yields the job's endpoint with the URL of a simulator of its own, which ends with the block.

    Raises:
        JobError: the simulator did not start; the message includes its output.
    """
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
        yield msgspec.structs.replace(job.endpoint, url=line.removeprefix("listening on ").strip())
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
