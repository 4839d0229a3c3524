"""The simulator as a process: it listens, and ends at a signal or with its parent."""

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from aiohttp import web

from batchrun.errors import JobError
from batchrun.simulator.config import SimulatorConfig
from batchrun.simulator.ledger import Ledger
from batchrun.simulator.server import Simulator

_PARENT_POLL_S = 1.0
_CLOSING_GRACE_S = 0.2  # for exchanges in flight at the end; a hanging one would never finish
_BACKLOG = 1_024  # a client may open all its connections at once
_KEEP_ALIVE_S = 3_600.0  # never closes an idle connection: batchrun's own pool is what is tested


async def serve(config: SimulatorConfig, announce: Callable[[str], None]) -> None:
    """Serves until cancelled, SIGTERM, SIGINT or the end of `config.parent_pid`; every exchange is in the ledger.

    `announce` gets the base URL, such as `http://127.0.0.1:40123/v1`, once connections are accepted.

    Raises:
        JobError: the port is taken, or the ledger can't be opened.
    """
    ledger = _open_ledger(config)
    server = web.Server(Simulator(config, ledger).respond, access_log=None, keepalive_timeout=_KEEP_ALIVE_S)
    runner = web.ServerRunner(server, shutdown_timeout=_CLOSING_GRACE_S)
    with _stop_signals() as stop:  # before the announcement: its reader may send a signal at once
        try:
            await runner.setup()
            announce(await _listen(runner, config))
            await _until(stop, config.parent_pid)
        finally:
            await runner.cleanup()
            ledger.close()


def run(config: SimulatorConfig, announce: Callable[[str], None]) -> None:
    """`serve` on an event loop of its own, uvloop's where it is installed."""
    try:
        import uvloop
    except ImportError:
        asyncio.run(serve(config, announce))
    else:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve(config, announce))


def _open_ledger(config: SimulatorConfig) -> Ledger:
    try:
        return Ledger(config.ledger)
    except OSError as error:
        raise JobError(f"simulator: the ledger {config.ledger} can't be opened: {error.strerror}") from error


async def _listen(runner: web.ServerRunner, config: SimulatorConfig) -> str:
    try:
        await web.TCPSite(runner, config.host, config.port, backlog=_BACKLOG).start()
    except OSError as error:
        raise JobError(f"simulator: can't listen on {config.host}:{config.port}: {error.strerror}") from error
    port = runner.addresses[0][1]
    host = f"[{config.host}]" if ":" in config.host else config.host
    return f"http://{host}:{port}/v1"


@contextmanager
def _stop_signals() -> Iterator[asyncio.Event]:
    """An event that SIGTERM and SIGINT set within the block. Only the main thread gets signals."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    signals = (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ()
    for number in signals:
        loop.add_signal_handler(number, stop.set)
    try:
        yield stop
    finally:
        for number in signals:
            loop.remove_signal_handler(number)


async def _until(stop: asyncio.Event, parent_pid: int | None) -> None:
    """Returns when `stop` is set, or when the parent is another process than `parent_pid`."""
    while not stop.is_set() and parent_pid in (None, os.getppid()):
        with suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), None if parent_pid is None else _PARENT_POLL_S)
