"""Where the results of commands go: stdout, or a file."""

import sys
from pathlib import Path

from batchrun import streams
from batchrun.terminal import harmless


def say(text: str, *, nl: bool = True) -> None:
    """Writes a result to stdout."""
    streams.write_result(text + "\n" * nl)


def write(content: bytes, target: Path | None, *, for_people: bool) -> None:
    """Writes the content to the file, whole or not at all; without one, to stdout, harmless where people read it."""
    from batchrun.errors import JobError

    if target is None:
        text = content.decode()
        say(harmless(text) if for_people or sys.stdout.isatty() else text, nl=False)
        return
    try:
        target.write_bytes(content)
    except OSError as error:
        raise JobError(f"-o {target}: can't be written: {error.strerror}") from error
