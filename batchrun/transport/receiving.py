"""An answer as it arrives on either wire: bounded, unpacked, without the key; and the attempt that it makes."""

import time

from aiohttp import StreamReader

from batchrun.credentials import Credentials
from batchrun.errors import APIConnectionError, APITimeoutError
from batchrun.job.job import Endpoint
from batchrun.records import Attempt
from batchrun.response import encoding, packed
from batchrun.response.stream import Stream
from batchrun.transport.exchange import Exchange
from batchrun.transport.faults import translate
from batchrun.transport.keep_alive import Loss, kind_of


class Receiver:
    """Reads answers into exchanges, and makes attempts of exchanges that have ended."""

    def __init__(self, endpoint: Endpoint, credentials: Credentials) -> None:
        self._max_bytes = endpoint.max_answer_bytes
        self._names_attempts = endpoint.id_header is not None
        self._credentials = credentials

    async def receive(self, content: StreamReader, exchange: Exchange) -> APIConnectionError | None:
        """The body is in the exchange, a stream's up to its last event; or why it is not.

        `http_status` and `headers` of the exchange are known. Raises what aiohttp raises where the body breaks off.
        """
        try:
            coding = exchange.headers.get("Content-Encoding")
            unpacker = None if coding is None else encoding.Unpacker(coding)
            if _is_stream(exchange):
                exchange.stream = Stream(self._credentials.cleaner())
                error = await self._receive_stream(content, exchange, exchange.stream, unpacker)
            else:
                error = await self._receive_whole(content, exchange, unpacker)
        except encoding.EncodingError as raised:
            if exchange.http_status is not None and exchange.http_status >= 300:
                return None  # its status says what it is
            return APIConnectionError(str(raised), kind="bad_encoding", sent=True)
        if error is None and exchange.overdue is not None and not _is_delimited(exchange):
            return _timeout(exchange.overdue)  # a body that ends with its connection ended with ours
        return error

    async def _receive_whole(
        self, content: StreamReader, exchange: Exchange, unpacker: encoding.Unpacker | None
    ) -> APIConnectionError | None:
        size = 0
        while not content.at_eof():
            piece = await _next(content)
            if unpacker is None and not size and encoding.is_gzip(piece):
                unpacker = encoding.Unpacker("")
            if unpacker is not None:
                piece = unpacker.unpack(piece, self._max_bytes - size + 1)
            size += len(piece)
            if size > self._max_bytes:
                return self._too_large()
            exchange.received.append(piece)
        return None

    async def _receive_stream(
        self, content: StreamReader, exchange: Exchange, stream: Stream, unpacker: encoding.Unpacker | None
    ) -> APIConnectionError | None:
        """Reads up to the last event: some servers leave the connection open behind it."""
        exchange.heard_at = time.monotonic()
        while not stream.done and not content.at_eof():
            piece = await _next(content)
            room = self._max_bytes - stream.size
            if unpacker is not None:
                piece = unpacker.unpack(piece, room + 1)
            stream.take(piece[:room])
            if len(piece) > room:
                return self._too_large()
            exchange.heard_at = time.monotonic()
            if stream.speaks and exchange.first_token_at is None:
                exchange.first_token_at = exchange.heard_at
        return None

    def _too_large(self) -> APIConnectionError:
        message = f"the answer is larger than endpoint.max_answer_bytes ({self._max_bytes:,})"
        return APIConnectionError(message, kind="answer_too_large", sent=True)

    def failed(self, raised: Exception, exchange: Exchange, round_trip_s: float) -> APIConnectionError:
        """What aiohttp raised, as our error: `faults.translate`, and for a lost connection `keep_alive.kind_of`."""
        if exchange.overdue is not None:
            return _timeout(exchange.overdue)
        error = translate(raised, sent=exchange.sent_at is not None)
        if error.kind == "reset" and exchange.http_status is None:
            kind = kind_of(_loss(exchange, round_trip_s))
            error = APIConnectionError(str(error), kind=kind, sent=kind != "stale_connection")
        error.args = (self._credentials.clean_text(str(error)),)
        return error

    def attempt(self, exchange: Exchange, client_request_id: str, error: APIConnectionError | None) -> Attempt:
        """The exchange as it ended."""
        request_id = exchange.headers.get("x-request-id")
        if request_id is not None:
            request_id = self._credentials.clean_text(request_id)
        elif self._names_attempts and exchange.sent_at is not None:
            request_id = client_request_id  # the one name by which the vendor can look for this exchange
        first_token_at = exchange.first_token_at
        return Attempt(
            started_at=exchange.started_at,
            latency_s=time.monotonic() - exchange.started,
            http_status=exchange.http_status,
            headers=exchange.headers,
            body=self._stored(exchange),
            error=error,
            time_to_first_token_s=None if first_token_at is None else first_token_at - exchange.started,
            request_id=request_id,
            streamed=exchange.stream is not None,
        )

    def _stored(self, exchange: Exchange) -> bytes:
        """What came, as it is stored: without the key, a stream packed."""
        if exchange.stream is not None:
            return exchange.stream.stored()
        received = exchange.received
        return packed.stored(self._credentials.clean(received[0] if len(received) == 1 else b"".join(received)))


async def _next(content: StreamReader) -> bytes:
    """The next bytes of a body; where it broke off, first what had come of it until then.

    aiohttp raises at once when the end of a connection has come with its last bytes, in one turn of the event loop.
    """
    try:
        return await content.readany()
    except Exception:
        unread = b"".join(content._buffer)
        content._buffer.clear()
        if not unread:
            raise
        return unread


def _is_stream(exchange: Exchange) -> bool:
    """True for an answer that comes as server-sent events; what refuses a request comes whole."""
    status = exchange.http_status
    if status is None or not 200 <= status < 300:
        return False
    return exchange.headers.get("Content-Type", "").lower().startswith("text/event-stream")


def _is_delimited(exchange: Exchange) -> bool:
    """True where the answer itself says where its body ends (RFC 9112, section 6.3), or where its last event came."""
    if exchange.stream is not None and exchange.stream.done:
        return True
    return "Content-Length" in exchange.headers or "Transfer-Encoding" in exchange.headers


def _timeout(why: str) -> APITimeoutError:
    return APITimeoutError(why, kind="timeout", sent=True)


def _loss(exchange: Exchange, round_trip_s: float) -> Loss:
    """How the exchange stood when its connection ended, which is now."""
    link, sent_at = exchange.link, exchange.sent_at
    if link is None or sent_at is None:
        return Loss(None, 0.0, round_trip_s, None, exchange.unsent)
    return Loss(link.idle_s, time.monotonic() - sent_at, round_trip_s, link.heard_bytes, exchange.unsent)
