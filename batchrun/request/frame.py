"""Bodies that differ in their texts alone: each text is encoded once, for the body and for its question. PURE."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import msgspec

from batchrun.request.templates import Columns, text_template

_HOLE = b"\0"
"""A byte that JSON can't hold: where a text goes."""

_encode = msgspec.json.Encoder().encode
_canonical = msgspec.json.Encoder(order="deterministic").encode

_Pieces = list[bytes]
"""Constant bytes, and an empty place for a text between each two of them."""


class Frame:
    """The constant bytes of a job's bodies. `message_texts` are templates by role; `fields` is the rest of each body,
    in its order; `unkeyed` names the fields that are not part of the question, so not of its key.
    """

    def __init__(
        self, model: str, message_texts: Sequence[tuple[str, str]], fields: Mapping[str, Any], unkeyed: Collection[str]
    ) -> None:
        """Compiles the templates.

        Raises:
            JobError: one is invalid.
        """
        self.model = model
        self._texts: list[Callable[[Columns], str]] = []
        messages: list[dict[str, Any]] = []
        for role, text in message_texts:
            is_constant = "{" not in text
            messages.append({"role": role, "content": text if is_constant else msgspec.Raw(_HOLE)})
            if not is_constant:
                self._texts.append(text_template(text, f"request.{'prompt' if role == 'user' else role}"))
        body = {"model": model, "messages": messages, **fields}
        self._body = _pieces(_encode(body))
        self._question = _pieces(_canonical({name: value for name, value in body.items() if name not in unkeyed}))

    def filled(self, columns: Columns) -> tuple[bytes, bytes]:
        """The body of a row, and the question that it asks: the same with all names sorted.

        Raises:
            InputError: a template can't be rendered.
            UnicodeEncodeError: a text holds a lone surrogate.
        """
        texts = [_encode(text(columns)) for text in self._texts]
        return _join(self._body, texts), _join(self._question, texts)


def _join(pieces: _Pieces, texts: list[bytes]) -> bytes:
    filled = pieces.copy()
    filled[1::2] = texts
    return b"".join(filled)


def _pieces(framed: bytes) -> _Pieces:
    first, *others = framed.split(_HOLE)
    return [first, *(piece for other in others for piece in (b"", other))]
