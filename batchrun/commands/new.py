"""`batchrun new`."""

from pathlib import Path

import click

from batchrun.commands.results import say


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
def new(file: Path) -> None:
    """Write a commented job file to start from."""
    from importlib.resources import files

    from batchrun.errors import JobError, quoted

    try:
        with file.open("x", encoding="utf-8") as target:
            target.write(files("batchrun").joinpath("new_job.toml").read_text("utf-8"))
    except FileExistsError as error:
        raise JobError(f"{file} already exists; name another file") from error
    except OSError as error:
        raise JobError(f"{file}: can't be written: {error.strerror}") from error
    say(f"wrote {file}; set the input and the prompt, then: batchrun check {quoted(file)}")
