"""The settings of a simulator: one frozen value, every field with a default."""

import ipaddress

import msgspec

from batchrun.errors import JobError
from batchrun.simulator.faults import Fault
from batchrun.simulator.limits import PlannedChange

# Inclusive. The upper ends only catch slips of the unit (milliseconds for seconds, tokens for requests).
_RANGES: dict[str, tuple[float, float]] = {
    "port": (0, 65_535),
    "requests_per_minute": (1, 1e9),
    "tokens_per_minute": (1, 1e12),
    "latency_s": (0, 3_600),
    "latency_sigma": (0, 3),
    "flex_latency_s": (0, 3_600),
    "cache_life_s": (0, 86_400),
    "tokens_per_second": (0, 1e6),
    "refuse_above": (1, 1e6),
    "work_on": (1, 1e6),
    "seed": (0, 2**63 - 1),
    "parent_pid": (1, 2**31 - 1),
}


class SimulatorConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One simulator's settings; docs/simulator.md lists them all.

    Raises:
        JobError: a value is out of range, or the host is not this machine.
    """

    host: str = "127.0.0.1"
    """A loopback address: the simulator accepts any key and must not be reachable from other machines."""
    port: int = 0
    """0 = the system picks a free one; the announced URL names it."""
    api_key: str | None = None
    """The only accepted bearer token; None accepts any that is not empty."""
    models: tuple[str, ...] | None = None
    """The models served, others get 404; None serves every name."""
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    headers: bool = True
    """Send `x-ratelimit-*` for the limits that are set, and `retry-after-ms`. `Retry-After` comes with a 429 either
    way."""
    limit_changes: tuple[PlannedChange, ...] = ()
    """Other limits from a certain age of the simulator on, in the order of their time."""
    latency_s: float = 0.0
    """The median time to the first byte of an answer."""
    latency_sigma: float = 0.5
    """The spread: standard deviation of the logarithm of the latency; 0.5 puts 95 % within a factor of 2.7."""
    flex_latency_s: float | None = None
    """The median for requests with the service tier `flex`; None: `latency_s`."""
    tokens_per_second: float = 0.0
    """The pace of a stream; 0 sends it at once."""
    refuse_above: int | None = None
    """Refuse with 429 and without a Retry-After while this many requests are being worked on."""
    work_on: int | None = None
    """Work on this many requests at a time; the others wait in a queue."""
    seed: int = 0
    faults: tuple[Fault, ...] = ()
    draw_by_request_id: bool = False
    """Draw faults from the row and attempt in an `X-Client-Request-Id` of the form `run-row-attempt`, so that a restart
    of the simulator changes nothing. Other requests are drawn from a count of the question's attempts."""
    cache_life_s: float | None = None
    """Simulate an implicit prompt cache whose prefixes live this long after their last use. None: a long system prompt
    always counts as cached, so that a question's usage is always the same."""
    ledger: str | None = None
    """The file to append a line per exchange to; None keeps counters only."""
    parent_pid: int | None = None
    """End when this process, the parent, has ended; None: outlive it."""

    def __post_init__(self) -> None:
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise JobError(f"simulator: {name} = {value} is not within {low:g} to {high:g}")
        try:
            is_loopback = ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            is_loopback = False
        if not is_loopback:
            raise JobError(f"simulator: host = {self.host!r} is not a loopback address such as 127.0.0.1")
        if self.api_key == "":
            raise JobError("simulator: api_key is empty; leave it out to accept any key")
        for change in self.limit_changes:
            for name in ("requests_per_minute", "tokens_per_minute"):
                value, (low, high) = getattr(change, name), _RANGES[name]
                if value is not None and getattr(self, name) is None:
                    raise JobError(f"simulator: limit_changes: {name} can't change, since it is not set at the start")
                if value is not None and not low <= value <= high:
                    raise JobError(f"simulator: limit_changes: {name} = {value} is not within {low:g} to {high:g}")
        times = [change.at_s for change in self.limit_changes]
        if times != sorted(times):
            raise JobError("simulator: limit_changes: they are not in the order of their at_s")


def config_from_json(text: str | bytes) -> SimulatorConfig:
    """The settings in a JSON object.

    Raises:
        JobError: not JSON, an unknown field, a wrong type or a value out of range.
    """
    try:
        return msgspec.json.decode(text, type=SimulatorConfig)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise JobError(f"simulator: {error}") from error
