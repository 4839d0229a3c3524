"""One exchange, in order: read, refuse or answer, write to the ledger, send."""

import asyncio
import contextlib
import hmac
import time
from collections.abc import Callable
from hashlib import blake2b
from typing import Any
from weakref import WeakKeyDictionary

import msgspec
from aiohttp import web

from batchrun.simulator import delivery, responses
from batchrun.simulator.answers import Answer, Usage, answer_to, latency_s, spoiled
from batchrun.simulator.config import SimulatorConfig
from batchrun.simulator.faults import SPOILING, Fault, FaultBook
from batchrun.simulator.ledger import Ledger, LedgerLine, question_of
from batchrun.simulator.limits import Limits
from batchrun.simulator.prompt_cache import PromptCache, prompt_of
from batchrun.simulator.refusal import Refused
from batchrun.simulator.render import DELTA_TOKENS, Envelope, completion, events
from batchrun.simulator.validate import Question, parse_body, parse_question

DEFAULT_MODEL = "vtrix-gpt-5.3-codex"
_RESPONSES = "/responses"
_MAX_BODY_BYTES = 64_000_000  # some images as data URLs; beyond it 413


class _Turn(msgspec.Struct, frozen=True):
    """The ordinal of an exchange, over all and on its connection, both from 1."""

    ordinal: int
    request_id: str
    arrived_s: float
    connection: int
    connection_request: int


