"""The requirements of the settings of `[engine]`, and the cluster's address. Imports nothing heavy."""

import importlib.util
from collections.abc import Mapping

from batchrun.errors import JobError
from batchrun.job.job import Job

MISSING = "the engine ray needs another package: pip install 'batchrun[ray]'"

ADDRESS = "RAY_ADDRESS"
"""The environment variable with which Ray's own tools find a cluster."""

LOCAL = "local"
"""The address with which Ray starts a cluster of this machine alone, for as long as this process works."""


def require_possible(job: Job) -> None:
    """Checks what can be checked without starting anything.

    Raises:
        JobError: a setting is impossible, or Ray is not installed.
    """
    engine = job.engine
    if engine.max_actors is not None and engine.max_actors < engine.actors:
        raise JobError(f"engine.max_actors {engine.max_actors}: is less than engine.actors {engine.actors}")
    if importlib.util.find_spec("ray") is None:
        raise JobError(MISSING)


def address_of(job: Job, environ: Mapping[str, str]) -> str:
    """The cluster's address.

    Raises:
        JobError: it is one of Ray Client, whose proxy would read the key and end with the connection.
    """
    address = job.engine.ray_address or environ.get(ADDRESS) or LOCAL
    if address.startswith("ray://"):
        raise JobError(
            f"engine.ray_address {address}: Ray Client is not supported; start batchrun on a node of the cluster "
            '(ray job submit, or ssh) with "auto"'
        )
    return address
