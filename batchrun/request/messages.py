"""From a row's columns to the messages of its request. PURE."""

from collections.abc import Callable, Sequence
from typing import Any

from batchrun.errors import InputError, JobError
from batchrun.job.fields import as_json, check_messages, plain
from batchrun.job.settings import MessageTemplate, RequestTemplate
from batchrun.request.templates import Columns, missing_column, template, text_template

Turns = Callable[[Columns], list[Any]]
"""A row's messages, or some of them, by its columns. Raises InputError if the row makes none, or invalid ones."""


def message_maker(request: RequestTemplate, dialect: str) -> Turns:
    """The function from a row's columns to its messages."""
    if dialect == "openai-batch":
        return lambda columns: []  # the body brings its own
    if dialect == "messages":
        return _messages_from_column(request)
    if isinstance(request.messages, list):
        return _joined([_turns_of(each, f"request.messages[{i}]") for i, each in enumerate(request.messages)])
    if request.prompt is None:
        raise JobError("request.prompt: the columns dialect needs a template, for example '{{ text }}'")
    prompt = template(request.prompt, "request.prompt")
    if request.system is None:
        return _from_templates(["user"], [prompt])
    return _from_templates(["system", "user"], [template(request.system, "request.system"), prompt])


def _messages_from_column(request: RequestTemplate) -> Turns:
    """Messages as the column holds them; the job's `system` comes first where a row has none."""
    column = request.messages if isinstance(request.messages, str) else "messages"
    system = None if request.system is None else text_template(request.system, "request.system")

    def messages_of(columns: Columns) -> list[Any]:
        if column not in columns:
            raise missing_column(columns, column, "holds the messages")
        messages = check_messages(plain(as_json(columns[column]), column))
        if system is not None and messages[0]["role"] not in ("system", "developer"):
            return [{"role": "system", "content": system(columns)}, *messages]
        return messages

    return messages_of


def _turns_of(given: MessageTemplate, place: str) -> Turns:
    """The function to one message by template, or to those that a column holds, if it holds any."""
    column = given.column
    if column is None:
        return _from_templates([str(given.role)], [template(given.content, f"{place}.content")])

    def messages_of(columns: Columns) -> list[Any]:
        if column not in columns:
            raise missing_column(columns, column, f"{place}.column names")
        value = as_json(columns[column])
        return check_messages(plain(value, column)) if value else []

    return messages_of


def _joined(parts: Sequence[Turns]) -> Turns:
    """All of their messages, one after the other; there must be one."""

    def messages_of(columns: Columns) -> list[Any]:
        messages = [message for turns in parts for message in turns(columns)]
        if not messages:
            raise InputError("messages: expected at least one message")
        return messages

    return messages_of


def _from_templates(roles: Sequence[str], templates: Sequence[Callable[[Columns], Any]]) -> Turns:
    """The function to one message for each role, with the content that its template makes."""
    parts = tuple(zip(roles, templates, strict=True))
    return lambda columns: [{"role": role, "content": content(columns)} for role, content in parts]
