"""`pyarrow.compute`, imported when one of its functions is first used: it takes 25 ms, and most starts use none."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyarrow.compute import *  # noqa: F403
else:

    def __getattr__(name):
        import pyarrow.compute

        return getattr(pyarrow.compute, name)
