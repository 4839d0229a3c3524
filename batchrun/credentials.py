"""The API key: read from the environment or a file, sent as a header, and redacted from everything written.

Redaction is by value, because a server's error body or an exception may repeat the key: plain, URL-encoded, base64, or
escaped as JSON.
"""

import base64
import json
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import quote

from batchrun.errors import JobError
from batchrun.job.job import Endpoint

REDACTED = b"[redacted]"

MIN_SECRET_CHARS = 6
"""Shorter values would redact ordinary words; no real key is that short."""


class Credentials:
    """The headers that authenticate, and redaction of their secrets. Its repr shows nothing."""

    def __init__(self, headers: Mapping[str, str], secrets: frozenset[str], warning: str | None = None) -> None:
        self.headers = dict(headers)
        self.warning = warning
        forms = sorted({form for secret in secrets for form in _forms(secret)}, key=len, reverse=True)
        self._forms = tuple(forms)
        self._shortest_bytes = min(map(len, forms), default=0)

    def __repr__(self) -> str:
        return "Credentials(…)"

    def clean(self, raw: bytes) -> bytes:
        """`raw` with every form of every secret replaced."""
        if len(raw) < self._shortest_bytes:
            return raw
        for form in self._forms:  # a plain search per form: a tenth of a regular expression's cost
            if form in raw:
                raw = raw.replace(form, REDACTED)
        return raw

    def clean_text(self, text: str) -> str:
        """Redacts text."""
        return self.clean(text.encode("utf-8", "surrogatepass")).decode("utf-8", "surrogatepass")

    def cleaner(self) -> "Cleaner":
        """Redacts bytes that arrive in pieces."""
        return Cleaner(self, self._forms)


class Cleaner:
    """Redacts pieces with the same result as `Credentials.clean` on the whole: a key may span two pieces."""

    def __init__(self, credentials: Credentials, forms: tuple[bytes, ...]) -> None:
        self._credentials = credentials
        self._forms = forms
        self._held_bytes = max(map(len, forms), default=1) - 1  # a form that starts earlier is complete
        self._held = b""

    def feed(self, piece: bytes) -> bytes:
        """Returns what can be redacted with certainty; the last bytes wait for the next piece."""
        raw = self._held + piece
        cut = self._before_a_form(raw, max(0, len(raw) - self._held_bytes))
        self._held = raw[cut:]
        return self._credentials.clean(raw[:cut])

    def finish(self) -> bytes:
        """Returns the rest, redacted."""
        held, self._held = self._held, b""
        return self._credentials.clean(held)

    def _before_a_form(self, raw: bytes, cut: int) -> int:
        """The last position up to `cut` that is not inside a form."""
        while (start := self._start_of_form_across(raw, cut)) is not None:
            cut = start
        return cut

    def _start_of_form_across(self, raw: bytes, cut: int) -> int | None:
        for form in self._forms:
            start = raw.find(form, max(0, cut - len(form) + 1), cut + len(form) - 1)
            if start >= 0:
                return start
        return None


def read(endpoint: Endpoint, environ: Mapping[str, str]) -> Credentials:
    """Reads the credentials that the job names.

    Raises:
        JobError: the variable is not set, or the file can't be read, or others may write it.
    """
    headers: dict[str, str] = {}
    secrets: set[str] = set()
    warning = None
    for name, value in endpoint.headers.items():
        if value.startswith("env:"):
            value = _from_environ(f"endpoint.headers.{name}", value.removeprefix("env:"), environ)
            secrets.update((value, value.split()[-1]))  # "Bearer sk-…": a server may repeat the key without its scheme
        if not value.isprintable():
            raise JobError(f"endpoint.headers.{name}: contains characters that a header can't carry")
        headers[name] = value
    key = None
    if endpoint.api_key_env is not None:
        key = _from_environ("endpoint.api_key_env", endpoint.api_key_env, environ)
    elif endpoint.api_key_file is not None:
        key, warning = _from_file(Path(endpoint.api_key_file))
    if key is not None:
        if not key.isascii() or any(char.isspace() or not char.isprintable() for char in key):
            raise JobError("endpoint: the API key contains blanks or characters that a header can't carry")
        secrets.add(key)
        headers["Authorization"] = f"Bearer {key}"
    return Credentials(headers, frozenset(secrets), warning)


def _from_environ(setting: str, name: str, environ: Mapping[str, str]) -> str:
    value = environ.get(name, "").strip()
    if not value:
        raise JobError(f"{setting}: the environment variable {name} is not set; export {name}=… and run again")
    return value


def _from_file(path: Path) -> tuple[str, str | None]:
    """The key, and a warning if others may read the file. (Mounted secrets are commonly 0444.)"""
    try:
        mode = path.stat().st_mode
        key = path.read_text("utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"endpoint.api_key_file: can't read {path}: {error}") from error
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise JobError(f"endpoint.api_key_file: others may write {path}; chmod 600 {path}")
    if not key:
        raise JobError(f"endpoint.api_key_file: {path} is empty")
    return key, f"{path} can be read by everyone on this machine" if mode & stat.S_IROTH else None


def _forms(secret: str) -> Iterator[bytes]:
    """The secret as encoders of different languages write it."""
    if len(secret) < MIN_SECRET_CHARS:
        return
    raw = secret.encode()
    yield raw
    for unescaped in ("", "/", "!*'()", "!*'()/:@&=+$,;"):  # Python's, Java's, JavaScript's two
        quoted = quote(secret, safe=unescaped)
        yield quoted.encode()
        yield _PERCENT.sub(lambda escape: escape[0].lower(), quoted).encode()
    for escaped in ("", "/", "<>&", "<>&'", "<>&'/"):  # plain, PHP's, Go's, .NET's, templates'
        yield _json_escaped(secret, escaped)
    yield from _base64_forms(raw)


_PERCENT = re.compile("%[0-9A-F]{2}")


def _json_escaped(secret: str, escaped: str) -> bytes:
    """The secret inside a JSON string, from an encoder that also escapes these characters."""
    text = json.dumps(secret)[1:-1]
    for char in escaped:
        text = text.replace(char, "\\/" if char == "/" else f"\\u{ord(char):04x}")
    return text.encode()


def _base64_forms(raw: bytes) -> Iterator[bytes]:
    """The base64 digits that only the secret determines, at each of three alignments, in both alphabets."""
    for lead in range(3):
        padded = base64.b64encode(bytes(lead) + raw)
        first = (lead * 8 + 5) // 6
        whole_digits = (lead + len(raw)) * 8 // 6
        digits = padded[first:whole_digits]
        if len(digits) >= MIN_SECRET_CHARS:
            yield digits
            yield digits.replace(b"+", b"-").replace(b"/", b"_")
