"""Loads a `Job` from a TOML file and overrides, or from code. An error names the setting and the nearest known name."""

import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from datetime import date, datetime, time
from decimal import Decimal
from pathlib import Path, PurePath
from typing import Any

import msgspec

from batchrun.errors import JobError
from batchrun.job import answer_schema
from batchrun.job.job import Job, all_settings
from batchrun.job.messages import explain
from batchrun.job.validation import SECRET, problems


def load(path: Path, overrides: Sequence[str] = ()) -> Job:
    """The job in the TOML file at `path`, with `a.b=c` overrides applied.

    Raises:
        JobError: the file is unreadable or not TOML, or a setting is invalid; the message names its path.
    """
    try:
        tables = tomllib.loads(path.read_text("utf-8-sig"))  # some editors write a byte order mark
    except OSError as error:
        raise JobError(f"{path}: can't read the job file: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise JobError(f"{path}: not valid TOML: {error}") from error
    for override in overrides:
        _override(tables, override)
    tables.setdefault("name", os.fsencode(path.stem).decode("utf-8", "replace"))  # a file name may hold any bytes
    try:
        return from_tables(tables)
    except JobError as error:
        invalid = re.split(r"[:\[]", str(error), maxsplit=1)[0] + "."
        names = (".".join(_keys(override.partition("=")[0])) + "." for override in overrides)
        is_overridden = any(name.startswith(invalid) or invalid.startswith(name) for name in names)
        where = f"{path}, overridden by --set or an option" if is_overridden else str(path)
        raise JobError(f"{where}: {error}") from error


def from_tables(tables: Mapping[str, Any]) -> Job:
    """The validated Job that these TOML tables describe."""
    endpoints = tables.get("endpoint")
    if isinstance(endpoints, list):  # [[endpoint]] tables
        if not endpoints:
            raise JobError("endpoint: is empty; add an [endpoint] table")
        tables = {**tables, "endpoint": endpoints[0], "more_endpoints": endpoints[1:]}
    for setting in _with_nul(tables):
        if not setting.startswith("request.") or setting == "request.response_format.file":  # a prompt may hold one
            raise JobError(f"{setting}: holds a NUL, which no name, path or address may")
    try:
        job = msgspec.convert(tables, Job)
    except msgspec.ValidationError as error:
        known = [name for name, _ in all_settings()] + list(Job.__struct_fields__)
        why = explain(str(error), tables, Job, known)
        raise JobError(re.sub(r"more_endpoints\[(\d+)\]", lambda at: f"endpoint[{int(at[1]) + 1}]", why)) from error
    if problem := next(problems(job), None):
        raise JobError(problem)
    response_format = job.request.response_format
    if response_format is not None and response_format.file is not None:
        resolved = msgspec.structs.replace(response_format, schema=_read_schema(response_format.file), file=None)
        job = msgspec.structs.replace(job, request=msgspec.structs.replace(job.request, response_format=resolved))
    return job


def _with_nul(value: object, path: str = "") -> Iterator[str]:
    """The paths of the texts that hold a NUL."""
    if isinstance(value, str) and "\0" in value:
        yield path
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _with_nul(inner, f"{path}.{name}" if path else str(name))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _with_nul(inner, path)


def checked(job: Job) -> Job:
    """A job that was built in code, validated like a job file: the same checks, messages and fingerprint.

    Raises:
        JobError: a setting is invalid; the message names its path.
    """
    kept = (datetime, date, time, Decimal)
    return from_tables(msgspec.to_builtins(job, builtin_types=kept, str_keys=True, enc_hook=_plain))


def _plain(value: object) -> str:
    if isinstance(value, PurePath):
        return str(value)
    raise JobError(f"no setting takes a {type(value).__name__}; docs/job.md lists every setting")


def _override(tables: dict[str, Any], override: str) -> None:
    """Apply one `a.b=c` to the tables. The path is a TOML key; the value is TOML, else a plain string.

    `a.b=` removes the setting from the job.
    """
    path, equals, text = override.partition("=")
    keys = _keys(path)
    if not equals or not keys:
        raise JobError(f"--set {path}: expected table.setting=value")
    if any(SECRET.search(key) for key in keys):
        raise JobError(f"--set {path}: a secret does not belong on a command line; use endpoint.api_key_env")
    value: Any = None
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *parents, last = keys
    table = tables
    for parent in parents:
        table = table.setdefault(parent, {})
        if isinstance(table, list):
            raise JobError(f"--set {path}: the job has several [[{parent}]] tables; change them in the job file")
        if not isinstance(table, dict):
            raise JobError(f"--set {path}: {parent} is not a table")
    if text.strip():
        table[last] = value
    else:
        table.pop(last, None)


def _keys(path: str) -> list[str]:
    """The names in a dotted TOML key, which may quote names that hold dots; [] for an invalid key."""
    try:
        tree = tomllib.loads(f"{path} = 0")
    except tomllib.TOMLDecodeError:
        return []
    keys: list[str] = []
    while isinstance(tree, dict) and len(tree) == 1:
        ((key, tree),) = tree.items()
        keys.append(key)
    return keys


def _read_schema(file: str) -> dict[str, Any]:
    """The JSON schema in `file`."""
    try:
        schema = msgspec.json.decode(Path(file).read_text("utf-8-sig"))
    except OSError as error:
        raise JobError(f"request.response_format.file: can't read {file}: {error.strerror}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise JobError(f"request.response_format.file: {file} is not JSON: {error}") from error
    if not isinstance(schema, dict):
        raise JobError(f"request.response_format.file: {file} does not hold a JSON object")
    if (problem := answer_schema.problem(schema)) is not None:
        raise JobError(f"request.response_format.file: {file}: {problem}")
    return schema