class Simulator:
    """Serves `chat/completions` as docs/api.md describes it, within limits and with faults, and keeps the ledger."""

    def __init__(self, config: SimulatorConfig, ledger: Ledger) -> None:
        self._config = config
        self._ledger = ledger
        self._started_s = time.monotonic()
        self._run = f"{time.time_ns() // 1_000_000:x}"  # keeps request ids apart across restarts
        self._faults = FaultBook(config.faults, config.seed)
        self._limits = Limits(
            config.requests_per_minute,
            config.tokens_per_minute,
            headers=config.headers,
            now_s=self._started_s,
            changes=config.limit_changes,
        )
        self._cache = None if config.cache_life_s is None else PromptCache(config.cache_life_s, config.seed)
        self._working = 0
        self._queue = contextlib.nullcontext() if config.work_on is None else asyncio.Semaphore(config.work_on)
        self._exchanges = 0
        self._connections = 0
        self._requests_on: WeakKeyDictionary[asyncio.Transport, list[int]] = WeakKeyDictionary()

    async def respond(self, http: web.BaseRequest) -> web.StreamResponse:
        """Answers any request whose client is still connected. What was billed is in the ledger either way."""
        try:
            return await self._route(http)
        except ConnectionError:
            return web.Response()  # no one gets it: the connection is closed

    async def _route(self, http: web.BaseRequest) -> web.StreamResponse:
        """A completion, the list of models, the ledger's totals, or a 404 that names these."""
        if http.path.endswith(("/chat/completions", _RESPONSES)):
            if http.method == "POST":
                return await self._exchange(http)
            await http.content.read()
            return _refuse(Refused(405, f"{http.method} is not allowed here: use POST", code="method_not_allowed"))
        if http.method == "GET" and http.path == "/ledger":
            return delivery.answer(200, self._ledger.totals(), "application/json", ())
        if http.method == "GET" and http.path == "/v1/models":
            return delivery.answer(200, self._models(), "application/json", ())
        await http.content.read()
        served = "POST /v1/chat/completions, POST /v1/responses, GET /v1/models, GET /ledger"
        message = f"{http.method} {http.path} is not served: {served}"
        return _refuse(Refused(404, message, code="not_found"))

    async def _exchange(self, http: web.BaseRequest) -> web.StreamResponse:
        """One completion. Its line is in the ledger before the first byte of the answer leaves."""
        turn = self._take_turn(http)
        body, fields = b"", dict[str, Any]()
        try:
            body = await _read(http)
            self._check_headers(http)
            fields = parse_body(body)
            if http.path.endswith(_RESPONSES):
                fields = responses.as_chat(fields)
            question = parse_question(fields)
            reply = self._admitted_answer(question)
        except Refused as refused:
            digest = question_of(fields) if fields else blake2b(body, digest_size=16).digest()
            self._record(http, turn, digest, status=refused.status)
            return _refuse(refused, self._headers(turn))
        fault = self._faults.fault_for(
            question.digest,
            body,
            ordinal=turn.ordinal,
            age_s=time.monotonic() - self._started_s,
            service_tier=question.request.served_by,
            attempt_of_row=self._attempt_of_row(http),
        )
        answered = fault is None or fault.kind in SPOILING
        if answered or (fault is not None and fault.is_billed):
            reply = await self._work(question, reply)
        self._record_outcome(http, turn, question, reply.usage, fault)
        if fault is not None and not answered:
            return await delivery.replace(http, fault, self._headers(turn))
        sending = self._delivery(turn, question, reply, fault, as_response=http.path.endswith(_RESPONSES))
        if fault is not None and fault.kind == "cut":
            return await delivery.cut(http, sending, self._headers(turn))
        return await delivery.deliver(http, sending, self._headers(turn))

    async def _work(self, question: Question, reply: Answer) -> Answer:
        """Waits for a place in the queue, and then as long as the answer takes; its usage has the cache's hits."""
        self._working += 1
        try:
            async with self._queue:
                reply, keep = self._with_cache_hits(question, reply)
                await asyncio.sleep(self._latency_s(question))
                keep()
        finally:
            self._working -= 1
        return reply

    def _with_cache_hits(self, question: Question, reply: Answer) -> tuple[Answer, Callable[[], None]]:
        """The answer by the cache as it is now, and what puts its prompt there once it was processed."""
        if (cache := self._cache) is None:
            return reply, lambda: None
        prompt, now_s = prompt_of(question.request), time.monotonic()
        machine = cache.machine(prompt, now_s)
        cached = min(cache.look_up(prompt, machine, now_s), reply.usage.prompt_tokens)
        usage = msgspec.structs.replace(reply.usage, cached_tokens=cached)
        return msgspec.structs.replace(reply, usage=usage), lambda: cache.keep(prompt, machine, time.monotonic())

    def _attempt_of_row(self, http: web.BaseRequest) -> str | None:
        """The `row-attempt` of a request id `run-row-attempt`; None unless faults are drawn by it."""
        name = http.headers.get("X-Client-Request-Id", "") if self._config.draw_by_request_id else ""
        return "-".join(name.rsplit("-", 2)[1:]) or None

    def _take_turn(self, http: web.BaseRequest) -> _Turn:
        self._exchanges += 1
        if http.transport is None:
            raise ConnectionResetError("the client left at once")
        place = self._requests_on.get(http.transport)
        if place is None:
            self._connections += 1
            place = self._requests_on[http.transport] = [self._connections, 0]
        place[1] += 1
        return _Turn(self._exchanges, f"req_{self._run}_{self._exchanges}", time.time(), place[0], place[1])

    def _check_headers(self, http: web.BaseRequest) -> None:
        """Refuses a request without a valid key, or with another content type than JSON."""
        scheme, _, key = http.headers.get("Authorization", "").partition(" ")
        wanted = self._config.api_key
        if scheme.lower() != "bearer" or not key.strip():
            raise Refused(401, "You didn't provide an API key", code="invalid_api_key")
        if wanted is not None and not hmac.compare_digest(key.encode(errors="replace"), wanted.encode()):
            raise Refused(401, "Incorrect API key provided", code="invalid_api_key")
        if http.content_type != "application/json":
            raise Refused(415, "Content-Type must be application/json", code="unsupported_media_type")

    def _admitted_answer(self, question: Question) -> Answer:
        """The answer, counted against the limits."""
        request = question.request
        if self._config.models is not None and request.model not in self._config.models:
            message = f"The model {request.model!r} does not exist"
            raise Refused(404, message, code="model_not_found", param="model")
        reply = answer_to(question, self._config.seed)
        tokens = reply.usage.prompt_tokens + reply.usage.completion_tokens
        if self._config.refuse_above is not None and self._working >= self._config.refuse_above:
            raise Refused(429, "Too many requests at once", code="concurrency_limit_exceeded")
        self._limits.admit(tokens, time.monotonic())
        return reply

    def _delivery(
        self, turn: _Turn, question: Question, reply: Answer, fault: Fault | None, *, as_response: bool
    ) -> delivery.Delivery:
        request = question.request
        kind = None if fault is None else fault.kind
        wants_usage = not request.stream or request.stream_options.include_usage
        envelope = Envelope(
            id=f"{'resp_' if as_response else 'chatcmpl-'}{question.digest.hex()[:16]}-{turn.ordinal}",
            created=int(time.time()),
            model=request.model,
            with_usage=wants_usage and not self._config.omit_usage,
            service_tier=request.served_by,
        )
        if kind == "invalid_json" or kind == "unfit_json":
            reply = spoiled(reply, kind)
        if not request.stream:
            whole = responses.response(reply, envelope) if as_response else completion(reply, envelope)
            return delivery.Delivery("application/json", (whole,))
        pace = self._config.tokens_per_second
        pause_s = DELTA_TOKENS / pace if pace else 0.0
        stream = responses.events(reply, envelope) if as_response else events(reply, envelope)
        return delivery.Delivery("text/event-stream", stream, streamed=True, pause_s=pause_s)

    def _record_outcome(
        self, http: web.BaseRequest, turn: _Turn, question: Question, usage: Usage, fault: Fault | None
    ) -> None:
        if fault is None:
            self._record(http, turn, question.digest, status=200, usage=usage, tier=question.request.served_by)
            return
        status = fault.http_status if fault.sends_status else None
        billed = usage if fault.is_billed else None
        tier = question.request.served_by if billed is not None else None
        self._record(http, turn, question.digest, status=status, usage=billed, tier=tier, fault=fault.kind)

    def _record(
        self,
        http: web.BaseRequest,
        turn: _Turn,
        digest: bytes,
        *,
        status: int | None,
        usage: Usage | None = None,
        tier: str | None = None,
        fault: str | None = None,
    ) -> None:
        billed = usage or Usage()
        self._ledger.write(
            LedgerLine(
                ordinal=turn.ordinal,
                arrived_s=turn.arrived_s,
                time_s=time.time(),
                request_id=turn.request_id,
                client_request_id=http.headers.get("X-Client-Request-Id"),
                question=digest.hex(),
                status=status,
                fault=fault,
                service_tier=tier,
                billed=usage is not None,
                prompt_tokens=billed.prompt_tokens,
                cached_tokens=billed.cached_tokens,
                completion_tokens=billed.completion_tokens,
                reasoning_tokens=billed.reasoning_tokens,
                connection=turn.connection,
                connection_request=turn.connection_request,
            )
        )

    def _headers(self, turn: _Turn) -> delivery.Headers:
        return (("x-request-id", turn.request_id), *self._limits.headers(time.monotonic()))

    def _latency_s(self, question: Question) -> float:
        config = self._config
        median_s = config.latency_s
        if config.flex_latency_s is not None and question.request.served_by == "flex":
            median_s = config.flex_latency_s
        return latency_s(question, config.seed, median_s=median_s, sigma=config.latency_sigma)

    def _models(self) -> bytes:
        names = self._config.models or (DEFAULT_MODEL,)
        models = [{"id": name, "object": "model", "created": 0, "owned_by": "simulator"} for name in names]
        return msgspec.json.encode({"object": "list", "data": models})


async def _read(http: web.BaseRequest) -> bytes:
    """The whole body. One that is too large is read to its end all the same: a client reads the refusal only then.

    Raises:
        Refused: 413, it is too large; 400, it can't be decoded.
        ConnectionResetError: the client left before its end.
    """
    pieces: list[bytes] = []
    size = 0
    try:
        async for piece in http.content.iter_any():
            size += len(piece)
            if size <= _MAX_BODY_BYTES:
                pieces.append(piece)
    except web.RequestPayloadError as error:
        if http.transport is None:
            raise ConnectionResetError("the client left before the end of its body") from error
        raise Refused(400, "The body can't be decoded", code="invalid_body") from error
    if size > _MAX_BODY_BYTES:
        raise Refused(413, f"The body is larger than {_MAX_BODY_BYTES} bytes", code="request_too_large")
    return b"".join(pieces)


def _refuse(refused: Refused, headers: delivery.Headers = ()) -> web.Response:
    return delivery.answer(refused.status, refused.body(), "application/json", headers + refused.headers)
