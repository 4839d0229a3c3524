"""The wires that a test of the transport runs on: each of them is to keep the whole contract."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine, Iterator
from typing import Any, Literal, NamedTuple, TypeVar

import pytest
import uvloop

from batchrun.credentials import Credentials
from batchrun.job.settings import Endpoint
from batchrun.transport.transport import Transport, choose, opened

KEY = "sk-canary-4711"
T = TypeVar("T")


class Wire(NamedTuple):
    """A wire on an event loop. uvloop reads and writes in another order than asyncio's own, and is what users run."""

    transport: Literal["auto", "session"]
    uvloop: bool


WIRES = {
    "lean": Wire("auto", uvloop=False),
    "lean-uvloop": Wire("auto", uvloop=True),
    "session": Wire("session", uvloop=False),
    "session-uvloop": Wire("session", uvloop=True),
}
_on_test: list[Wire] = []


@pytest.fixture(params=list(WIRES), autouse=True)
def wire(request: pytest.FixtureRequest) -> Iterator[Wire]:
    """The wire that `run` and `client_of` use. A test module that imports this runs on all of them."""
    _on_test.append(WIRES[request.param])
    yield _on_test[-1]
    _on_test.pop()


@pytest.fixture(params=["lean", "session"], autouse=True)
def wire_of_runs(request: pytest.FixtureRequest) -> Iterator[Wire]:
    """The same for whole runs, which bring their own event loop."""
    _on_test.append(WIRES[request.param])
    yield _on_test[-1]
    _on_test.pop()


def transport_on_test() -> Literal["auto", "session"]:
    """`endpoint.transport` for the wire on test; what users have, where a test is not about wires."""
    return _on_test[-1].transport if _on_test else "auto"


def run(main: Coroutine[Any, Any, T]) -> T:
    """What `main` returns on the wire's event loop."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop if _on_test[-1].uvloop else None) as runner:
        return runner.run(main)


@contextlib.asynccontextmanager
async def client_of(url: str, **endpoint: Any) -> AsyncIterator[Transport]:
    """An open transport."""
    settings = Endpoint(url, **{"api_key_env": "KEY", "transport": transport_on_test(), **endpoint})
    credentials = Credentials({"Authorization": f"Bearer {KEY}"}, frozenset({KEY}))
    async with opened(choose(settings), url, settings, credentials) as transport:
        yield transport
