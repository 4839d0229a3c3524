"""Keeps the memory of a long run flat: freed memory goes back to the system instead of waiting in the C library."""

import contextlib
import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
"""Parameters of glibc's mallopt (malloc.h)."""

BLOCK_BYTES = 1_000_000  # setting it turns off glibc's own adjustment, which goes up to 32 MB (mallopt(3))


def share_one_arena() -> None:
    """Call it before threads are started, in a process of our own: it affects all allocations of the process.

    With an arena for each thread, as glibc has them by default, one thread can't use memory that another has freed: a
    run of 200,000 rows grew by 50 MB (docs/scale.md). Other C libraries have no such parameters, so nothing is set.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_ARENA_MAX, 1)
        mallopt(_TRIM_THRESHOLD, BLOCK_BYTES)
        mallopt(_MMAP_THRESHOLD, BLOCK_BYTES)


def give_back() -> None:
    """Returns freed memory to the system: 11 MB when all rows are settled (measured). Takes a few milliseconds."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
