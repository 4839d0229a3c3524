"""The frozen values of a row on its way through the stages. Those of a whole run are in `run_summary`."""

from collections.abc import Mapping
from datetime import UTC, datetime
from decimal import Decimal
from enum import StrEnum
from typing import Any, Final, Self

import msgspec

from batchrun.errors import APIConnectionError
from batchrun.job.answer_schema import ANYTHING, Expected


class Notice(str):
    """A line for people that also says which `event` it reports, with its figures, for programs that read lines."""

    event: str
    fields: Mapping[str, object]

    def __new__(cls, line: str, event: str, **fields: object) -> Self:
        self = super().__new__(cls, line)
        self.event, self.fields = event, fields
        return self


class Verdict(StrEnum):
    """The meaning of one attempt's outcome for its row and the run. docs/failures.md has the whole table."""

    OK = "ok"
    """A usable answer: settle the row by its finish_reason."""
    ROW = "row"
    """The row's own, final: no retry."""
    FREE = "free"
    """Certainly not billed: try again."""
    MAYBE = "maybe"
    """May have been billed although no answer was kept: try again, rarely, and count it."""
    SLOW = "slow"
    """Too fast for the server: everyone waits, no row is charged an attempt."""
    PAUSE = "pause"
    """The key, balance or quota: no row can succeed now; the run can be resumed."""
    STOP = "stop"
    """The URL, certificate or route is wrong: no row can succeed until the job is changed."""


OK: Final = Verdict.OK
"""For the path of each row: in Python 3.11 a member costs 800 instructions as an attribute of its enum, which looks for
a `__getattr__` first.
"""


class Status(StrEnum):
    """How a row ended: the `status` column."""

    OK = "ok"
    TRUNCATED = "truncated"
    FILTERED = "filtered"
    REFUSED = "refused"
    EMPTY = "empty"
    INVALID = "invalid"
    ERROR = "error"


FAILURES = frozenset({Status.EMPTY, Status.INVALID, Status.ERROR})
"""The statuses that count against `max_failures`; `truncated`, `filtered` and `refused` are answers."""


def replaces(new: str, old: str) -> bool:
    """True when a row that is settled again takes its new record: no answer is given up for a failure."""
    return new not in FAILURES or old in FAILURES


