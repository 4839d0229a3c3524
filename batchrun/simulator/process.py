"""The simulator as a process: it listens, and ends at a signal or with its parent."""

import asyncio
import os
import signal
from collections.abc import Callable
from contextlib import suppress

from aiohttp import web

from batchrun.errors import JobError
from batchrun.simulator.config import SimulatorConfig
from batchrun.simulator.ledger import RequestLedger
from batchrun.simulator.server import Simulator

_PARENT_POLL_S = 1.0  # how long a simulator may outlive its parent: any short time does
_CLOSING_GRACE_S = 0.2  # for exchanges in flight at the end; a hanging one would never finish
_BACKLOG = 1_024  # a client may open all its connections at once
_KEEP_ALIVE_S = 3_600.0  # never closes an idle connection: batchrun's own pool is what is tested


def run(config: SimulatorConfig, announce: Callable[[str], None]) -> None:
    """Serves until SIGTERM, SIGINT or the end of `config.parent_pid`; every exchange is in the ledger.

    It needs the main thread, which gets the signals. `announce` gets the base URL, such as
    `http://127.0.0.1:40123/v1`, once connections are accepted.

    Raises:
        JobError: the port is taken, or the ledger can't be opened.
    """
    try:
        import uvloop
    except ImportError:
        asyncio.run(_serve(config, announce))
    else:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(config, announce))


async def _serve(config: SimulatorConfig, announce: Callable[[str], None]) -> None:
    try:
        ledger = RequestLedger(config.ledger)
    except OSError as error:
        raise JobError(f"simulator: the ledger {config.ledger} can't be opened: {error.strerror}") from error
    server = web.Server(Simulator(config, ledger).respond, access_log=None, keepalive_timeout=_KEEP_ALIVE_S)
    runner = web.ServerRunner(server, shutdown_timeout=_CLOSING_GRACE_S)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):  # before the announcement: its reader may send a signal at once
        asyncio.get_running_loop().add_signal_handler(number, stop.set)

    try:
        await runner.setup()
        try:
            await web.TCPSite(runner, config.host, config.port, backlog=_BACKLOG).start()
        except OSError as error:
            raise JobError(f"simulator: can't listen on {config.host}:{config.port}: {error.strerror}") from error
        host = f"[{config.host}]" if ":" in config.host else config.host
        announce(f"http://{host}:{runner.addresses[0][1]}/v1")
        while not stop.is_set() and config.parent_pid in (None, os.getppid()):
            with suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), None if config.parent_pid is None else _PARENT_POLL_S)
    finally:
        await runner.cleanup()
        ledger.close()
