"""Bodies that differ in their texts alone: each text is encoded once, for the body and for its key. PURE."""

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import msgspec

from batchrun.request.templates import Columns, text_template

_HOLE = b"\0"
"""A byte that JSON can't hold: where a text goes."""

_encode = msgspec.json.Encoder().encode
_canonical = msgspec.json.Encoder(order="deterministic").encode

KEY = hashlib.blake2b(digest_size=16)
"""To be copied: faster than a new one, which reads its parameters."""


class Frame:
    """The constant bytes of a job's bodies. `message_texts` are templates by role; `fields` is the rest of each body,
    in its order; `unkeyed` names the fields that are not part of the question, so not of its key, which ends with
    `endpoint_name`.
    """

    def __init__(
        self,
        model: str,
        message_texts: Sequence[tuple[str, str]],
        fields: Mapping[str, Any],
        unkeyed: Collection[str],
        endpoint_name: bytes,
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
        question = _canonical({name: value for name, value in body.items() if name not in unkeyed})
        self._body = _pieces(_encode(body), len(self._texts))
        first, *self._rest_of_question = _pieces(question + endpoint_name, len(self._texts))
        self._key = KEY.copy()
        self._key.update(first)  # once for all rows: a system prompt may be longer than their texts

    def filled(self, columns: Columns) -> tuple[bytes, bytes]:
        """The body of a row and its key, which is of the same body with all names sorted.

        Raises:
            InputError: a template can't be rendered.
            UnicodeEncodeError: a text holds a lone surrogate.
        """
        texts = [_encode(text(columns)) for text in self._texts]
        body, question, key = self._body.copy(), self._rest_of_question.copy(), self._key.copy()
        body[1::2] = question[::2] = texts
        key.update(b"".join(question))
        return b"".join(body), key.digest()


def _pieces(framed: bytes, holes: int) -> list[bytes]:
    """The constant bytes, and an empty place for a text between each two of them."""
    first, *others = framed.split(_HOLE, holes)  # an endpoint's name has the same byte behind them
    return [first, *(piece for other in others for piece in (b"", other))]
