"""The connection of this process to a Ray cluster, and the transports that its actors carry."""

import contextlib
import logging
import math
import os
import signal
import socket
import warnings
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from batchrun import __version__, signals
from batchrun.errors import JobError
from batchrun.job.job import Job
from batchrun.job.settings import Endpoint
from batchrun.ray_engine.settings import LOCAL, address_of
from batchrun.records import Attempt
from batchrun.transport.transport import Choice, Opened, Wanted

OBJECT_STORE_BYTES = 128_000_000
"""Of a cluster of our own: only requests with a body above 64 KB (images) pass through it."""

CONNECT_S = 10.0  # a TCP connection within a cluster takes milliseconds

Note = Callable[[str], None]


@contextlib.contextmanager
def opened(
    job: Job, environ: Mapping[str, str], note: Note
) -> Iterator[Callable[[Wanted], AbstractAsyncContextManager[Sequence[Opened]]]]:
    """Yields what opens transports in Ray's actors. Ray is not touched before the first call.

    Raises:
        JobError: the address is not supported.
    """
    cluster = Cluster(job, address_of(job, environ), note)
    try:
        yield cluster.open_transports
    finally:
        cluster.disconnect()


class Cluster:
    """This process in a Ray cluster."""

    def __init__(self, job: Job, address: str, note: Note) -> None:
        self._job = job
        self._address = address
        self._note = note
        self._ours = False  # whether this object has connected the process, and so disconnects it
        self._connected = contextlib.ExitStack()

    @asynccontextmanager
    async def open_transports(self, wanted: Wanted) -> AsyncIterator[list[Opened]]:
        """Connects, starts actors, and opens a transport to each endpoint.

        Raises:
            JobError: there is no cluster at the address, or its actors can't work.
            RunStoppedError: the cluster has no room for an actor.
        """
        version = self._connect()
        import ray

        from batchrun.ray_engine.fleet import Fleet
        from batchrun.ray_engine.sender import Setup

        authorities = tuple(
            None if endpoint.ca_file is None else Path(endpoint.ca_file).read_text("ascii", "ignore")  # noqa: ASYNC240  (small, and nothing is sent yet)
            for endpoint in wanted.endpoints
        )
        is_local = self._address == LOCAL
        setup = Setup(__version__, tuple(wanted.endpoints), authorities, wanted.in_flight, wanted.tails, is_local)
        engine = self._job.engine

        def report(event: str, line: str | None, **fields: object) -> None:
            wanted.log(event, **fields)
            if line is not None:
                self._note(line)

        fleet = Fleet(engine, setup, wanted.credentials, self._require_reachable, report)
        try:
            first = await fleet.start()
            many = str(engine.actors) if engine.max_actors is None else f"{engine.actors} to {engine.max_actors}"
            address = "local" if is_local else ray.get_runtime_context().gcs_address
            where = "a local Ray" if is_local else f"the Ray cluster at {address}"
            self._note(f"sending from {many} {'actor' if many == '1' else 'actors'} of {where} ({version})")
            yield [
                Opened(
                    ActorTransport(fleet, place),
                    Choice("ray", f"{where} ({version}); an actor: {each.wire}, {each.why}"),
                )
                for place, each in enumerate(first.choices)
            ]
        finally:
            await fleet.close()

    def disconnect(self) -> None:
        """Leaves the cluster, and ends one that was started by `_connect`."""
        if self._ours:
            import ray

            ray.shutdown()
            self._ours = False
        self._connected.close()

    def _connect(self) -> str:
        """Connects this process, unless it is connected; returns Ray's version."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import ray

            if ray.is_initialized():  # by the canary before, or by the program that runs us
                return str(ray.__version__)
            self._connected.enter_context(_quiet())  # the import has set the level
            engine = self._job.engine
            options: dict[str, Any] = {"configure_logging": False, "log_to_driver": False}
            if self._address == LOCAL:
                actors = max(engine.actors, engine.max_actors or 0)
                options |= {
                    "num_cpus": max(1, math.ceil(actors * engine.cpus_per_actor)),
                    "object_store_memory": OBJECT_STORE_BYTES,
                    "include_dashboard": False,
                }
            before = signal.getsignal(signal.SIGTERM)
            with _environ_for_ray(self._job.endpoints):
                try:
                    host, _, port = self._address.rpartition(":")
                    if port.isdecimal():  # Ray itself tries for minutes, and writes to stderr meanwhile
                        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
                    ray.init(address=self._address, **options)
                except Exception as error:
                    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
                    why = (lines[0] if lines else type(error).__name__)[:300]
                    raise JobError(f"engine ray: can't connect to {self._address}: {why}") from error
                finally:
                    if signals.may_handle():  # Ray's own handler would end the run without a drain
                        signal.signal(signal.SIGTERM, before)
        self._ours = True
        return str(ray.__version__)

    def _require_reachable(self, ready: "Any") -> None:
        for endpoint in self._job.endpoints:
            host = urlsplit(endpoint.url).hostname or ""
            if ready.host != socket.gethostname() and _is_loopback(host):
                raise JobError(
                    f"endpoint.url {endpoint.url}: is this machine alone, and the Ray cluster has an actor on "
                    f"{ready.host}; name an address that all nodes reach"
                )


class ActorTransport:
    """A `Transport` to one endpoint."""

    def __init__(self, fleet: "Any", place: int) -> None:
        self._fleet = fleet
        self._place = place

    async def send(self, body: bytes, client_request_id: str) -> Attempt:
        attempt: Attempt = await self._fleet.send(self._place, body, client_request_id)
        return attempt

    def expire(self) -> int:
        """Actors end their own exchanges."""
        if self._place == 0:
            self._fleet.tend()
        return 0


@contextlib.contextmanager
def _environ_for_ray(endpoints: Sequence[Endpoint]) -> Iterator[None]:
    """The environment that a local Ray's processes get: without the job's secrets, which actors receive in a call."""
    names = {endpoint.api_key_env for endpoint in endpoints if endpoint.api_key_env is not None}
    names |= {
        value.removeprefix("env:") for each in endpoints for value in each.headers.values() if value.startswith("env:")
    }
    hidden = {name: os.environ.pop(name) for name in (*names, "PYTHONWARNINGS") if name in os.environ}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a local Ray sends no report
    try:
        yield
    finally:
        os.environ.update(hidden)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Ray logs its start to stderr, and prints the last words of dead processes to stdout; run.log says what matters.

    There is no setting for the latter (2.60), so its function is replaced, where it has that name.
    """
    from ray._private import worker

    log, name = logging.getLogger("ray"), "print_to_stdstream"
    level, printing = log.level, getattr(worker, name, None)
    log.setLevel(logging.CRITICAL + 1)
    setattr(worker, name, lambda data, ignore_prefix: None)
    try:
        yield
    finally:
        setattr(worker, name, printing)
        log.setLevel(level)


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
