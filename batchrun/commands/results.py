"""Writes the results of commands to stdout or a file."""

import contextlib
import sys
from pathlib import Path

from batchrun import streams
from batchrun.commands.remote import as_named
from batchrun.errors import harmless


def say(line: str) -> None:
    """Writes a line for people to stdout. Text of a model in it can't steer the terminal."""
    put(harmless(line) + "\n")


def put(text: str) -> None:
    """Writes exactly this text to stdout, except that files which were fetched have their URLs."""
    streams.write_result(as_named(text))


def as_json(value: object) -> str:
    """The value as indented JSON, with a newline at its end: amounts are strings, times are UTC."""
    import msgspec

    return msgspec.json.format(msgspec.json.encode(value), indent=2).decode() + "\n"


def write(content: bytes, target: Path | None, *, for_people: bool) -> None:
    """Writes the content to the file, whole or not at all; without one, to stdout, harmless where people read it."""
    from batchrun.errors import JobError

    if target is None:
        text = content.decode()
        put(harmless(text) if for_people or sys.stdout.isatty() else text)
        return
    temporary = target.with_name(target.name + ".tmp")
    special = target.exists() and not target.is_file()  # /dev/stdout, a named pipe: written in place
    try:
        if special:
            target.write_bytes(content)
            return
        temporary.write_bytes(content)
        temporary.rename(target)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise JobError(f"{target}: can't be written: {error.strerror}") from error