def utc_day(at: float) -> str:
    """The UTC day of a moment in seconds of Unix time: `2026-11-28`."""
    return datetime.fromtimestamp(at // DAY_S * DAY_S, UTC).date().isoformat()


DAY_S = 86_400


class Usage(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """Tokens of one answer. cached and written ⊂ prompt, for an hour ⊂ written; None where the server did not say.

    Reasoning is a part of the completion at most vendors, and beside it at some: then the total holds it.
    """

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    cached_tokens: int | None = None
    reasoning_tokens: int | None = None
    cache_write_tokens: int | None = None
    cache_write_1h_tokens: int | None = None

    @property
    def billed_output_tokens(self) -> int:
        """All that the total counts beside the prompt: reasoning outside the completion is billed, too."""
        beside_prompt = self.total_tokens - self.prompt_tokens
        return self.completion_tokens if self.completion_tokens > beside_prompt else beside_prompt


class OfflineCount(msgspec.Struct, frozen=True, gc=False):
    """About how many tokens an exchange had whose answer came without usage, by a count of our own."""

    prompt_tokens: int
    completion_tokens: int


class Row(msgspec.Struct, frozen=True, gc=False):
    """One accepted input record: its position in the input, from 0, and its columns by name."""

    row: int
    columns: dict[str, Any]


class Request(msgspec.Struct, frozen=True, gc=False):
    """The body made from a row and a job, encoded once.

    `key` is the identity of the question (BLAKE2b-128, docs/design.md); `body` goes to the wire as it is.
    `max_prompt_tokens` and `max_output_tokens` bound what one attempt can be billed for; no tokenizer makes more
    tokens than the body has bytes. `pictures` of its images are put in when it is sent; until then the body
    lacks them. `image_tokens` is what all its images usually count. `expected` is what the answer is validated against,
    `choices` how many of them it asks for (`n`).
    """

    row: int
    key: bytes
    body: bytes
    model: str
    max_prompt_tokens: int
    max_output_tokens: int
    pictures: int = 0
    image_tokens: int = 0
    expected: Expected = ANYTHING
    choices: int = 1

    @property
    def upper_bound_tokens(self) -> int:
        """The most tokens that one attempt can use."""
        return self.max_prompt_tokens + self.max_output_tokens


class Correction(msgspec.Struct, frozen=True, gc=False):
    """An invalid answer, and what the next request says to the model about it."""

    answer: str
    complaint: str


class Attempt(msgspec.Struct, frozen=True):
    """One HTTP exchange as it ended: either `http_status` with `body`, or `error` with the bytes received so far.

    `body` is decompressed, redacted, and in its stored form (`packed`), which matters for what is `streamed`: a 2xx of
    server-sent events. `started_at` is wall time; durations are monotonic seconds. `time_to_first_token_s`: until a
    stream's first text, call or reasoning. `request_id` is the server's id for the exchange, to reconcile an invoice;
    if it sent none, our own id.
    """

    started_at: float
    latency_s: float
    http_status: int | None
    headers: Mapping[str, str]
    body: bytes
    error: APIConnectionError | None = None
    time_to_first_token_s: float | None = None
    request_id: str | None = None
    streamed: bool = False


class FunctionCall(msgspec.Struct, frozen=True, gc=False):
    """The model's wish to call a function; `arguments` is a JSON string as the server gave it, unchecked."""

    name: str | None
    arguments: str | None


class Choice(msgspec.Struct, frozen=True, gc=False):
    """One of several answers to one request: the column `choices`."""

    index: int
    content: str | None
    finish_reason: str | None


class Answer(msgspec.Struct, frozen=True, gc=False):
    """The content of a 2xx body, as far as it could be read. `flagged` = only the lenient reading worked.

    `completion` is False when there is no first choice with a message. `tool_calls` is JSON text; `choices` are there
    when they are several, the first one among them. `refusal` is the model's own text where it declined.

    `error_*` is what the body, or the first choice, says went wrong (`answer.error_body`): `error_words` is what it
    says besides message and code, `error_status` the HTTP status it names, `error_wait_s` the seconds it asks to wait.

    `service_tier` is the one that served it, `reported_cost_pico_usd` the cost that the server states,
    `billed_apart` what it used that no price of text covers (`response.billed_apart`).
    """

    completion: bool = False
    flagged: bool = False
    completion_id: str | None = None
    created: int | None = None
    model: str | None = None
    content: str | None = None
    function_call: FunctionCall | None = None
    tool_calls: str | None = None
    choices: tuple[Choice, ...] = ()
    finish_reason: str | None = None
    usage: Usage | None = None
    error_message: str | None = None
    error_code: str | None = None
    error_words: str | None = None
    error_status: int | None = None
    error_wait_s: float | None = None
    refusal: str | None = None
    service_tier: str | None = None
    reported_cost_pico_usd: int | None = None
    billed_apart: str | None = None


WRONG_KEY = "authentication"
"""The `error.kind` of a refused key: any 401, and another status whose words say so (Google and xAI send a 400)."""

OTHER_API = "other_api"
"""The `error.kind` of a 2xx that is a whole answer of another API: each may be billed, and no wait makes it better."""


class RowError(msgspec.Struct, frozen=True, gc=False):
    """The `error` column: why a row has no usable answer. `message` is bounded and redacted."""

    kind: str
    http_status: int | None = None
    code: str | None = None
    message: str | None = None

    @property
    def text(self) -> str:
        """The reason in the server's words, with its status."""
        words = self.message or self.kind
        status = f"HTTP {self.http_status}"
        return words if self.http_status is None or words.startswith(status) else f"{status}: {words}"


class SetAside(msgspec.Struct, frozen=True):
    """An answer that was billed and is not its row's, since the row was sent again in the hope of a better one.

    `kind` and `message` are what was wrong with it, `content` is its text; calls are JSON.
    """

    attempt: int
    kind: str
    message: str | None
    content: str


class Discarded(msgspec.Struct, frozen=True, gc=False):
    """An attempt that was not its row's last: what it was and what it cost. `counted` = against the row's caps.

    `at` is when it ended (Unix time, seconds): its cost is booked on that day. `maybe_billed`: no answer came, but it
    may have been billed, at most `possibly_billed_pico_usd` (None: price unknown) for at most `possibly_billed_tokens`.
    `said` is the text of an answer that was set aside, None where there was no answer.
    """

    row: int
    n: int
    verdict: Verdict
    counted: bool
    http_status: int | None
    error_kind: str | None
    message: str | None
    request_id: str | None
    at: float
    model: str
    usage: Usage | None
    cost_pico_usd: int | None
    maybe_billed: bool
    possibly_billed_pico_usd: int | None
    key: bytes
    possibly_billed_tokens: int = 0
    offline: OfflineCount | None = None
    reported_cost_pico_usd: int | None = None
    said: str | None = None
    service_tier: str = ""

    @property
    def set_aside(self) -> SetAside | None:
        """The answer that was set aside, if there was one."""
        return None if self.said is None else SetAside(self.n, self.error_kind or "", self.message, self.said)


class Restored(msgspec.Struct, frozen=True, gc=False):
    """Usage and cost of an earlier attempt that was booked as discarded, but whose answer settles its row after all.

    `last_at` is when the row's last attempt ended (Unix time, seconds); it got no answer.
    """

    usage: Usage | None
    cost_pico_usd: int | None
    last_at: float


class CompletionRecord(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """The final record of a row. `cost_pico_usd` is of all its attempts; None where one could not be priced.

    `usage` and `last_cost_pico_usd` are the last attempt's alone: what the totals still lack. The record is that
    attempt's, unless an earlier one was `restored`. `possibly_billed_pico_usd` is the bound of an attempt whose cost is
    unknown or in doubt. `in_json`: the content is the JSON that the request wants, and belongs into `parsed`.
    `invocation` is the start of the run that settled the row. `reported_cost_pico_usd` is what the server states for
    its answer. `set_aside` are the row's earlier answers, oldest first.
    """

    row: int
    key: bytes
    status: Status
    attempts: int
    http_status: int | None
    error: RowError | None
    request_id: str | None
    finished_at: float
    latency_s: float
    time_to_first_token_s: float | None
    model: str
    answered_model: str | None
    usage: Usage | None
    cost_pico_usd: int | None
    last_cost_pico_usd: int | None
    maybe_billed: bool
    possibly_billed_pico_usd: int | None
    raw: bytes
    variant: int = 0
    possibly_billed_tokens: int = 0
    in_json: bool = False
    offline: OfflineCount | None = None
    reported_cost_pico_usd: int | None = None
    invocation: int = 0
    restored: Restored | None = None
    set_aside: tuple[SetAside, ...] = ()
    service_tier: str = ""
    """The tier that the row's answer names; "": none."""

    @property
    def answer_cost_pico_usd(self) -> int | None:
        """The cost of the row's answer alone."""
        return self.last_cost_pico_usd if self.restored is None else self.restored.cost_pico_usd


Ending = CompletionRecord | Discarded
"""How an attempt ends for the checkpoint: with its row settled, or with the row still pending."""


class PossiblyBilled(msgspec.Struct, frozen=True):
    """An attempt whose end is unknown: it may have been billed up to `upper_bound_usd` (None: price unknown), for up to
    `upper_bound_tokens` (None: its slot can't be read). `request_id` is the server's id for it, else the one we sent.
    """

    row: int
    n: int
    key: str
    upper_bound_usd: Decimal | None
    upper_bound_tokens: int | None
    cause: str
    invocation: int
    request_id: str | None = None


class ResultFile(msgspec.Struct, frozen=True):
    """A finished file of a result. `name`: its path in the run directory, with "/"; `digest`: BLAKE2b-128 in hex."""

    name: str
    rows: int
    size_bytes: int
    mtime_ns: int
    digest: str


class FinishedResult(msgspec.Struct, frozen=True):
    """The result of a complete run in any layout: local files that are whole and on disk.

    `files` hold the rows. `beside` describe them, and are published after them, in this order: `_manifest.json` of a
    folder, then usage.parquet. `folder`: the files are a set below this folder, which appears as a whole; "": one file.
    `kept`: the run's parts, which stay in its directory where the files don't hold all that they do; not published.
    """

    files: tuple[ResultFile, ...]
    beside: tuple[ResultFile, ...]
    folder: str = ""
    kept: tuple[ResultFile, ...] = ()

    @property
    def rows(self) -> int:
        """The rows of all files together."""
        return sum(file.rows for file in self.files)
