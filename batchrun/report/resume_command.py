"""The command line that resumes a run, made from the one that started it. PURE."""

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

_FLAGS = {
    "input_path": "-i",
    "reuse": "--reuse",
    "shard": "--shard",
    "max_cost_usd": "--max-cost",
    "max_failures": "--max-failures",
    "skip_invalid": "--skip-invalid",
    "retry_failed": "--retry-failed",
    "statuses": "--status",
    "engine": "--engine",
    "ray_address": "--ray-address",
    "overrides": "--set",
}
"""The options of `batchrun run` that a resume needs, too. Not those that choose the run (--date, --new, -o: the
directory is named instead), nor those for one start only (--deadline, --limit, --grace, --accept-changes)."""


def command(options: Mapping[str, object]) -> str:
    """`batchrun run JOB …` with the options of a start, by their names in `commands.run`. `in_directory` adds -o."""
    words = ["batchrun", "run", str(options["job"])]
    for name, flag in _FLAGS.items():
        match value := options.get(name):
            case None | False | ():
                pass
            case True:
                words.append(flag)
            case str() | int():
                words += [flag, str(value)]
            case Sequence():
                words += [word for each in value for word in (flag, str(each))]
            case _:
                words += [flag, f"{value:f}"]  # an amount of money
    return " ".join(map(_quoted, words))


def _quoted(word: str) -> str:
    """The word quoted for a shell. A name that is not UTF-8 is written byte by byte, which bash and zsh can read."""
    try:
        word.encode()
    except UnicodeEncodeError:
        spelt = "".join(f"\\x{byte:02x}" for byte in os.fsencode(word))
        return f"$'{spelt}'"
    return shlex.quote(word)


def in_directory(command: str | None, path: Path) -> str | None:
    """The command with the run's directory, so that it resumes this run on any day. It may name a URL already."""
    if command is not None and " -o " in command:
        return command
    return None if command is None else f"{command} -o {shlex.quote(str(path))}"
