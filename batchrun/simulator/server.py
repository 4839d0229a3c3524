"""One exchange, in order: read, refuse or answer, write to the ledger, send."""

import asyncio
import contextlib
import hmac
import time
from hashlib import blake2b
from typing import Any
from weakref import WeakKeyDictionary

import msgspec
from aiohttp import web

from batchrun.simulator import delivery, responses
from batchrun.simulator.answers import Answer, Usage, answer_to, latency_s, spoiled
from batchrun.simulator.config import SimulatorConfig
from batchrun.simulator.faults import SPOILING, FaultBook
from batchrun.simulator.ledger import LedgerLine, RequestLedger, question_of
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
    client_request_id: str | None
    arrived_s: float
    connection: int
    connection_request: int


class Simulator:
    """Serves `chat/completions` as docs/api.md describes it, within limits and with faults, and keeps the ledger."""

    def __init__(self, config: SimulatorConfig, ledger: RequestLedger) -> None:
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
            if http.path.endswith(("/chat/completions", _RESPONSES)) and http.method == "POST":
                return await self._exchange(http)
            if http.method == "GET" and http.path == "/ledger":
                return delivery.answer(200, self._ledger.totals(), "application/json", ())
            if http.method == "GET" and http.path == "/v1/models":
                names = self._config.models or (DEFAULT_MODEL,)
                models = [{"id": name, "object": "model", "created": 0, "owned_by": "simulator"} for name in names]
                listed = msgspec.json.encode({"object": "list", "data": models})
                return delivery.answer(200, listed, "application/json", ())
            await http.content.read()
            if http.path.endswith(("/chat/completions", _RESPONSES)):
                return _refuse(Refused(405, f"{http.method} is not allowed here: use POST", code="method_not_allowed"))
            served = "POST /v1/chat/completions, POST /v1/responses, GET /v1/models, GET /ledger"
            return _refuse(Refused(404, f"{http.method} {http.path} is not served: {served}", code="not_found"))
        except ConnectionError:
            return web.Response()  # no one gets it: the connection is closed

    async def _exchange(self, http: web.BaseRequest) -> web.StreamResponse:
        """One completion. Its line is in the ledger before the first byte of the answer leaves."""
        turn = self._take_turn(http)
        as_response = http.path.endswith(_RESPONSES)
        body, fields = b"", dict[str, Any]()
        try:
            body = await _read(http)
            self._check_headers(http)
            fields = parse_body(body)
            if as_response:
                fields = responses.as_chat(fields)
            question = parse_question(fields)
            reply = self._admitted_answer(question)
        except Refused as refused:
            digest = question_of(fields) if fields else blake2b(body, digest_size=16).digest()
            self._record(turn, digest, refused.status)
            return _refuse(refused, self._headers(turn))

        # With `draw_by_request_id` the `row-attempt` of a request id `run-row-attempt` decides.
        row_attempt = (turn.client_request_id or "").rsplit("-", 2)[1:] if self._config.draw_by_request_id else []
        tier = question.request.served_by
        fault = self._faults.fault_for(
            question.digest,
            body,
            ordinal=turn.ordinal,
            age_s=time.monotonic() - self._started_s,
            service_tier=tier,
            attempt_of_row="-".join(row_attempt) or None,
        )

        is_billed = fault is None or fault.is_billed
        if is_billed or (fault is not None and fault.kind in SPOILING):
            reply = await self._work(question, reply)
        self._record(
            turn,
            question.digest,
            200 if fault is None else fault.http_status,
            usage=reply.usage if is_billed else None,
            tier=tier if is_billed else None,
            fault=None if fault is None else fault.kind,
        )

        if fault is not None and fault.kind not in SPOILING:
            return await delivery.replace(http, fault, self._headers(turn))
        if fault is not None and fault.kind in ("invalid_json", "unfit_json"):
            reply = spoiled(reply, fault.kind)
        sending = self._delivery(turn, question, reply, as_response=as_response)
        deliver = delivery.cut if fault is not None and fault.kind == "cut" else delivery.deliver
        return await deliver(http, sending, self._headers(turn))

    async def _work(self, question: Question, reply: Answer) -> Answer:
        """Waits for a place in the queue, and then as long as the answer takes; its usage has the cache's hits."""
        config = self._config
        slower = config.flex_latency_s if question.request.served_by == "flex" else None
        median_s = config.latency_s if slower is None else slower
        takes_s = latency_s(question, config.seed, median_s=median_s, sigma=config.latency_sigma)
        self._working += 1
        try:
            async with self._queue:
                if self._cache is None:
                    await asyncio.sleep(takes_s)
                    return reply
                prompt, now_s = prompt_of(question.request), time.monotonic()
                machine = self._cache.machine(prompt, now_s)
                cached = min(self._cache.look_up(prompt, machine, now_s), reply.usage.prompt_tokens)
                await asyncio.sleep(takes_s)
                # only now: requests that are sent together don't find each other's prefix
                self._cache.keep(prompt, machine, time.monotonic())
                return msgspec.structs.replace(reply, usage=msgspec.structs.replace(reply.usage, cached_tokens=cached))
        finally:
            self._working -= 1

    def _take_turn(self, http: web.BaseRequest) -> _Turn:
        self._exchanges += 1
        if http.transport is None:
            raise ConnectionResetError("the client left at once")
        place = self._requests_on.get(http.transport)
        if place is None:
            self._connections += 1
            place = self._requests_on[http.transport] = [self._connections, 0]
        place[1] += 1
        return _Turn(
            ordinal=self._exchanges,
            request_id=f"req_{self._run}_{self._exchanges}",
            client_request_id=http.headers.get("X-Client-Request-Id"),
            arrived_s=time.time(),
            connection=place[0],
            connection_request=place[1],
        )

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

    def _delivery(self, turn: _Turn, question: Question, reply: Answer, *, as_response: bool) -> delivery.Delivery:
        request = question.request
        envelope = Envelope(
            id=f"{'resp_' if as_response else 'chatcmpl-'}{question.digest.hex()[:16]}-{turn.ordinal}",
            created=int(time.time()),
            model=request.model,
            with_usage=not request.stream or request.stream_options.include_usage,
            service_tier=request.served_by,
        )
        if not request.stream:
            whole = responses.response(reply, envelope) if as_response else completion(reply, envelope)
            return delivery.Delivery("application/json", (whole,))
        pace = self._config.tokens_per_second
        pause_s = DELTA_TOKENS / pace if pace else 0.0
        stream = responses.events(reply, envelope) if as_response else events(reply, envelope)
        return delivery.Delivery("text/event-stream", stream, streamed=True, pause_s=pause_s)

    def _record(
        self,
        turn: _Turn,
        digest: bytes,
        status: int | None,
        usage: Usage | None = None,
        tier: str | None = None,
        fault: str | None = None,
    ) -> None:
        """The exchange is in the ledger. `usage` and `tier`: what is billed; None: nothing."""
        billed = usage or Usage()
        self._ledger.write(
            LedgerLine(
                **msgspec.structs.asdict(turn),
                time_s=time.time(),
                question=digest.hex(),
                status=status,
                fault=fault,
                service_tier=tier,
                billed=usage is not None,
                **msgspec.structs.asdict(billed),
            )
        )

    def _headers(self, turn: _Turn) -> delivery.Headers:
        return (("x-request-id", turn.request_id), *self._limits.headers(time.monotonic()))


async def _read(http: web.BaseRequest) -> bytes:
    """The whole body. A body that is too large is also read to its end: only then does the client read the refusal.

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
