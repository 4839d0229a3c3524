"""Settings that must be right before a run sends anything: `run`, `check` and `estimate` check them all.

Requirements on the input are in `startup.preconditions`.
"""

from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path

from batchrun import credentials, open_files, simulated
from batchrun.credentials import Credentials
from batchrun.job.job import Job
from batchrun.store import rundir
from batchrun.store.rundir import RunDirectory


def _open_files_limit(job: Job, directory: RunDirectory) -> None:
    open_files.OpenFiles().require_any()


def _simulator_settings(job: Job, directory: RunDirectory) -> None:
    if job.simulated:
        simulated.config_of(job)


def _ca_file(job: Job, directory: RunDirectory) -> None:
    for endpoint in job.endpoints:
        if endpoint.ca_file is not None:
            from batchrun.transport.connector import ssl_context_of  # aiohttp, 0.2 s: only if the job has one

            ssl_context_of(endpoint)


def _engine(job: Job, directory: RunDirectory) -> None:
    if job.engine.name == "ray":
        from batchrun.ray_engine.settings import require_possible  # only for a job that wants it

        require_possible(job)


def _output_directory(job: Job, directory: RunDirectory) -> None:
    directory.require_possible()


def _budget_file(job: Job, directory: RunDirectory) -> None:
    if job.budget.per_day_usd is not None or job.budget.per_month_usd is not None:
        from batchrun.store.budget_file import require_possible  # only for a job that has such a budget

        require_possible(Path(job.budget.state))


def _open_telemetry(job: Job, directory: RunDirectory) -> None:
    if job.telemetry.otel:
        from batchrun.telemetry.views import require_otel  # OpenTelemetry, 0.3 s: only for a job that wants it

        require_otel(job)


REQUIREMENTS: tuple[Callable[[Job, RunDirectory], None], ...] = (
    _open_files_limit,
    _simulator_settings,
    _ca_file,
    _engine,
    _output_directory,
    _budget_file,
    _open_telemetry,
)
"""Each raises a BatchrunError whose message is shown to the user. None writes anything."""


def require_settings(job: Job, directory: RunDirectory) -> None:
    """Checks everything that a run of this job in this directory needs, except its input and its key.

    Raises:
        BatchrunError: the first thing that is wrong.
    """
    for requirement in REQUIREMENTS:
        requirement(job, directory)


def place(job: Job, date: str | None = None) -> tuple[RunDirectory, Job]:
    """The directory in which a run of this job would start or resume now, and the job with its input of that date.

    Raises:
        JobError: output.path has an unknown placeholder, or `date` is invalid.
    """
    now = datetime.now().astimezone()
    path, earlier = rundir.place(rundir.pattern_of(job.output), job.name, date=date, now=now, new=False)
    return RunDirectory(path), job.on(rundir.logical_date(date or earlier, now))


def key(job: Job, environ: Mapping[str, str]) -> Credentials:
    """The job's key. `check` and `estimate` read it last, so that they report their findings even without one.

    Raises:
        JobError: it is missing.
    """
    return simulated.credentials() if job.simulated else credentials.read_all(job.endpoints, environ)
