"""`--where "cost_usd > 0.01 and error.kind == 'quota'"` as an Arrow filter. PURE.

A small part of Python's expressions: column names (with dots into structs), numbers, strings, comparisons, `in`,
`is None`, `and`, `or`, `not`. Nothing is called or evaluated.
"""

import ast
import functools
import operator
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pyarrow as pa

from batchrun import compute as pc
from batchrun.errors import JobError

_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}


class RowFilter:
    """A filter, and the columns it needs."""

    def __init__(self, text: str, schema: pa.Schema) -> None:
        """Parses the expression.

        Raises:
            JobError: the expression is invalid, or names an unknown column.
        """
        self._text = text
        self._schema = schema
        self.columns: list[str] = []
        try:
            self.expression: pc.Expression = self._read(ast.parse(text.strip(), mode="eval").body)
        except (SyntaxError, RecursionError, MemoryError, ValueError) as error:
            raise self._wrong("not an expression") from error

    def _wrong(self, why: str) -> JobError:
        return JobError(f"--where {self._text}: {why}; expected a comparison such as cost_usd > 0.01")

    def _read(self, node: ast.expr) -> Any:
        match node:
            case ast.BoolOp(op=ast.And(), values=values):
                return functools.reduce(operator.and_, map(self._read, values))
            case ast.BoolOp(op=ast.Or(), values=values):
                return functools.reduce(operator.or_, map(self._read, values))
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return ~self._read(operand)
            case ast.Compare(left=left, ops=[op], comparators=[right]):
                return self._compare(left, op, right)
            case ast.Name() | ast.Attribute():
                return self._column(node)[0]
        raise self._wrong("only comparisons of columns are allowed")

    def _compare(self, left: ast.expr, op: ast.cmpop, right: ast.expr) -> Any:
        column, type_ = self._column(left)
        match op, right:
            case ((ast.Is() | ast.IsNot()), ast.Constant(value=None)):
                return column.is_null() if isinstance(op, ast.Is) else column.is_valid()
            case ((ast.In() | ast.NotIn()), (ast.List(elts=items) | ast.Tuple(elts=items) | ast.Set(elts=items))):
                equal = [column == pc.scalar(_literal(item, type_)) for item in items]
                found = functools.reduce(operator.or_, equal, pc.scalar(False))
                return found if isinstance(op, ast.In) else ~found | column.is_null()
        if type(op) not in _COMPARE:
            raise self._wrong("unknown comparison")
        try:
            return _COMPARE[type(op)](column, pc.scalar(_literal(right, type_)))
        except TypeError as error:
            raise self._wrong("a column can be compared only with a number or a text") from error

    def _column(self, node: ast.expr) -> tuple[pc.Expression, pa.DataType]:
        path: list[str] = []
        while isinstance(node, ast.Attribute):
            path.insert(0, node.attr)
            node = node.value
        if not isinstance(node, ast.Name):
            raise self._wrong("the left side is not a column")
        path.insert(0, node.id)
        if path[0] not in self._schema.names:
            raise self._wrong(f"there is no column {path[0]} ({', '.join(self._schema.names)})")
        self.columns.append(path[0])
        type_ = self._schema.field(path[0]).type
        for name in path[1:]:
            if not pa.types.is_struct(type_) or type_.get_field_index(name) < 0:
                raise self._wrong(f"there is no {'.'.join(path)}")
            type_ = type_.field(name).type
        return pc.field(*path) if len(path) > 1 else pc.field(path[0]), type_


def _literal(node: ast.expr, type_: pa.DataType) -> Any:
    """A number or text; Decimal for a column of money, so no digit is lost."""
    value = ast.literal_eval(node)
    if not isinstance(value, bool | int | float | str):
        raise TypeError(value)
    return Decimal(str(value)) if pa.types.is_decimal(type_) and not isinstance(value, str) else value
