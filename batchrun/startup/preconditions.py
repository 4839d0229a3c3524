"""Conditions on the input before a run sends anything; `run`, `check` and `estimate` all test them."""

import itertools
from collections.abc import Callable, Mapping
from decimal import Decimal

from batchrun import prices
from batchrun.errors import InputError, JobError
from batchrun.job.job import Job
from batchrun.prices import PriceTable
from batchrun.report.wording import plural
from batchrun.source import Source, TableSource
from batchrun.startup.input_check import Survey
from batchrun.store import shared_dataset
from batchrun.tables.partitioned import require_keys
from batchrun.tables.rows import output_schema


def require_input(
    job: Job, source: Source, found: Survey, report: Callable[[str], None], *, skip_invalid: bool = False
) -> None:
    """Returns if a run over what was found can start. `report` gets a line for each kind of invalid record.

    Raises:
        InputError: records are invalid and not skipped, or there are too few rows.
        JobError: the output can't have the input's columns.
    """
    if found.rejected and not skip_invalid:
        raise_problems(found, report)
    require_columns(job, source, found)
    shared_dataset.require_possible(job.output, source.files, job.storage)
    require_rows(job, found.rows)


def require_rows(job: Job, rows: int) -> None:
    """Returns if there are as many rows as the job expects: a broken pipe ends like a complete one.

    Raises:
        InputError: there are fewer.
    """
    if not rows and job.input.min_rows == 1:
        raise InputError(
            "the input has no rows; check that it is complete, or set input.min_rows = 0 for an empty result"
        )
    if rows < job.input.min_rows:
        raise InputError(
            f"the input has {plural(rows, 'row')}, and input.min_rows expects {job.input.min_rows:,} or more; "
            "check that it is complete, or lower input.min_rows"
        )


def require_columns(job: Job, source: Source, found: Survey | None = None) -> None:
    """Returns if the output can have the input's columns. Parquet states them; JSON lines' must be `found` first.

    Raises:
        JobError: as `output_schema` and `require_keys`.
    """
    if isinstance(source, TableSource):
        require_keys(output_schema(source.schema, job.output), job.output)
    elif found is not None and found.types is not None:
        schema = output_schema(found.types.schema(), job.output)
        if found.rows:  # no row has no columns
            require_keys(schema, job.output)


def raise_problems(found: Survey, report: Callable[[str], None]) -> None:
    """Reports each kind of problem in one line, with its first record and its count, then raises with the total.

    Raises:
        InputError: always.
    """
    for problem, others in found.problem_kinds:
        one_line = str(problem).replace("\n", "\\n")  # a name may hold a newline
        report(one_line + (f" (and {others - 1:,} more such records)" if others > 1 else ""))
    count, named = len(found.rejected), sum(others for _, others in found.problem_kinds)
    shown = f"; the first {len(found.problem_kinds)} kinds of problem are above" if count > named else ""
    if not found.rows and all(problem.record is None for problem in found.first_problems):
        is_text = any(problem.line is not None for problem in found.first_problems)
        advice = "write the file again as JSON lines" if is_text else "correct what the lines above name"
        raise InputError(f"none of the input records ({count:,}) can be read{shown}; {advice}")
    if not found.rows:
        raise InputError(
            f"none of the input records ({count:,}) make a valid request{shown}. "
            "The job (its template, input.id, input.dialect) does not fit this input: change one of the two"
        )
    raise InputError(
        f"{count:,} of {plural(count + found.rows, 'input record')} make no valid request{shown}. "
        "Correct them, or set them aside with batchrun run ... --skip-invalid"
    )


def require_budget(
    job: Job, max_request: Mapping[str, tuple[int, int]], tables: Mapping[str, PriceTable | None]
) -> None:
    """Returns if the caps can be kept: every price is known, and the largest request fits.

    `max_request`: upper bounds of (prompt, output) tokens by model.

    Raises:
        JobError: a cap can't be kept.
    """
    most = job.budget.max_tokens
    largest = max(map(sum, max_request.values()), default=0)
    if most is not None and largest > most:
        raise JobError(
            f"budget.max_tokens: {most:,} are fewer than the largest request may use ({largest:,}, by its upper "
            "bound); set request.max_tokens, or raise the cap"
        )
    for model, table in tables.items():
        if table is None and job.canary.rows is not None and job.canary.max_cost_per_row_usd is not None:
            raise JobError(
                f"canary.max_cost_per_row_usd: the price of {model} is unknown; "
                f'give it in [pricing."{model}"] or remove this bound'
            )
    for (model, table), (name, cap) in itertools.product(tables.items(), job.budget.caps_usd.items()):
        if table is None:
            raise JobError(
                f"budget.{name}: the price of {model} is unknown, so a cap can't be kept; "
                f'give it in [pricing."{model}"] or remove the cap'
            )
        bound = prices.upper_bound(*max_request.get(model, (0, 0)), table, *job.service_tiers) or Decimal(0)
        if bound > cap:
            raise JobError(
                f"budget.{name}: ${cap} is less than the largest request may cost (${bound:.4f}, by its "
                "upper bound); set request.max_tokens, or raise the cap"
            )
