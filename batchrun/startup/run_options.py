"""What the user asks of a start, beyond the job."""

from collections.abc import Callable
from typing import BinaryIO, Literal

import msgspec

from batchrun.limits.deadline import Deadline


class RunOptions(msgspec.Struct, frozen=True):
    """What the user asked of this start beyond the job. `stdin` is read where the input is "-"; `only_look` takes no
    change, not even a harmless one.

    `accept_changes`: a changed input or job is taken; "input": a changed input, and no changed job.

    `limit`: only the first so many rows, a pilot that a later start without it goes on with. `retry`: the statuses
    whose rows are to be asked again once every row is settled; None: no row is.
    """

    skip_invalid: bool = False
    accept_changes: bool | Literal["input"] = False
    accept_canary: bool = False
    only_look: bool = False
    limit: int | None = None
    deadline: Deadline | None = None
    retry: frozenset[str] | None = None
    stdin: BinaryIO | None = None
    problem: Callable[[str], None] = lambda line: None
    told: Callable[[str], None] = lambda line: None
    checked: Callable[[int], None] = lambda rows: None
