"""Faults on demand: what goes wrong, and with which request. PURE: no clock, no socket."""

from collections import Counter
from hashlib import blake2b
from typing import Literal

import msgspec

from batchrun.errors import JobError

Kind = Literal["status", "body", "reset", "hang", "cut", "invalid_json", "unfit_json"]

# These spoil a finished answer, which is therefore billed; the others replace it.
SPOILING: frozenset[Kind] = frozenset({"cut", "invalid_json", "unfit_json"})


class Fault(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One rule: what happens, and to which requests. Where several apply, the first one counts.

    Raises:
        JobError: a value is out of range.
    """

    kind: Kind
    share: float = 1.0
    """The share of those requests that the rest of the rule selects, 0 to 1; drawn from question and attempt."""
    sticky: bool = False
    """Draw from the question alone, so that a retry fails like the first attempt."""
    from_request: int = 1
    """The first exchange it applies to, counted from 1 since the simulator started; `times` says for how many."""
    service_tier: str | None = None
    """Only requests that name this service tier."""
    match: str = ""
    """Only requests whose JSON body holds this text, byte for byte."""
    times: int | None = None
    """At most this often, over all requests or, with `per_question`, for each question."""
    per_question: bool = False
    after_s: float = 0.0
    """Seconds since the simulator started, from and until: an outage."""
    until_s: float | None = None
    billed: bool | None = None
    """Whether the exchange is billed; None: only kinds that spoil a finished answer are."""
    status: int | None = None
    message: str = "A fault of the simulator"
    code: str | None = None
    headers: tuple[tuple[str, str], ...] = ()
    """Sent as given; names may repeat."""
    retry_after: str | None = None
    body: str = ""
    body_base64: bytes = b""
    """The bytes of a body that is not text; replaces `body`."""

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise JobError(f"faults: share = {self.share} is not within 0 to 1")
        if self.status is not None and not 200 <= self.status <= 599:
            raise JobError(f"faults: status = {self.status} is not within 200 to 599")
        if self.from_request < 1 or (self.times is not None and self.times < 0):
            raise JobError("faults: from_request counts from 1, and times from 0")

    @property
    def http_status(self) -> int | None:
        """The status on the wire; None: the client gets no status line."""
        if self.kind in ("reset", "hang"):
            return None
        if self.status is not None:
            return self.status
        return 500 if self.kind == "status" else 200

    @property
    def is_billed(self) -> bool:
        return self.kind in SPOILING if self.billed is None else self.billed


# 503 is this vendor's code for blocked content (docs/api.md, "Errors"): it is about the question, so it is sticky.
_NAMED: dict[str, Fault] = {
    "reset": Fault(kind="reset"),
    "hang": Fault(kind="hang"),
    "cut": Fault(kind="cut"),
    "invalid_json": Fault(kind="invalid_json"),
    "unfit_json": Fault(kind="unfit_json"),
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
    # OpenAI's flex processing (developers.openai.com/api/docs/guides/flex-processing): not billed.
    "flex_unavailable": Fault(
        kind="status",
        status=429,
        message="Resource Unavailable: there is not enough capacity for flex processing. Please try again later.",
        code="resource_unavailable",
        service_tier="flex",
    ),
    "insufficient_balance": Fault(
        kind="status", status=403, message="Insufficient balance", code="insufficient_balance"
    ),
}
_STICKY_STATUSES = frozenset({400, 413, 415, 422})  # the request itself is wrong: a retry changes nothing
_CODE_OF_STATUS = {401: "invalid_api_key", 429: "rate_limit_exceeded"}


def parse_faults(text: str) -> tuple[Fault, ...]:
    """The rules in the short form `500=0.1,content_policy=0.05,cut=0.01`: a status or a name, and its share.

    Raises:
        JobError: an unknown name, or a share that is not a number from 0 to 1.
    """
    faults: list[Fault] = []
    for item in filter(None, map(str.strip, text.split(","))):
        name, _, share_text = item.partition("=")
        try:
            share = float(share_text)
        except ValueError:
            raise JobError(f"faults: {item!r} is not NAME=SHARE, such as 500=0.1") from None
        name = name.strip()
        if name.isdecimal():
            status = int(name)
            sticky, code = status in _STICKY_STATUSES, _CODE_OF_STATUS.get(status)
            faults.append(Fault(kind="status", status=status, share=share, sticky=sticky, code=code))
        elif name in _NAMED:
            faults.append(msgspec.structs.replace(_NAMED[name], share=share))
        else:
            known = ", ".join(sorted(_NAMED))
            raise JobError(f"faults: {name!r} is neither an HTTP status nor one of {known}")
    return tuple(faults)


class FaultBook:
    """Decides for each request which rule applies. The same questions fail alike in any order, unless a rule counts
    (`from_request`, `times`) or depends on the clock."""

    def __init__(self, faults: tuple[Fault, ...], seed: int) -> None:
        self._faults = faults
        self._seed = seed.to_bytes(8)
        self._applied: Counter[tuple[int, bytes]] = Counter()
        self._attempts: Counter[bytes] = Counter()
        # A million questions are 100 MB of counters: kept only where a rule draws again for each attempt.
        self._counts_attempts = any(0 < fault.share < 1 and not fault.sticky for fault in faults)

    def fault_for(
        self,
        question: bytes,
        body: bytes,
        *,
        ordinal: int,
        age_s: float,
        service_tier: str | None = None,
        attempt_of_row: str | None = None,
    ) -> Fault | None:
        """The first rule that applies to this exchange, and it is counted; None: a plain answer.

        `attempt_of_row`: the client's name for this attempt; it replaces the count of the question's attempts.
        """
        if self._counts_attempts and attempt_of_row is None:
            self._attempts[question] += 1
        for index, fault in enumerate(self._faults):
            counted = (index, question if fault.per_question else b"")
            if (
                fault.from_request <= ordinal
                and fault.after_s <= age_s
                and (fault.until_s is None or age_s < fault.until_s)
                and (fault.times is None or self._applied[counted] < fault.times)
                and fault.service_tier in (None, service_tier)
                and fault.match.encode() in body
                and self._draw(index, fault, question, attempt_of_row) < fault.share
            ):
                if fault.times is not None:
                    self._applied[counted] += 1
                return fault
        return None

    def _draw(self, index: int, fault: Fault, question: bytes, attempt_of_row: str | None) -> float:
        """A number in [0, 1) that depends on the seed, the rule, the question and, unless sticky, the attempt."""
        named = "" if fault.sticky or attempt_of_row is None else attempt_of_row
        attempt = 0 if fault.sticky else self._attempts[question]
        salt = self._seed + index.to_bytes(4) + attempt.to_bytes(4)
        return int.from_bytes(blake2b(question + named.encode(), key=salt, digest_size=7).digest()) / 2**56
