"""The command line in a process that kills itself at a call: before or after a function gets an argument that matches.

`python -m tests.crash.dying WHERE SIDE PATTERN ARGUMENTS…`: WHERE is `module:attribute` of the function.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests import prefork
from tests.cli_process import KEY, KEY_ENV, finish
from tests.crash.points import Phase, Point, Side, mark


def main() -> None:
    """Ends by SIGKILL if it gets to the call."""
    where, side, pattern, *arguments = sys.argv[1:]
    point = Point(where, where, Side(side), lambda given: pattern in str(given), Phase.FINISHING, 1)
    mark(point, lambda name: os.kill(os.getpid(), signal.SIGKILL))
    sys.argv = ["batchrun", *arguments]
    from batchrun.cli import main as command_line

    command_line()


def dies(where: str, side: str, pattern: str, *arguments: str | Path) -> bool:
    """Whether the command got to the call, and was killed there; it must succeed otherwise."""
    environ = {**os.environ, KEY_ENV: KEY}
    words = [where, side, pattern, *map(str, arguments)]
    ended = finish(prefork.start("tests.crash.dying", words, environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    assert ended.exit_code in (0, -signal.SIGKILL), ended.stderr
    return ended.exit_code != 0


if __name__ == "__main__":
    main()
