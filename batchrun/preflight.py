"""Settings that must be right before a run sends anything: `run`, `check` and `estimate` check them all.

Requirements on the input are in `startup.preconditions`.
"""

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

from batchrun import credentials, open_files, simulated
from batchrun.credentials import Credentials
from batchrun.job.job import Job
from batchrun.store import run_path
from batchrun.store.rundir import RunDirectory


def require_settings(job: Job, directory: RunDirectory) -> None:
    """Checks everything that a run of this job in this directory needs, except its input and its key. Writes nothing.

    Raises:
        BatchrunError: the first thing that is wrong.
    """
    open_files.OpenFiles().require_any()
    if job.simulated:
        simulated.config_of(job)
    for endpoint in job.endpoints:
        if endpoint.ca_file is not None:
            from batchrun.transport.connector import ssl_context_of  # aiohttp, 0.2 s: only if the job has one

            ssl_context_of(endpoint)
    if job.engine.name == "ray":
        from batchrun.ray_engine import settings  # these three only for a job that wants it

        settings.require_possible(job)
    directory.require_possible()
    if job.budget.per_day_usd is not None or job.budget.per_month_usd is not None:
        from batchrun.store import budget_file

        budget_file.require_possible(Path(job.budget.state))
    if job.telemetry.otel:
        from batchrun.telemetry.views import require_otel  # OpenTelemetry, 0.3 s

        require_otel(job)


def place(job: Job, date: str | None = None) -> tuple[RunDirectory, Job]:
    """The directory in which a run of this job would start or resume now, and the job with its input of that date.

    Raises:
        JobError: output.path has an unknown placeholder, or `date` is invalid.
    """
    now = datetime.now().astimezone()
    path, earlier = run_path.choose(job, date=date, now=now, new=False)
    return RunDirectory(path), job.on(run_path.logical_date(date or earlier, now))


def key(job: Job, environ: Mapping[str, str]) -> Credentials:
    """The job's key. `check` and `estimate` read it last, so that they report their findings even without one.

    Raises:
        JobError: it is missing.
    """
    return simulated.credentials() if job.simulated else credentials.read_all(job.endpoints, environ)
