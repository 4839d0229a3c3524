"""Translates aiohttp's exceptions into ours."""

import asyncio
import errno
import ssl

import aiohttp
from aiohttp.http_exceptions import HttpProcessingError

from batchrun.errors import APIConnectionError, APITimeoutError

_KINDS: tuple[tuple[tuple[type[Exception], ...], str, bool], ...] = (
    ((aiohttp.ClientConnectorDNSError,), "dns", False),
    (
        (aiohttp.ClientConnectorCertificateError, aiohttp.ServerFingerprintMismatch, ssl.SSLCertVerificationError),
        "certificate",
        False,
    ),
    ((aiohttp.ClientConnectorSSLError,), "tls", False),
    ((aiohttp.ClientProxyConnectionError, aiohttp.ClientConnectorError), "connect", False),
    ((aiohttp.ConnectionTimeoutError,), "connect", True),
    ((aiohttp.ServerTimeoutError, asyncio.TimeoutError), "timeout", True),
    ((aiohttp.ServerDisconnectedError, aiohttp.ClientConnectionResetError, ConnectionError), "reset", False),
    ((aiohttp.ClientPayloadError,), "cut", False),
    ((aiohttp.ClientHttpProxyError,), "connect", False),
    ((aiohttp.InvalidURL, aiohttp.TooManyRedirects), "malformed_http", False),
    ((aiohttp.ClientResponseError, HttpProcessingError), "malformed_http", False),
    ((aiohttp.ClientOSError, OSError, aiohttp.ClientConnectionError), "reset", False),
)
"""First match wins; (types, kind, is a timeout)."""

_BEFORE_SENDING = frozenset({"dns", "refused", "connect", "tls"})
"""Kinds for which the policy assumes that nothing was sent."""


def translate(raised: Exception, *, sent: bool) -> APIConnectionError:
    """aiohttp's exception as ours. `sent`: a connection was established, so the request may have left.

    An unknown one counts as a transfer that broke after sending, because the request may have been billed.
    """
    message = f"{type(raised).__name__}: {_words(raised)}"[:1000]
    for types, kind, timeout in _KINDS:
        if isinstance(raised, types):
            if kind == "reset" and not sent:
                kind = "connect"
            if sent and kind in _BEFORE_SENDING:
                kind = "reset"  # on an established connection the request may have been billed
            if isinstance(raised, aiohttp.ClientConnectorError) and kind == "connect":
                if isinstance(raised.os_error, ssl.SSLCertVerificationError):
                    kind = "certificate"
                elif raised.os_error.errno == errno.ECONNREFUSED:
                    kind = "refused"
            error_type = APITimeoutError if timeout else APIConnectionError
            return error_type(message, kind=kind, sent=sent)
    return APIConnectionError(message, kind="reset" if sent else "connect", sent=sent)


def _words(raised: Exception) -> str:
    """The exception's words in one line: aiohttp shows bad bytes over several, under a status that no server sent."""
    is_parsers = isinstance(raised, HttpProcessingError) or type(raised) is aiohttp.ClientResponseError
    words = getattr(raised, "message", "") if is_parsers else ""
    return " ".join((words or str(raised)).split())
