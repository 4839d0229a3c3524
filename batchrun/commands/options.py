"""Arguments and options that several commands share, and the types that click lacks."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from batchrun.commands.remote import ResultPath

if TYPE_CHECKING:
    from collections.abc import Callable
    from decimal import Decimal

JOB = click.argument("job", type=click.Path(dir_okay=False, path_type=Path))
OUT = click.argument("out", type=click.Path(path_type=Path))
RESULT = click.argument("out", type=ResultPath(whole=True))
PATHS = click.argument("paths", metavar="PATH...", nargs=-1, required=True, type=ResultPath(whole=False))
INPUT = click.option(
    "-i", "--input", "input_path", metavar="PATH", help="The input, instead of input.path; - is stdin."
)
DATE = click.option(
    "--date", metavar="YYYY-MM-DD", help="The logical date for {date}; default: that of the first start."
)
SET = click.option("--set", "overrides", multiple=True, metavar="A.B=C", help="Override one setting of the job.")
REUSE = click.option(
    "--reuse",
    multiple=True,
    metavar="PATH",
    help="Take answers of earlier runs instead of input.reuse_from: a run, a pattern, a Parquet file, or latest.",
)
SHARD = click.option(
    "--shard", metavar="K/N", help="Only range K of N equal ranges of the rows; K counts from 0, as in an array job."
)
SKIP = click.option("--skip-invalid", is_flag=True, help="Skip invalid records; run lists them in rejects.jsonl.")


def amount(what: str) -> "Callable[[click.Context, click.Parameter, str | None], Decimal | None]":
    """A callback that reads a finite number of 0 or more; click's own types accept nan and inf."""

    def read(context: click.Context, parameter: click.Parameter, text: str | None) -> "Decimal | None":
        from decimal import Decimal

        try:
            number = None if text is None else Decimal(text)
        except ArithmeticError:
            number = Decimal("nan")
        if number is not None and not (number.is_finite() and number >= 0):
            raise click.BadParameter(f"expected {what} (is {text})")
        return number

    return read
