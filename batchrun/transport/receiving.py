"""Reads a response: bounded, decompressed, without the key; and makes an `Attempt` of it."""

import time

from aiohttp import StreamReader
from multidict import istr

from batchrun.credentials import Credentials
from batchrun.errors import APIConnectionError, APITimeoutError
from batchrun.job.settings import Endpoint
from batchrun.records import Attempt
from batchrun.response import encoding, packed
from batchrun.response.stream import Stream
from batchrun.transport.exchange import Exchange
from batchrun.transport.faults import translate
from batchrun.transport.keep_alive import Loss, kind_of

CONTENT_ENCODING, CONTENT_TYPE, REQUEST_ID = istr("Content-Encoding"), istr("Content-Type"), istr("x-request-id")
"""What is read of every response: as `istr` each is found in half the time (measured)."""


class Receiver:
    """Reads responses into exchanges, and turns ended exchanges into attempts."""

    def __init__(self, endpoint: Endpoint, credentials: Credentials) -> None:
        self._max_bytes = endpoint.max_answer_bytes
        self._names_attempts = endpoint.id_header is not None
        self.credentials = credentials

    async def receive(self, content: StreamReader, exchange: Exchange) -> APIConnectionError | None:
        """Reads the body into the exchange, a stream's up to its last event; returns the error if that failed.

        The exchange has `http_status` and `headers`. Raises what aiohttp raises if the body breaks off.
        """
        headers, status = exchange.headers, exchange.http_status or 0
        try:
            coding = headers.get(CONTENT_ENCODING)
            unpacker = None if coding is None else encoding.Unpacker(coding)
            # refusals are never streamed
            if 200 <= status < 300 and headers.get(CONTENT_TYPE, "").lower().startswith("text/event-stream"):
                exchange.stream = Stream(self.credentials.cleaner())
                error = await self._receive_stream(content, exchange, exchange.stream, unpacker)
            else:
                size, error = 0, None
                while error is None and not content.at_eof():
                    piece = _rest(content) if content.is_eof() else await _next(content)
                    if unpacker is None and not size and encoding.is_gzip(piece):
                        unpacker = encoding.Unpacker("")
                    if unpacker is not None:
                        piece = unpacker.unpack(piece, self._max_bytes - size + 1)
                    size += len(piece)
                    if size > self._max_bytes:
                        error = self._too_large()
                    else:
                        exchange.received.append(piece)
        except encoding.EncodingError as raised:
            if status >= 300:
                return None  # the status alone decides
            return APIConnectionError(str(raised), kind="bad_encoding", sent=True)
        if error is None and exchange.overdue is not None and not _is_delimited(exchange):
            return _timeout(exchange.overdue)  # the body ends with its connection, which we ended
        return error

    async def _receive_stream(
        self, content: StreamReader, exchange: Exchange, stream: Stream, unpacker: encoding.Unpacker | None
    ) -> APIConnectionError | None:
        """Reads up to the last event: some servers leave the connection open after it."""
        exchange.heard_at = time.monotonic()
        while not stream.done and not content.at_eof():
            piece = await _next(content)
            room = self._max_bytes - stream.size
            if unpacker is not None:
                piece = unpacker.unpack(piece, room + 1)
            stream.feed(piece[:room])
            if len(piece) > room:
                return self._too_large()
            exchange.heard_at = time.monotonic()
            if stream.has_token and exchange.first_token_at is None:
                exchange.first_token_at = exchange.heard_at
        return None

    def _too_large(self) -> APIConnectionError:
        message = f"the answer is larger than endpoint.max_answer_bytes ({self._max_bytes:,})"
        return APIConnectionError(message, kind="answer_too_large", sent=True)

    def failed(self, raised: Exception, exchange: Exchange, round_trip_s: float) -> APIConnectionError:
        """aiohttp's exception as ours: `faults.translate`, and `keep_alive.kind_of` for a lost connection."""
        if exchange.overdue is not None:
            return _timeout(exchange.overdue)
        error = translate(raised, sent=exchange.sent_at is not None)
        if error.kind == "reset" and exchange.http_status is None:
            loss, link = Loss(None, 0.0, round_trip_s, None, exchange.unsent), exchange.link
            if link is not None and exchange.sent_at is not None:
                after_s = time.monotonic() - exchange.sent_at
                loss = Loss(link.idle_s, after_s, round_trip_s, link.heard_bytes, exchange.unsent)
            kind = kind_of(loss)
            error = APIConnectionError(str(error), kind=kind, sent=kind != "stale_connection")
        error.args = (self.credentials.clean_text(str(error)),)
        return error

    def attempt(self, exchange: Exchange, client_request_id: str, error: APIConnectionError | None) -> Attempt:
        """The ended exchange as an attempt."""
        request_id = exchange.headers.get(REQUEST_ID)
        if request_id is not None:
            request_id = self.credentials.clean_text(request_id)
            if not request_id.isascii():  # aiohttp gives bytes that are no UTF-8 as lone surrogates (PEP 383)
                request_id = request_id.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        elif self._names_attempts and exchange.sent_at is not None:
            request_id = client_request_id  # the only id by which the vendor can find this exchange
        started, first_token_at, stream, received = (
            exchange.started,
            exchange.first_token_at,
            exchange.stream,
            exchange.received,
        )
        if stream is not None:
            body = stream.stored()
        else:
            body = packed.stored(self.credentials.clean(received[0] if len(received) == 1 else b"".join(received)))
        return Attempt(
            exchange.started_at,
            time.monotonic() - started,
            exchange.http_status,
            exchange.headers,
            body,
            error,
            None if first_token_at is None else first_token_at - started,
            request_id,
            stream is not None,
        )


def _rest(content: StreamReader) -> bytes:
    """All that is left of a body whose end has come, as of nearly all answers: nothing to wait for or to count."""
    buffer = content._buffer
    rest = buffer[0] if len(buffer) == 1 else b"".join(buffer)
    buffer.clear()
    return rest


async def _next(content: StreamReader) -> bytes:
    """The next bytes of a body; if it broke off, first what had arrived.

    aiohttp raises at once if the end of a connection arrives with its last bytes in the same event loop turn.
    """
    try:
        return await content.readany()
    except Exception:
        unread = _rest(content)
        if not unread:
            raise
        return unread


def _is_delimited(exchange: Exchange) -> bool:
    """True if the response marks the end of its body (RFC 9112, section 6.3), or its last event came."""
    if exchange.stream is not None and exchange.stream.done:
        return True
    return "Content-Length" in exchange.headers or "Transfer-Encoding" in exchange.headers


def _timeout(why: str) -> APITimeoutError:
    """The error of an exchange that we ended. The request was sent, so it may be billed."""
    return APITimeoutError(why, kind="timeout", sent=True)
