"""`run.log`: the run's events as JSON lines. Never one per row; rotated at 50 MB, one old file kept."""

import contextlib
import logging
import logging.handlers
import os
from datetime import UTC, datetime
from pathlib import Path

import msgspec

MAX_BYTES = 50_000_000  # the file before it is kept, too: 100 MB of disk at most


class _LossyHandler(logging.handlers.RotatingFileHandler):
    """Drops a line that the disk refuses, in silence: the log must never cost an answer, nor print a traceback."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


class RunLog:
    """An open log. Close it."""

    def __init__(self, path: Path) -> None:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
        self._handler = _LossyHandler(path, maxBytes=MAX_BYTES, backupCount=1, encoding="utf-8")
        self._handler.setFormatter(logging.Formatter("%(message)s"))

    def write(self, event: str, **fields: object) -> None:
        """Appends one line: the time, the event and its fields."""
        line = msgspec.json.encode({"at": datetime.now(UTC), "event": event, **fields}, enc_hook=str).decode()
        self._handler.emit(logging.LogRecord("batchrun", logging.INFO, "", 0, line, None, None))

    def close(self) -> None:
        with contextlib.suppress(OSError):  # close() writes again what the disk has refused
            self._handler.close()
