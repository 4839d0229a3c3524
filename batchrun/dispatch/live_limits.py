"""`control.json`: what `batchrun tune` asks of the process that works in a run directory, and how it is answered.

The file is there whole or not at all, and private. The process looks at it with every heartbeat, takes it or refuses
it, and says so in summary.json. It holds for that process alone: the file goes with its end.
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
from batchrun.job.job import MAX_COST_USD, AtLeastOne, Positive
from batchrun.records import InForce
from batchrun.report.limit_lines import limits_in_words
from batchrun.report.summary import read
from batchrun.store.rundir import RunDirectory

PATIENCE_S = 15.0
"""How long `tune` waits for its answer: thirty heartbeats of a process that is not even busy."""

LOOK_S = 0.1

LONGEST_SHOWN = 40
"""Characters of a wrong value that its message repeats."""

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


class Control(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Limits that are to hold from now on; None leaves one as it is. `id` names this wish in the answer."""

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
        """The rates among them, but for that of a day."""
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
"""What each of them must be."""


def wish(limits: Mapping[str, str]) -> Control:
    """The wish that these limits hold, by a name that no other has. They are as a person typed them.

    Raises:
        JobError: there are none, or one can't be.
    """
    if not limits:
        raise JobError("nothing to change: name a limit, such as --rpm 500 or --max-in-flight 32")
    for name, limit in limits.items():
        if not _can_be(name, limit, strict=False):
            raise JobError(f"{FLAGS[name]} {limit or repr('')}: expected {EXPECTED[name]}")
    return msgspec.convert({"id": secrets.token_hex(8), **limits}, Control, strict=False)


def decode(content: bytes) -> Control:
    """The wish in the file.

    Raises:
        ValueError: it is nonsense; the message says where.
    """
    try:
        asked = msgspec.json.decode(content, type=dict[str, msgspec.Raw])
        values = {name: msgspec.json.decode(value) for name, value in asked.items()}
    except (ValueError, RecursionError):
        raise ValueError("expected a JSON object of limits") from None
    for name, value in asked.items():
        if name not in EXPECTED:
            raise ValueError(f"{name}: no such limit; there are {', '.join(FLAGS)}")
        if not _can_be(name, values[name], strict=True):
            raise ValueError(f"{name} {_in_short(bytes(value))}: expected {EXPECTED[name]}")
    if "id" not in asked:
        raise ValueError(f"id is missing: expected {EXPECTED['id']}")
    return msgspec.json.decode(content, type=Control)


def _can_be(name: str, value: object, *, strict: bool) -> bool:
    """Whether the value may stand there; `strict` where it comes from JSON, which has numbers of its own."""
    try:
        wanted = msgspec.convert({"id": "a", name: value}, Control, strict=strict)
    except ValueError:
        return False
    cap = wanted.max_cost_usd
    return cap is None or (cap.is_finite() and 0 < cap <= MAX_COST_USD)


def _in_short(value: bytes) -> str:
    text = value.decode("utf-8", "replace")
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}…"


class Wishes:
    """The file as a running process sees it."""

    def __init__(self, directory: RunDirectory) -> None:
        self._path = directory.control
        self._seen: tuple[int, int, int] | None = None

    def newest(self) -> bytes | None:
        """The file's content, once for each time that it was written; None where there is nothing new."""
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
    """No wish is left, if the disk lets it go: one that stays is older than the next start, which clears it again."""
    with contextlib.suppress(OSError):
        directory.control.unlink()


def ask(directory: RunDirectory, wish: Control, patience_s: float = PATIENCE_S) -> InForce | None:
    """The process that works in the directory has taken the wish; what holds there now.

    Raises:
        InputError: there is no run.
        JobError: no process works there, or it refuses the wish, or does not answer.
    """
    read(directory)
    if not directory.locked():
        raise _nobody(directory)
    replace_bytes(directory.control, msgspec.json.encode(wish))
    until_s = time.monotonic() + patience_s
    while time.monotonic() < until_s:
        works = directory.locked()  # looked at first: a cap below what is spent is taken, and ends the process
        answer = (directory.read_summary() or {}).get("tuned")
        if isinstance(answer, dict) and answer.get("id") == wish.id:
            if (refused := answer.get("refused")) is not None:
                raise JobError(f"{directory.path}: not taken: {refused}")
            return read(directory).limits
        if not works:
            clear(directory)
            raise _nobody(directory)
        time.sleep(LOOK_S)
    raise JobError(
        f"{directory.path}: the process has not answered within {patience_s:g} s; it asks no rows just now, "
        "and takes what was said when it does"
    )


def in_words(wish: Control, limits: InForce) -> str:
    """What holds now, and why that is less than was asked for."""
    lower = [
        f"{asked:,.0f} {unit}"
        for asked, now, unit in (
            (wish.requests_per_minute, limits.requests_per_minute, "requests/min"),
            (wish.tokens_per_minute, limits.tokens_per_minute, "tokens/min"),
        )
        if asked is not None and now is not None and now < asked * 0.999
    ]
    why = f" (what holds now: the server's headers or refusals allow less than {' and '.join(lower)})" if lower else ""
    return limits_in_words(limits) + why


def _nobody(directory: RunDirectory) -> InputError:
    return InputError(
        f"{directory.path}: no process is running there; limits for the next start belong in its job, or in --set"
    )
