"""Templates over a row's columns. PURE. Sole importer of jinja2: its immutable sandbox; row text stays text."""

import difflib
import keyword
import re
from collections.abc import Callable
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

from batchrun.errors import InputError, JobError
from batchrun.request import image_parts
from batchrun.request.texts import NoTextError, NullError, json_of, text_of

if TYPE_CHECKING:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

Columns = dict[str, Any]


def template(tree: Any, place: str) -> Callable[[Columns], Any]:
    """A function that renders every string in `tree`, a text or a list of content parts."""
    if isinstance(tree, str):
        return text_template(tree, place)
    if isinstance(tree, list):
        parts = [template(item, place) for item in tree]
        return lambda columns: [part(columns) for part in parts]
    if isinstance(tree, dict):
        fields = {name: (_url_template if name == "url" else template)(value, place) for name, value in tree.items()}
        return lambda columns: {name: field(columns) for name, field in fields.items()}
    return lambda columns: tree


_ONE_COLUMN = re.compile(r"\{\{\s*([A-Za-z_]\w*)\s*\}\}")


def _url_template(tree: Any, place: str) -> Callable[[Columns], Any]:
    """As `template`; but a text that is one column alone gives an image in bytes as it is."""
    render = template(tree, place)
    only = _ONE_COLUMN.fullmatch(tree) if isinstance(tree, str) else None
    if only is None:
        return render
    column = only[1]

    def url_of(columns: Columns) -> Any:
        value = columns.get(column)
        if isinstance(value, list):
            raise InputError(f"{place}: column {column!r} holds a list; name it in request.images")
        return next(image_parts.sources_in(value, column)) if isinstance(value, bytes | dict) else render(columns)

    return url_of


@cache
def _environment() -> "ImmutableSandboxedEnvironment":
    from jinja2 import StrictUndefined  # 20 ms: only where a template is compiled
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, finalize=text_of, keep_trailing_newline=True, autoescape=False
    )
    environment.filters["tojson"] = json_of  # Jinja's own writes for HTML, and knows no dates and no decimals
    environment.globals.clear()  # no template sees them, yet each context would list them (1.4 of 4.8 µs, measured)
    return environment


def _used_names(text: str) -> set[str]:
    """The columns that the template names."""
    from jinja2.meta import find_undeclared_variables

    return find_undeclared_variables(_environment().parse(text))


ROW = "row"
"""The whole row in a template, for columns whose names are not plain words. A column named `row` takes precedence."""

_ODD_NAME = "A column whose name is not one plain word is written {{ row['its name'] }}"


@lru_cache(maxsize=64)  # the input check and dispatch make the same requests
def text_template(text: str, place: str) -> Callable[[Columns], str]:
    """A function that makes the template's text of a row; a text without markers is itself."""
    if "{" not in text:
        return lambda columns: text
    pieces = _plain_pieces(text)
    render = _compiled(text, place) if pieces is None else None

    def text_of_row(columns: Columns) -> str:
        if pieces is not None and (joined := _joined(pieces, columns)) is not None:
            return joined
        nonlocal render
        render = render or _compiled(text, place)
        return render(columns)

    return text_of_row


def _compiled(text: str, place: str) -> Callable[[Columns], str]:
    """The template as Jinja compiles it.

    `root_render_func` on a context that shares the row's columns costs a quarter of `render()` (measured: 4 µs for 16);
    the price is that Jinja's global functions are not there, which a template over columns does not need.
    """
    from jinja2 import TemplateSyntaxError, UndefinedError

    try:
        compiled = _environment().from_string(text)
    except TemplateSyntaxError as error:
        raise JobError(f"{place}: template error in line {error.lineno}: {error.message}. {_ODD_NAME}") from error
    new_context, render = compiled.new_context, compiled.root_render_func
    whole_row = ROW in _used_names(text)

    def rendered(columns: Columns) -> str:
        try:
            known = {ROW: columns, **columns} if whole_row else columns
            return "".join(render(new_context(known, True)))
        except NoTextError as error:
            raise InputError(f"{place}: {_in_words(error, text, columns)}") from error
        except UndefinedError as error:
            message = error.message or ""
            unknown = _UNDEFINED.fullmatch(message) or _NO_MEMBER.fullmatch(message)
            near = did_you_mean(tuple(columns), None if unknown is None else unknown[1])
            raise InputError(f"{place}: {message}{near}") from error
        except Exception as error:  # a template runs user code over user data: any exception is an error of the row
            raise InputError(f"{place}: {type(error).__name__}: {error}") from error

    return rendered


