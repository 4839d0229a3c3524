"""How many files, connections among them, this process may still open (RLIMIT_NOFILE, getrlimit(2))."""

import contextlib
import resource
from pathlib import Path

from batchrun.errors import ExitCode, RunStoppedError

SPARE = 12
"""Files that a run opens while it sends, beside its connections: chunks that are opened and sealed, images,
summary.json, a name that is looked up. Measured: 6 at once, in a run of small chunks."""

BEFORE = 20
"""Files that a run has open when it begins to send, its own simulator among them (measured)."""

FEWEST = BEFORE + SPARE
"""The lowest limit under which a run works, with one connection."""

OWN_DESCRIPTORS = (Path("/proc/self/fd"), Path("/dev/fd"))
"""Where a process sees what it has open: Linux (proc_pid_fd(5)), macOS and BSD."""


class OpenFiles:
    """The limit as it is, and what is left of it."""

    def __init__(self) -> None:
        self.limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)

    def require_any(self) -> None:
        """Nothing, if there is room for a run with one connection.

        Raises:
            RunStoppedError: there is not; no file was touched.
        """
        if self.limit < FEWEST:
            raise RunStoppedError(
                f"open files limit {self.limit}: too few, a run needs {FEWEST}; raise it with ulimit -n and run the "
                "same command again",
                ExitCode.PAUSED,
            )

    def connections(self, wanted: int) -> int:
        """How many connections may be open at once: as many as wanted, if they fit beside the run's own files."""
        return max(1, min(wanted, self.limit - _open_now() - SPARE))

    def shortage(self, wanted: int, connections: int) -> str:
        """The line that says so."""
        fewer = "1 connection" if connections == 1 else f"{connections} connections"
        return f"open files limit {self.limit}: {fewer} instead of {wanted}; raise with ulimit -n"


def allow(wanted: int) -> None:
    """The soft limit is high enough for so many connections, where the hard limit lets it be.

    For a process that is ours alone: the limit is the whole process's. 1,024 is a usual soft limit, and the hard one
    is often a million.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + FEWEST
    needed = needed if hard == resource.RLIM_INFINITY else min(hard, needed)
    if soft != resource.RLIM_INFINITY and soft < needed:
        with contextlib.suppress(ValueError, OSError):  # macOS refuses more than OPEN_MAX, whatever the hard limit says
            resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _open_now() -> int:
    for descriptors in OWN_DESCRIPTORS:
        with contextlib.suppress(OSError):
            return sum(1 for _ in descriptors.iterdir()) - 1  # one of them is the listing itself
    return BEFORE
