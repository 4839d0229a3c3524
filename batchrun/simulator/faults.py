"""Faults on demand: what may go wrong, and which request meets it. Pure: no clock, no socket."""

from collections import Counter
from hashlib import blake2b
from typing import Literal

import msgspec

from batchrun.errors import JobError

Kind = Literal[
    "status",
    "echo_key",
    "redirect",
    "error_200",
    "garbage",
    "body",
    "gzip_bomb",
    "wire",
    "reset",
    "hang",
    "cut",
    "slow_body",
    "close_after",
    "wrong_model",
    "no_usage",
    "invalid_json",
    "unfit_json",
]

# These spoil an answer that was worked out, so it was paid for; all others come instead of one.
SPOILING: frozenset[Kind] = frozenset(
    {"cut", "slow_body", "close_after", "wrong_model", "no_usage", "invalid_json", "unfit_json"}
)

_STATUS_OF_KIND: dict[Kind, int] = {"redirect": 307, "echo_key": 401}  # others: 200, or 500 for "status"


class Fault(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One rule: what happens, and to which requests. Of several rules the first that applies is met.

    Raises:
        JobError: a value is out of range, or the kind lacks what it needs.
    """

    kind: Kind
    share: float = 1.0
    """How many of the requests the rest of the rule applies to, 0 to 1; drawn from question and attempt."""
    sticky: bool = False
    """Draw from the question alone: a retry meets the same fate."""
    from_request: int = 1
    """The first and last exchange it applies to, counted from 1 over the simulator's life."""
    to_request: int | None = None
    match: str = ""
    """Only requests whose JSON body holds this text, byte for byte."""
    times: int | None = None
    """At most this often, over all requests or, with `per_question`, for each question."""
    per_question: bool = False
    after_s: float = 0.0
    """From and until this age of the simulator: an outage."""
    until_s: float | None = None
    billed: bool | None = None
    """Whether the exchange is billed; None = only the kinds that spoil a finished answer."""
    status: int | None = None
    message: str = "The simulator was asked to fail here"
    code: str | None = None
    headers: tuple[tuple[str, str], ...] = ()
    """Sent as they are, repeated names too."""
    retry_after: str | None = None
    retry_after_ms: str | None = None
    html: bool = False
    """The error's body is a proxy's HTML page."""
    empty: bool = False
    """The error has no body."""
    location: str = ""
    pause_s: float = 0.0
    """Seconds between bytes (slow_body, wire), or before the close (close_after) or the reset."""
    body: str = ""
    body_base64: bytes = b""
    """What `body` and `wire` send where text can't say it; wins over `body`."""

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise JobError(f"faults: share = {self.share} is not within 0 to 1")
        if self.status is not None and not 200 <= self.status <= 599:
            raise JobError(f"faults: status = {self.status} is not within 200 to 599")
        if self.from_request < 1 or (self.times is not None and self.times < 0):
            raise JobError("faults: from_request counts from 1, and times from 0")
        if not 0 <= self.pause_s <= 3_600:
            raise JobError(f"faults: pause_s = {self.pause_s} is not within 0 to 3600")
        if self.kind == "redirect" and not self.location:
            raise JobError("faults: redirect needs a location")

    @property
    def http_status(self) -> int:
        """The status on the wire."""
        if self.status is not None:
            return self.status
        return _STATUS_OF_KIND.get(self.kind, 500 if self.kind == "status" else 200)

    @property
    def answers(self) -> bool:
        """Whether a status line goes out at all."""
        return self.kind not in ("reset", "hang", "wire")

    @property
    def is_billed(self) -> bool:
        """Whether the exchange shows on the bill."""
        return self.kind in SPOILING if self.billed is None else self.billed

    @property
    def payload(self) -> bytes:
        """The literal bytes of `body` and `wire`."""
        return self.body_base64 or self.body.encode()


# 503 is this vendor's code for blocked content (docs/api.md, "Errors"): a verdict on the question, so it sticks.
_NAMED: dict[str, Fault] = {
    "billed_reset": Fault(kind="reset", billed=True),
    "content_policy": Fault(
        kind="status", status=503, message="Content Policy Violation", code="content_policy_violation", sticky=True
    ),
    "overloaded": Fault(
        kind="status", status=503, message="The server is overloaded. Please try again later.", code="overloaded"
    ),
    "insufficient_quota": Fault(
        kind="status",
        status=429,
        message="You exceeded your current quota, please check your plan and billing details.",
        code="insufficient_quota",
    ),
    "insufficient_balance": Fault(
        kind="status", status=403, message="Insufficient balance", code="insufficient_balance"
    ),
}
_STICKY_STATUSES = frozenset({400, 413, 415, 422})  # verdicts on the request itself: a retry changes nothing
_CODE_OF_STATUS = {401: "invalid_api_key", 429: "rate_limit_exceeded"}
_WITHOUT_SETTINGS = frozenset(
    {
        *("error_200", "garbage", "gzip_bomb", "reset", "hang", "cut", "close_after", "wrong_model", "no_usage"),
        *("invalid_json", "unfit_json"),
    }
)


def parse_faults(text: str) -> tuple[Fault, ...]:
    """The rules in the short form `500=0.1,content_policy=0.05,cut=0.01`: a status or a name, and its share.

    Raises:
        JobError: a name that is none, or a share that is no number from 0 to 1.
    """
    return tuple(_parse_fault(item.strip()) for item in text.split(",") if item.strip())


def _parse_fault(item: str) -> Fault:
    name, _, share_text = item.partition("=")
    try:
        share = float(share_text)
    except ValueError:
        raise JobError(f"faults: {item!r} is not NAME=SHARE, such as 500=0.1") from None
    name = name.strip()
    if name.isdecimal():
        status = int(name)
        sticky = status in _STICKY_STATUSES
        return Fault(kind="status", status=status, share=share, sticky=sticky, code=_CODE_OF_STATUS.get(status))
    if name in _NAMED:
        return msgspec.structs.replace(_NAMED[name], share=share)
    if name in _WITHOUT_SETTINGS:
        return msgspec.convert({"kind": name, "share": share}, Fault)
    known = ", ".join(sorted(_NAMED.keys() | _WITHOUT_SETTINGS))
    raise JobError(f"faults: {name!r} is neither an HTTP status nor one of {known}")


class FaultBook:
    """Decides, request by request, which rule is met; the same questions in any order meet the same fates
    unless a rule counts (`from_request`, `times`) or watches the clock."""

    def __init__(self, faults: tuple[Fault, ...], seed: int) -> None:
        self._faults = faults
        self._seed = seed.to_bytes(8)
        self._met: Counter[tuple[int, bytes]] = Counter()
        self._attempts: Counter[bytes] = Counter()
        # A million questions are 100 MB of counters: kept only where a rule draws anew for each attempt.
        self._counts_attempts = any(0 < fault.share < 1 and not fault.sticky for fault in faults)

    def meet(
        self, question: bytes, body: bytes, *, ordinal: int, age_s: float, attempt_of_row: str | None = None
    ) -> Fault | None:
        """The first rule that applies to this exchange, counted as met; None for a plain answer.

        `attempt_of_row`: the client's own name of this attempt, drawn from in place of a count of the question's.
        """
        if self._counts_attempts and attempt_of_row is None:
            self._attempts[question] += 1
        for index, fault in enumerate(self._faults):
            counted = (index, question if fault.per_question else b"")
            if (
                _in_range(fault, ordinal, age_s)
                and (fault.times is None or self._met[counted] < fault.times)
                and fault.match.encode() in body
                and self._draw(index, fault, question, attempt_of_row) < fault.share
            ):
                if fault.times is not None:
                    self._met[counted] += 1
                return fault
        return None

    def _draw(self, index: int, fault: Fault, question: bytes, attempt_of_row: str | None) -> float:
        """A number in [0, 1) that depends on the seed, the rule, the question and, unless sticky, the attempt."""
        named = "" if fault.sticky or attempt_of_row is None else attempt_of_row
        attempt = 0 if fault.sticky else self._attempts[question]
        salt = self._seed + index.to_bytes(4) + attempt.to_bytes(4)
        return int.from_bytes(blake2b(question + named.encode(), key=salt, digest_size=7).digest()) / 2**56


def _in_range(fault: Fault, ordinal: int, age_s: float) -> bool:
    return (
        fault.from_request <= ordinal
        and (fault.to_request is None or ordinal <= fault.to_request)
        and fault.after_s <= age_s
        and (fault.until_s is None or age_s < fault.until_s)
    )