_Pieces = list[tuple[str, str | None]]
"""Text, and the column that follows it; None after the last."""

_MARKERS = ("{{", "{%", "{#")
_NO_COLUMNS = frozenset({ROW, "true", "false", "none", "True", "False", "None", *keyword.kwlist})


def _plain_pieces(text: str) -> _Pieces | None:
    """The template as texts and columns, where it is nothing else: no filter, no expression, no statement.

    Jinja makes the same of it (`test_simple_templates_render_as_jinja` in tests/unit/test_request.py), and
    need not be loaded.
    """
    *parts, last = _ONE_COLUMN.split(re.sub(r"\r\n?", "\n", text))
    texts, columns = parts[::2], parts[1::2]
    has_more = any(marker in each for marker in _MARKERS for each in (*texts, last))
    if has_more or any(each.endswith("{") for each in texts):
        return None
    if not _NO_COLUMNS.isdisjoint(columns) or not all(map(str.isidentifier, columns)):
        return None
    return [*zip(texts, columns, strict=True), (last, None)]


def _joined(pieces: _Pieces, columns: Columns) -> str | None:
    """The text of a row whose columns here are all strings; any other row is Jinja's, which knows what to say of it.

    A third of the cost of Jinja's context and generator (docs/benchmarks.md): most templates are like this.
    """
    joined = ""
    for text, column in pieces:
        if column is None:
            return joined + text
        value = columns.get(column)
        if type(value) is not str:
            return None
        joined += text + value
    return joined


def _in_words(error: NoTextError, text: str, columns: Columns) -> str:
    """Names the columns of the template that hold the value, and what to write instead."""
    used = sorted(_used_names(text) & columns.keys())
    where = f", in column {' or '.join(map(repr, used))}" if used else ""
    if not isinstance(error, NullError):
        return f"{error}{where}; convert it in the input, or write something else in its place"
    if nulls := [name for name in used if columns[name] is None]:
        columns_are = f"column {nulls[0]!r} is" if len(nulls) == 1 else f"columns {', '.join(map(repr, nulls))} are"
        return f"{columns_are} null; write {_or_empty(nulls[0])} where that may be"
    return f"a value in the template is null{where}; write {_or_empty('it')} in its place where that may be"


def _or_empty(column: str) -> str:
    """What to write for a column that may be null. `or ''` would drop 0 and false too.

    It has no quotes, so it fits into any string of the job file.
    """
    return f"{{% if {column} is not none %}}{{{{ {column} }}}}{{% endif %}}"


_UNDEFINED = re.compile(r"'(\w+)' is undefined")
_NO_MEMBER = re.compile(r"'dict object' has no attribute '(.+)'")
SHOWN_COLUMNS = 12


@lru_cache(maxsize=64)  # a million rows miss the same name; among 5,000 columns a guess takes 0.1 s
def did_you_mean(columns: tuple[str, ...], name: str | None) -> str:
    """What follows "column `name` is missing" in the message: the column that was probably meant, and all columns."""
    guess = ""
    if name is not None:
        odd = [column for column in columns if not column.isidentifier() and re.match(rf"{re.escape(name)}\b", column)]
        near = odd[:1] or difflib.get_close_matches(name, columns, n=1)
        if near and (meant := near[0]).isidentifier():
            guess = f"; did you mean {meant}?"
        elif near:  # in single quotes if it can be: most templates are in double quotes
            is_plain = re.fullmatch(r"[^'\"\\\x00-\x1f]+", meant) is not None
            quoted = f"'{meant}'" if is_plain else json_of(meant)
            guess = f"; did you mean row[{quoted}]?"
    shown = ", ".join(columns[:SHOWN_COLUMNS]) + (", …" if len(columns) > SHOWN_COLUMNS else "")
    return f"{guess} (columns: {shown or 'none'})"


def missing_column(columns: Columns, column: str, why: str) -> InputError:
    """The error of a row without a column that the job names; `why` says where: "request.images names"."""
    return InputError(f"column {column!r}, which {why}, is missing{did_you_mean(tuple(columns), column)}")
