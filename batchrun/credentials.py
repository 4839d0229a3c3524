"""The API key: read from the environment or a file, sent as a header, and redacted from everything written.

Redaction is by value, because a server's error body or an exception may repeat the key: plain, URL-encoded, base64, or
escaped as JSON.
"""

import base64
import contextlib
import json
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from batchrun.errors import JobError
from batchrun.job.settings import Endpoint

REDACTED = b"[redacted]"

MIN_SECRET_CHARS = 6
"""Shorter values would redact ordinary words; no real key is that short."""


class Redaction:
    """Replaces every form of every known secret. Secrets are added as keys are rotated, and never removed."""

    def __init__(self, secrets: Iterable[str]) -> None:
        self._secrets: set[str] = set()
        self.forms: tuple[bytes, ...] = ()
        self.shortest_bytes = 0
        self.add(secrets)

    def add(self, secrets: Iterable[str]) -> None:
        """These are redacted from now on, too."""
        self._secrets.update(secrets)
        forms = {form for secret in self._secrets for form in _forms(secret)}
        self.forms = tuple(sorted(forms, key=len, reverse=True))
        self.shortest_bytes = min(map(len, forms), default=0)

    def clean(self, raw: bytes) -> bytes:
        """`raw` with every form of every secret replaced."""
        if len(raw) < self.shortest_bytes:
            return raw
        for form in self.forms:  # a plain search per form: a tenth of a regular expression's cost
            if raw.find(form) >= 0:  # a third of the cost of `in`, which raises and catches a TypeError inside
                raw = raw.replace(form, REDACTED)
        return raw


