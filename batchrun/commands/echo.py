"""What every command does with its results and its names."""

import sys
from pathlib import Path

import click

from batchrun import streams
from batchrun.terminal import harmless

OUT = click.argument("out", type=click.Path(path_type=Path))
PATHS = click.argument("paths", metavar="PATH...", nargs=-1, required=True, type=click.Path(path_type=Path))


def say(text: str, *, nl: bool = True) -> None:
    """A result, on stdout."""
    streams.write_result(text + "\n" * nl)


def write(content: bytes, target: Path | None, *, for_eyes: bool) -> None:
    """The content in the file, or on stdout: harmless where somebody looks at it."""
    from batchrun.errors import JobError

    if target is None:
        text = content.decode()
        say(harmless(text) if for_eyes or sys.stdout.isatty() else text, nl=False)
        return
    try:
        target.write_bytes(content)
    except OSError as error:
        raise JobError(f"-o {target}: can't be written: {error.strerror}") from error
