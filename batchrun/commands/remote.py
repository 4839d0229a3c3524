"""Paths of commands that read results: one in an object store is fetched into a folder that goes with the process."""

import atexit
import functools
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import click


class ResultPath(click.ParamType):  # type: ignore[type-arg]  # generic only for the type checker
    """A path, or a URL of an object store. `whole`: the result's rows are read, not only its summary."""

    name = "path"

    def __init__(self, *, whole: bool) -> None:
        self._whole = whole

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """The path; for a URL, that of a local copy: of the result, or without `whole` of all summaries below it.

        Raises:
            InputError, StorageError: there is no run, or the store can't be read.
        """
        text = str(value)
        if "://" not in text:
            return Path(text)
        from batchrun.errors import InputError
        from batchrun.storage import objects, urls

        url, found = urls.parse(text), objects.find_remote(text)
        if not self._whole:
            found = [file for file in found if file.name == "summary.json"]
        elif not url.path.endswith(".parquet"):
            found = [file for file in found if _is_of_a_result(str(file), text)]
        if not found:
            raise InputError(f"{text}: no run is published there")
        root = _root() / url.scheme
        for file in found:
            local = root / file.url.path
            local.parent.mkdir(parents=True, exist_ok=True)
            with file.open() as source, local.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
        return root / url.path.rstrip("/")


def _is_of_a_result(file: str, url: str) -> bool:
    below = file.removeprefix(url.rstrip("/") + "/")
    return below in ("summary.json", "completions.parquet") or below.startswith("completions/")


@functools.cache
def _root() -> Path:
    root = Path(tempfile.mkdtemp(prefix="batchrun-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return root


def as_named(text: str) -> str:
    """The text with the URLs in place of where their files were fetched to."""
    if not _root.cache_info().currsize:
        return text
    return re.sub(rf"{re.escape(str(_root()))}/([a-z0-9]+)/", r"\1://", text)
