"""How many files and connections this process may still open (RLIMIT_NOFILE, getrlimit(2))."""

import contextlib
import resource
from pathlib import Path

from batchrun.errors import ExitCode, RunStoppedError

SPARE = 16
"""Files that a run opens while it sends, besides connections: chunks, images, summary.json, DNS lookups, and
connections that are closed while others take their place. Measured: 10 at once, with small chunks."""

BEFORE = 20
"""Files open when a run sends its first request, its simulator included (measured)."""

FEWEST = BEFORE + SPARE
"""The lowest limit with which a run works, with one connection."""

OWN_DESCRIPTORS = (Path("/proc/self/fd"), Path("/dev/fd"))
"""Lists a process's open files: Linux (proc_pid_fd(5)), macOS and BSD."""


class OpenFiles:
    """The present limit, and what is left of it."""

    def __init__(self) -> None:
        self.limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)

    def require_any(self) -> None:
        """Checks that a run with one connection is possible.

        Raises:
            RunStoppedError: it is not; no file was touched.
        """
        if self.limit < FEWEST:
            raise RunStoppedError(
                f"open files limit {self.limit}: too few, a run needs {FEWEST}; raise it with ulimit -n and run the "
                "same command again",
                ExitCode.PAUSED,
            )

    def connections(self, wanted: int) -> int:
        """How many connections may be open: as many as wanted, if the run's own files fit as well."""
        now = BEFORE
        for descriptors in OWN_DESCRIPTORS:
            with contextlib.suppress(OSError):
                now = sum(1 for _ in descriptors.iterdir()) - 1  # one of them is the listing itself
                break
        return max(1, min(wanted, self.limit - now - SPARE))

    def shortage(self, wanted: int, connections: int) -> str:
        fewer = "1 connection" if connections == 1 else f"{connections} connections"
        return f"open files limit {self.limit}: {fewer} instead of {wanted}; raise with ulimit -n"


def allow(wanted: int) -> None:
    """Raises the soft limit for so many connections, as far as the hard limit allows. Only for a process of our own,
    because the limit holds for the whole process.
    """
    # Usually the soft limit is 1,024, and the hard one often a million.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + FEWEST
    needed = needed if hard == resource.RLIM_INFINITY else min(hard, needed)
    if soft != resource.RLIM_INFINITY and soft < needed:
        with contextlib.suppress(ValueError, OSError):  # macOS refuses more than OPEN_MAX
            resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
