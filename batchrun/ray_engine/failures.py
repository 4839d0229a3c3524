"""Translates errors of Ray's calls into our errors, in a few words."""

import re

from ray.exceptions import RayTaskError

from batchrun.errors import JobError


def in_words(error: Exception) -> str:
    """Why a call failed, in a few words: Ray's messages have ids, causes that are common, and whole tracebacks."""
    if isinstance(error, RayTaskError):
        return f"{type(error.cause).__name__}: {error.cause}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if getattr(error, "actor_init_failed", False) and (raised := [line for line in lines if _RAISED.match(line)]):
        return raised[-1][:300]
    line = next((line for line in lines if line.startswith("The actor") and "because" in line), "".join(lines[:1]))
    return _DETAILS.split(re.split("because |is unavailable: ", line)[-1])[0][:300].rstrip(". ") or type(error).__name__


_RAISED = re.compile(r"\w+(Error|Exception): ")
_DETAILS = re.compile(r"\.? (?:Worker exit type|Node Id|Owner Id|Some common causes|The task may or may not)")


def as_ours(error: Exception, why: str) -> JobError | None:
    """The error if every actor would have it."""
    known = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(known, JobError):
        return known
    if isinstance(known, RayTaskError | ImportError) or getattr(error, "actor_init_failed", False):
        return JobError(f"a Ray actor could not start: {why}; install batchrun[ray] on every node of the cluster")
    return None
