"""`control.json`: the limits that `batchrun tune` sets in a running process. The process replies in summary.json.

The limits hold for that process alone: the file is deleted when it ends.
"""

import contextlib
import secrets
import time
from collections.abc import Mapping
from decimal import Decimal
from typing import Annotated

import msgspec
from msgspec import Meta

from batchrun.durable import replace_bytes
from batchrun.errors import InputError, JobError
from batchrun.job.settings import MAX_COST_USD, AtLeastOne, Positive
from batchrun.report.limit_lines import limits_in_words
from batchrun.report.summary import read
from batchrun.run_summary import InForce
from batchrun.store.rundir import RunDirectory

PATIENCE_S = 15.0
"""How long `tune` waits for the reply: thirty heartbeats."""

POLL_S = 0.1  # looks for the reply: a look at a small file costs next to nothing

LONGEST_SHOWN = 40
"""How many characters of an invalid value an error message repeats."""

MOST_IN_FLIGHT = 4096
"""As `limits.max_in_flight`."""

FLAGS = {
    "requests_per_second": "--rps",
    "requests_per_minute": "--rpm",
    "requests_per_day": "--rpd",
    "tokens_per_minute": "--tpm",
    "input_tokens_per_minute": "--input-tpm",
    "output_tokens_per_minute": "--output-tpm",
    "max_in_flight": "--max-in-flight",
    "max_cost_usd": "--max-cost",
    "max_tokens": "--max-tokens",
    "max_requests": "--max-requests",
}
"""Each limit with the flag of `batchrun tune` that sets it."""


class LimitChange(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """New limits; None leaves one as it is. The reply repeats `id`."""

    id: Annotated[str, Meta(min_length=1, max_length=64)]
    requests_per_second: Positive | None = None
    requests_per_minute: Positive | None = None
    requests_per_day: AtLeastOne | None = None
    tokens_per_minute: Positive | None = None
    input_tokens_per_minute: Positive | None = None
    output_tokens_per_minute: Positive | None = None
    max_in_flight: Annotated[int, Meta(ge=1, le=MOST_IN_FLIGHT)] | None = None
    max_cost_usd: Decimal | None = None
    max_tokens: AtLeastOne | None = None
    max_requests: AtLeastOne | None = None

    @property
    def rates(self) -> dict[str, float | None]:
        """The rates a second and a minute."""
        return {name: getattr(self, name) for name in RATES}


RATES = tuple(name for name in FLAGS if name.endswith(("_per_second", "_per_minute")))

EXPECTED = (
    dict.fromkeys(RATES, "a number above 0, at most 1e12")
    | dict.fromkeys(("requests_per_day", "max_tokens", "max_requests"), "a whole number of 1 or more")
    | {
        "id": "a text of 1 to 64 characters",
        "max_in_flight": f"a whole number from 1 to {MOST_IN_FLIGHT:,}",
        "max_cost_usd": f"an amount in USD above 0, at most {MAX_COST_USD:,}",
    }
)
"""The values that each of them takes, in words."""


def parse(limits: Mapping[str, str]) -> LimitChange:
    """The limits as typed on the command line, with a new id.

    Raises:
        JobError: no limit is given, or one is invalid.
    """
    if not limits:
        raise JobError("nothing to change: name a limit, such as --rpm 500 or --max-in-flight 32")
    for name, limit in limits.items():
        if not _is_valid(name, limit, strict=False):
            raise JobError(f"{FLAGS[name]} {limit or repr('')}: expected {EXPECTED[name]}")
    return msgspec.convert({"id": secrets.token_hex(8), **limits}, LimitChange, strict=False)


def decode(content: bytes) -> LimitChange:
    """The limits in the file.

    Raises:
        ValueError: the content is invalid; the message says where.
    """
    try:
        fields = msgspec.json.decode(content, type=dict[str, msgspec.Raw])
        values = {name: msgspec.json.decode(value) for name, value in fields.items()}
    except (ValueError, RecursionError):
        raise ValueError("expected a JSON object of limits") from None
    for name, value in fields.items():
        if name not in EXPECTED:
            raise ValueError(f"{name}: no such limit; there are {', '.join(FLAGS)}")
        if not _is_valid(name, values[name], strict=True):
            text = bytes(value).decode("utf-8", "replace")
            shown = text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}…"
            raise ValueError(f"{name} {shown}: expected {EXPECTED[name]}")
    if "id" not in fields:
        raise ValueError(f"id is missing: expected {EXPECTED['id']}")
    return msgspec.json.decode(content, type=LimitChange)


def _is_valid(name: str, value: object, *, strict: bool) -> bool:
    """Whether the limit can have this value. Not `strict`: numbers may be given as text."""
    try:
        change = msgspec.convert({"id": "a", name: value}, LimitChange, strict=strict)
    except ValueError:
        return False
    cap = change.max_cost_usd
    return cap is None or (cap.is_finite() and 0 < cap <= MAX_COST_USD)


class ControlFile:
    """control.json as the running process reads it."""

    def __init__(self, directory: RunDirectory) -> None:
        self._path = directory.control
        self._seen: tuple[int, int, int] | None = None

    def read_new(self) -> bytes | None:
        """The file's content, once for each time it was written; None if there is nothing new."""
        try:
            found = self._path.stat()
        except OSError:
            return None
        identity = found.st_ino, found.st_mtime_ns, found.st_size
        if identity == self._seen:
            return None
        self._seen = identity
        with contextlib.suppress(OSError):
            return self._path.read_bytes()
        return None


def clear(directory: RunDirectory) -> None:
    """Deletes control.json, so that it does not change the limits of the next start."""
    with contextlib.suppress(OSError):  # the next start deletes it too, before it reads any
        directory.control.unlink()


def apply(directory: RunDirectory, change: LimitChange, patience_s: float = PATIENCE_S) -> InForce | None:
    """Passes the change to the process that works in the directory, and waits for the reply; the limits in force then.

    Raises:
        InputError: there is no run.
        JobError: no process works there, or it refuses the change or does not reply.
    """
    read(directory)
    if not directory.locked():
        raise _no_process(directory)
    replace_bytes(directory.control, msgspec.json.encode(change))
    until_s = time.monotonic() + patience_s
    while time.monotonic() < until_s:
        # before the summary is read: a cap below what is spent is accepted, and then the process ends
        works = directory.locked()
        reply = (directory.read_summary() or {}).get("tuned")
        if isinstance(reply, dict) and reply.get("id") == change.id:
            if (refused := reply.get("refused")) is not None:
                raise JobError(f"{directory.path}: refused: {refused}")
            return read(directory).limits
        if not works:
            clear(directory)
            raise _no_process(directory)
        time.sleep(POLL_S)
    raise JobError(
        f"{directory.path}: the process did not reply within {patience_s:g} s; it sends no rows now, "
        "and will apply the change when it does"
    )


def describe(change: LimitChange, limits: InForce) -> str:
    """The limits in force, and why they are below the ones that were set."""
    lower = [
        f"{wanted:,.0f} {unit}"
        for wanted, now, unit in (
            (change.requests_per_minute, limits.requests_per_minute, "requests/min"),
            (change.tokens_per_minute, limits.tokens_per_minute, "tokens/min"),
        )
        if wanted is not None and now is not None and now < wanted * 0.999
    ]
    why = f" (limits in force: the server's headers or refusals allow less than {' and '.join(lower)})" if lower else ""
    return limits_in_words(limits) + why


def _no_process(directory: RunDirectory) -> InputError:
    return InputError(
        f"{directory.path}: no process is running there; limits for the next start belong in its job, or in --set"
    )
