"""Templates over a row's columns. PURE. Sole importer of jinja2: its immutable sandbox; row text stays text."""

import difflib
import re
from collections.abc import Callable
from typing import Any

import jinja2
import jinja2.meta
import jinja2.sandbox

from batchrun.errors import InputError, JobError
from batchrun.request import image_parts
from batchrun.request.texts import NoTextError, NullError, json_of, text_of

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

    def make(columns: Columns) -> Any:
        value = columns.get(column)
        if isinstance(value, list):
            raise InputError(f"{place}: column {column!r} holds a list; name it in request.images")
        return next(image_parts.sources_in(value, column)) if isinstance(value, bytes | dict) else render(columns)

    return make


_ENVIRONMENT = jinja2.sandbox.ImmutableSandboxedEnvironment(
    undefined=jinja2.StrictUndefined, finalize=text_of, keep_trailing_newline=True, autoescape=False
)
_ENVIRONMENT.filters["tojson"] = json_of  # Jinja's own writes for HTML, and knows no dates and no decimals
_ENVIRONMENT.globals.clear()  # no template sees them, yet each context would list them (1.4 of 4.8 µs, measured)


def text_template(text: str, place: str) -> Callable[[Columns], str]:
    """The template compiled; a text without markers is itself.

    `root_render_func` on a context that shares the row's columns costs a quarter of `render()` (measured: 4 µs for 16);
    the price is that Jinja's global functions are not there, which a template over columns does not need.
    """
    if "{" not in text:
        return lambda columns: text
    try:
        compiled = _ENVIRONMENT.from_string(text)
    except jinja2.TemplateSyntaxError as error:
        raise JobError(f"{place}: template error in line {error.lineno}: {error.message}") from error
    new_context, render = compiled.new_context, compiled.root_render_func

    def make(columns: Columns) -> str:
        try:
            return "".join(render(new_context(columns, True)))
        except NullError as error:
            raise InputError(f"{place}: {_null_in_words(text, columns)}") from error
        except NoTextError as error:
            raise InputError(f"{place}: {_odd_in_words(text, columns, str(error))}") from error
        except jinja2.UndefinedError as error:
            raise InputError(f"{place}: {error.message}{_nearest(error.message or '', columns)}") from error
        except Exception as error:  # a template runs user code over user data: whatever it raises is the row's
            raise InputError(f"{place}: {type(error).__name__}: {error}") from error

    return make


def _null_in_words(text: str, columns: Columns) -> str:
    """Which column is null, or which of them hold the null, and what to write instead."""
    used = sorted(jinja2.meta.find_undeclared_variables(_ENVIRONMENT.parse(text)) & columns.keys())
    if nulls := [name for name in used if columns[name] is None]:
        return f"column {' and '.join(map(repr, nulls))} is null; write {{{{ {nulls[0]} or '' }}}} where that may be"
    where = f", in column {' or '.join(map(repr, used))}" if used else ""
    return f"a value in the template is null{where}; write {{{{ ... or '' }}}} around it where that may be"


def _odd_in_words(text: str, columns: Columns, what: str) -> str:
    """Which columns hold the value, and what to do about it."""
    used = sorted(jinja2.meta.find_undeclared_variables(_ENVIRONMENT.parse(text)) & columns.keys())
    where = f", in column {' or '.join(map(repr, used))}" if used else ""
    return f"{what}{where}; convert it in the input, or write something else in its place"


_UNDEFINED = re.compile(r"'(\w+)' is undefined")


def _nearest(message: str, columns: Columns) -> str:
    """The column that an unknown name was probably meant to be, as a question."""
    unknown = _UNDEFINED.fullmatch(message)
    near = difflib.get_close_matches(unknown[1], columns, n=1) if unknown is not None else []
    return f"; did you mean {near[0]}?" if near else ""
