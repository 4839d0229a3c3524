"""The page as a picture, for mail: drawn by a headless Chromium on this machine, which it drives through two pipes.

(Chrome DevTools Protocol: messages are JSON objects that end with a zero byte, on the browser's descriptors 3 and 4.)
"""

import base64
import contextlib
import fcntl
import os
import select
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from batchrun.errors import JobError

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "chrome-headless-shell")

WIDTH = 1_112
"""CSS pixels: the page's column and its margins."""

_HIDDEN = "Math.max(0, ...Array.from(document.querySelectorAll('.scroll'), e => e.scrollWidth - e.clientWidth))"
"""The width of the widest table that is hidden without scrolling: a picture can't be scrolled."""

_WIDEN = "document.querySelector('main').style.maxWidth = 'none'"

MOST_PIXELS = 16_000
"""The browser draws no taller picture (its textures have 16,384)."""

TIMEOUT_S = 60.0  # a page takes seconds; a browser that hangs must not hang a night's report

# not `--screenshot`: it draws a window, and the page's height is not known before
_FLAGS = (
    *("--headless", "--remote-debugging-pipe", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
    *("--disable-background-networking", "--disable-extensions", "--hide-scrollbars"),
)


def browser(environ: Mapping[str, str]) -> str:
    """The browser's path: $CHROME, or the first of `NAMES` that is installed.

    Raises:
        JobError: there is none.
    """
    if named := environ.get("CHROME"):
        if (path := shutil.which(named)) is None:
            raise JobError(f"--png: $CHROME is {named}, which can't be run; name a Chromium or Chrome")
        return path
    if (path := next(filter(None, map(shutil.which, NAMES)), None)) is None:
        raise JobError("--png needs Chromium: apt-get install chromium (or name a Chrome in $CHROME)")
    return path


def png(page: bytes, path: str, width: int = WIDTH) -> bytes:
    """The whole page as PNG, at least `width` CSS pixels wide and wide enough for its tables. A CSS pixel is two pixels
    of the picture, or one if it would be too tall.

    Raises:
        JobError: the browser at `path` fails, or the page is too tall.
    """
    with tempfile.TemporaryDirectory(prefix="batchrun-", ignore_cleanup_errors=True) as folder:
        file = Path(folder, "bill.html")
        file.write_bytes(page)
        with _Browser.started(path, folder) as chromium:
            target = chromium.call("Target.createTarget", url="about:blank")["targetId"]
            session = chromium.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            size = {"height": 900, "deviceScaleFactor": 1, "mobile": False}
            chromium.call("Emulation.setDeviceMetricsOverride", session, width=width, **size)
            chromium.call("Page.enable", session)
            chromium.call("Page.navigate", session, url=file.as_uri())
            chromium.wait_for("Page.loadEventFired")
            if hidden := chromium.call("Runtime.evaluate", session, expression=_HIDDEN)["result"]["value"]:
                chromium.call("Runtime.evaluate", session, expression=_WIDEN)
                width += hidden
                chromium.call("Emulation.setDeviceMetricsOverride", session, width=width, **size)
            height = int(chromium.call("Page.getLayoutMetrics", session)["cssContentSize"]["height"])
            if height > MOST_PIXELS:
                raise JobError(
                    f"--png: the page is {height:,} pixels tall, more than a browser draws; use a coarser --by"
                )
            clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 2 if 2 * height <= MOST_PIXELS else 1}
            picture = chromium.call("Page.captureScreenshot", session, captureBeyondViewport=True, clip=clip)
            return base64.b64decode(picture["data"])


class _Browser:
    """A browser process. `call` sends a command and returns its result."""

    def __init__(self, path: str, reads: int, writes: int) -> None:
        self._path, self._reads, self._writes = path, reads, writes
        self._number = 0
        self._buffer = bytearray()
        self._events: set[str] = set()
        self._end_s = time.monotonic() + TIMEOUT_S

    @classmethod
    @contextlib.contextmanager
    def started(cls, path: str, folder: str) -> "Iterator[_Browser]":
        """The browser runs until the block ends; its profile is in `folder`."""
        ours = [os.pipe(), os.pipe()]
        theirs = [
            fcntl.fcntl(ours[0][0], fcntl.F_DUPFD_CLOEXEC, 10),
            fcntl.fcntl(ours[1][1], fcntl.F_DUPFD_CLOEXEC, 10),
        ]
        flags = [*_FLAGS, f"--user-data-dir={folder}/profile"]
        if os.geteuid() == 0:
            flags.append("--no-sandbox")  # Chromium refuses to start as root with it; the page runs no script
        actions: list[tuple[Any, ...]] = [
            (os.POSIX_SPAWN_DUP2, theirs[0], 3),
            (os.POSIX_SPAWN_DUP2, theirs[1], 4),
            *((os.POSIX_SPAWN_OPEN, place, os.devnull, os.O_RDWR, 0) for place in (0, 1, 2)),
        ]
        try:
            process = os.posix_spawn(path, [path, *flags], os.environ, file_actions=actions, setpgroup=0)
        except OSError as error:
            raise JobError(f"--png: {path} can't be started: {error.strerror}") from error
        for descriptor in (*theirs, ours[0][0], ours[1][1]):
            os.close(descriptor)
        try:
            yield cls(path, ours[1][0], ours[0][1])
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process, signal.SIGKILL)  # it has nothing to keep
            os.waitpid(process, 0)
            os.close(ours[1][0])
            os.close(ours[0][1])

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """The result of a command.

        Raises:
            JobError: the browser refuses it, ends, or does not answer in time.
        """
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        try:
            os.write(self._writes, msgspec.json.encode(message) + b"\0")
        except BrokenPipeError as error:
            raise JobError(f"--png: the browser ended before it drew the page: {self._path}") from error
        while (answer := self._next()).get("id") != self._number:
            pass
        if "error" in answer:
            raise JobError(f"--png: the browser refuses {method}: {answer['error'].get('message')}")
        result: dict[str, Any] = answer["result"]
        return result

    def wait_for(self, event: str) -> None:
        """Returns once the event has arrived."""
        while event not in self._events:
            self._next()

    def _next(self) -> dict[str, Any]:
        while (end := self._buffer.find(b"\0")) < 0:
            ready, _, _ = select.select([self._reads], [], [], max(0.0, self._end_s - time.monotonic()))
            if not ready:
                raise JobError(f"--png: the browser did not draw the page within {TIMEOUT_S:.0f} s")
            if not (more := os.read(self._reads, 1 << 16)):
                raise JobError(f"--png: the browser ended before it drew the page: {self._path}")
            self._buffer += more
        message: dict[str, Any] = msgspec.json.decode(bytes(self._buffer[:end]))
        del self._buffer[: end + 1]
        self._events.add(message.get("method", ""))
        return message
