"""What must hold before a run sends anything, but for its input. `run`, `check` and `estimate` walk through this list.

What must hold of the input is `plan.checks`'s, and they walk through that, too.
"""

from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path

from batchrun import credentials, open_files, simulated
from batchrun.credentials import Credentials
from batchrun.job.job import Job
from batchrun.store import rundir
from batchrun.store.rundir import RunDirectory


def _enough_files_may_be_open(job: Job, directory: RunDirectory) -> None:
    open_files.OpenFiles().require_any()


def _the_simulator_can_be_had(job: Job, directory: RunDirectory) -> None:
    if job.simulated:
        simulated.config_of(job)


def _certificates_can_be_read(job: Job, directory: RunDirectory) -> None:
    if job.endpoint.ca_file is not None:
        from batchrun.transport.connector import ssl_context_of  # aiohttp, 0.2 s: only for a job that names one

        ssl_context_of(job.endpoint)


def _the_output_can_be_written(job: Job, directory: RunDirectory) -> None:
    directory.require_possible()


def _the_budget_file_can_be_kept(job: Job, directory: RunDirectory) -> None:
    if job.budget.per_day_usd is not None or job.budget.per_month_usd is not None:
        from batchrun.store.budget_file import require_possible  # only for a job that has such a budget

        require_possible(Path(job.budget.state))


REQUIREMENTS: tuple[Callable[[Job, RunDirectory], None], ...] = (
    _enough_files_may_be_open,
    _the_simulator_can_be_had,
    _certificates_can_be_read,
    _the_output_can_be_written,
    _the_budget_file_can_be_kept,
)
"""Each raises a BatchrunError with the line that a person sees. None of them writes anything."""


def require_settings(job: Job, directory: RunDirectory) -> None:
    """Nothing, if a run of this job could begin in the directory, were its input read and its key there.

    Raises:
        BatchrunError: the first thing that is wrong.
    """
    for requirement in REQUIREMENTS:
        requirement(job, directory)


def place(job: Job, date: str | None = None) -> tuple[RunDirectory, Job]:
    """Where a run of this job would begin or resume now, and the job with its input of that date.

    Raises:
        JobError: output.path holds a name that is not known, or `date` is none.
    """
    now = datetime.now().astimezone()
    path, earlier = rundir.place(job.output.path, job.name, date=date, now=now, new=False)
    return RunDirectory(path), job.on(rundir.logical_date(date or earlier, now))


def key(job: Job, environ: Mapping[str, str]) -> Credentials:
    """The key that the job names. `check` and `estimate` look for it last: their findings are worth having without.

    Raises:
        JobError: it is not there.
    """
    return simulated.credentials() if job.simulated else credentials.read(job.endpoint, environ)
