"""The command line that resumes a run, made from the one that started it. PURE."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from batchrun.errors import quoted

_OF_ONE_START = frozenset(
    {
        # they choose the run, and the command names its directory instead
        *("job", "output_path", "state_dir", "date", "new"),
        *("deadline", "limit", "grace_s", "accept_changes", "accept_input", "accept_canary"),
    }
)
"""The options of `batchrun run` that a resume does without."""


def command(options: Mapping[str, object], flags: Mapping[str, str]) -> str:
    """`batchrun run JOB …` with the options of a start, by the names of their parameters in `commands.run`; `flags` has
    the flag of each. `in_directory` adds -o.
    """
    words = ["batchrun", "run", str(options["job"])]
    for name, flag in flags.items():
        if name in _OF_ONE_START:
            continue
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
    return " ".join(map(quoted, words))


def in_directory(command: str | None, path: Path) -> str | None:
    """The command with the run's directory, so that it resumes this run on any day. It may name a URL already."""
    if command is not None and " -o " in command:
        return command
    return None if command is None else f"{command} -o {quoted(path)}"
