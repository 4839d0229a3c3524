"""A disk that fails on request: strace makes chosen system calls on chosen files return an error."""

import shutil
from dataclasses import dataclass
from pathlib import Path

MISSING = "strace is not installed; these tests need it: apt-get install -y strace"


@dataclass(frozen=True, slots=True)
class Fault:
    """`call` on one of `files`, relative to the run directory, ends with `error` the `when`-th time.

    `when` is strace's: "3" only the third time, "3+" from then on, "3..7" up to the seventh.
    """

    call: str
    files: tuple[str, ...]
    error: str
    when: str

    def __str__(self) -> str:
        return f"{self.call} {self.files[0] or 'directory'} {self.error} {self.when}"


def prefix(fault: Fault, out: Path, also: tuple[str, ...] = ()) -> list[str]:
    """The command to put before the one that is to suffer the fault.

    strace.log beside `out` then tells those calls on those files, and the calls `also`, in order.
    """
    strace = shutil.which("strace")
    assert strace is not None, MISSING
    inject = f"inject={fault.call}:error={fault.error}:when={fault.when}"
    paths = [argument for file in fault.files for argument in ("-P", str(out / file))]
    quiet = ["-qqq", "-o", str(out.with_name("strace.log")), "-e", "signal=none"]
    return [strace, "-f", "--seccomp-bpf", *quiet, *paths, "-e", f"trace={','.join((fault.call, *also))}", "-e", inject]
