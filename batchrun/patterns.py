"""Patterns that are compiled when they are first used.

Those for the words of refusals and failures take 16 ms to compile, and most starts need none of them.
"""

import re
from collections.abc import Iterator
from functools import cached_property


class Pattern:
    """As `re.compile`, later."""

    def __init__(self, text: str, flags: int = 0) -> None:
        self._text, self._flags = text, flags

    @cached_property
    def _compiled(self) -> re.Pattern[str]:
        return re.compile(self._text, self._flags)

    def search(self, text: str) -> re.Match[str] | None:
        return self._compiled.search(text)

    def fullmatch(self, text: str) -> re.Match[str] | None:
        return self._compiled.fullmatch(text)

    def finditer(self, text: str) -> Iterator[re.Match[str]]:
        return self._compiled.finditer(text)

    def sub(self, new: str, text: str) -> str:
        return self._compiled.sub(new, text)