class KeyFile:
    """A file that holds the key, and may be replaced while a run works."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen: tuple[int, int, int] | None = None

    def read(self) -> tuple[str, str | None]:
        """The key, and a warning if others may read the file. (Mounted secrets are commonly 0444.)

        Raises:
            JobError: it can't be read, is empty, or others may write it.
        """
        path = self.path
        try:
            found = path.stat()
            key = path.read_text("utf-8-sig").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise JobError(f"endpoint.api_key_file: can't read {path}: {error}") from error
        if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise JobError(f"endpoint.api_key_file: others may write {path}; chmod 600 {path}")
        if not key:
            raise JobError(f"endpoint.api_key_file: {path} is empty")
        self._seen = found.st_ino, found.st_mtime_ns, found.st_size
        return key, f"{path} can be read by everyone on this machine" if found.st_mode & stat.S_IROTH else None

    def read_if_changed(self) -> str | None:
        """The key, if the file was replaced since `read`. A missing or invalid file is tried again later."""
        with contextlib.suppress(OSError, JobError):
            found = self.path.stat()
            if (found.st_ino, found.st_mtime_ns, found.st_size) != self._seen:
                return self.read()[0]
        return None


class Credentials:
    """The headers that authenticate at one endpoint, and redaction of the job's secrets. Its repr shows nothing.

    `version` counts the replacements of the key.
    """

    def __init__(
        self,
        headers: Mapping[str, str],
        secrets: Iterable[str],
        warning: str | None = None,
        key_file: KeyFile | None = None,
    ) -> None:
        self.headers = dict(headers)
        self.warning = warning
        self.version = 0
        self.members: tuple[Credentials, ...] = (self,)  # of every endpoint of the job, this one first
        self._key_file = key_file
        self._redaction = Redaction(secrets)

    def __repr__(self) -> str:
        return "Credentials(…)"

    def join(self, others: "Iterable[Credentials]") -> None:
        """These belong to the other endpoints of the job: each redacts the secrets of all."""
        self.members = (self, *others)
        for other in others:
            self._redaction.add(other._redaction._secrets)
            other._redaction = self._redaction

    def refresh(self) -> bool:
        """Reads the key file again if it was replaced; True if it holds another key, which is sent from now on."""
        key = None if self._key_file is None else self._key_file.read_if_changed()
        if key is None or not _is_sendable(key) or self.headers.get("Authorization") == f"Bearer {key}":
            return False
        self._redaction.add((key,))
        self.headers["Authorization"] = f"Bearer {key}"
        self.version += 1
        return True

    def update(self, newer: "Credentials") -> None:
        """Takes over the keys of these credentials of the same endpoints, which another process has refreshed."""
        for mine, theirs in zip(self.members, newer.members, strict=True):
            mine._redaction.add(theirs._redaction._secrets)
            if mine.version < theirs.version:
                mine.headers.update(theirs.headers)
                mine.version = theirs.version

    def clean(self, raw: bytes) -> bytes:
        """`raw` with every form of every secret replaced."""
        return self._redaction.clean(raw)

    def clean_text(self, text: str) -> str:
        """The same for text, which may hold lone surrogates."""
        if len(text) < self._redaction.shortest_bytes and text.isascii():
            return text
        return self.clean(text.encode("utf-8", "surrogatepass")).decode("utf-8", "surrogatepass")

    def cleaner(self) -> "Cleaner":
        """Redacts bytes that arrive in pieces."""
        return Cleaner(self, self._redaction.forms)


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
        cut = max(0, len(raw) - self._held_bytes)
        while (start := self._start_of_form_across(raw, cut)) is not None:
            cut = start
        self._held = raw[cut:]
        return self._credentials.clean(raw[:cut])

    def finish(self) -> bytes:
        """Returns the rest, redacted."""
        held, self._held = self._held, b""
        return self._credentials.clean(held)

    def _start_of_form_across(self, raw: bytes, cut: int) -> int | None:
        """Where a form begins that lies on both sides of the cut; None if there is none."""
        for form in self._forms:
            start = raw.find(form, max(0, cut - len(form) + 1), cut + len(form) - 1)
            if start >= 0:
                return start
        return None


def read_all(endpoints: Sequence[Endpoint], environ: Mapping[str, str]) -> Credentials:
    """The credentials of the first endpoint, whose `members` are those of all.

    Raises:
        JobError: see `read`; with several endpoints, the message names the one.
    """
    members = []
    for place, endpoint in enumerate(endpoints):
        try:
            members.append(read(endpoint, environ))
        except JobError as error:
            if len(endpoints) == 1:
                raise
            raise JobError(f"endpoint[{place}]{str(error).removeprefix('endpoint')}") from error
    first, *others = members
    first.join(others)
    first.warning = next((each.warning for each in members if each.warning is not None), None)
    return first


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
    key = key_file = None
    if endpoint.api_key_env is not None:
        key = _from_environ("endpoint.api_key_env", endpoint.api_key_env, environ)
    elif endpoint.api_key_file is not None:
        key_file = KeyFile(Path(endpoint.api_key_file))
        key, warning = key_file.read()
    if key is not None:
        if not _is_sendable(key):
            raise JobError("endpoint: the API key contains blanks or characters that a header can't carry")
        secrets.add(key)
        headers["Authorization"] = f"Bearer {key}"
    return Credentials(headers, secrets, warning, key_file)


def _from_environ(setting: str, name: str, environ: Mapping[str, str]) -> str:
    value = environ.get(name, "").strip()
    if not value:
        raise JobError(f"{setting}: the environment variable {name} is not set; export {name}=… and run again")
    return value


def _is_sendable(key: str) -> bool:
    return key.isascii() and not any(char.isspace() or not char.isprintable() for char in key)


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
        text = json.dumps(secret)[1:-1]
        for char in escaped:
            text = text.replace(char, "\\/" if char == "/" else f"\\u{ord(char):04x}")
        yield text.encode()
    # the base64 digits that only the secret determines, at each of three alignments, in both alphabets
    for lead in range(3):
        padded = base64.b64encode(bytes(lead) + raw)
        first = (lead * 8 + 5) // 6
        whole_digits = (lead + len(raw)) * 8 // 6
        digits = padded[first:whole_digits]
        if len(digits) >= MIN_SECRET_CHARS:
            yield digits
            yield digits.replace(b"+", b"-").replace(b"/", b"_")


_PERCENT = re.compile("%[0-9A-F]{2}")
