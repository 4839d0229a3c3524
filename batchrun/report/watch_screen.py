"""The screen of `batchrun watch`, for a terminal of any width. PURE."""

import unicodedata

from batchrun.errors import harmless
from batchrun.report.progress import short_number
from batchrun.run_summary import Summary

FILLED, EMPTY = "█", "░"
HOME, REST_OF_LINE, REST_OF_SCREEN = "\x1b[H", "\x1b[K", "\x1b[J"
"""ECMA-48: move to the top left; erase to the end of the line; erase to the end of the screen."""


def frame(summary: Summary, lines: list[str], columns: int, rows: int) -> str:
    """One screen: the status lines, cut to the width, a progress bar, and how rows ended."""
    shown = [*lines, ""]
    if summary.rows:
        room = max(4, min(60, columns - 24))  # a name and a number are beside the bar
        shown.append(_bar("done", summary.done, summary.rows, room))
        shown += [_bar(str(status), count, summary.rows, room) for status, count in summary.by_status.items()]
        reasons = {} if summary.retrying is None else summary.retrying.reasons
        shown += [_bar(f"retry {reason}", count, summary.rows, room) for reason, count in reasons.items()]
        if summary.example_error:
            shown.append(f"for example: {summary.example_error}")
    shown = shown[: max(1, rows - 1)]
    # drawn over the old line and erased to its end: a resize leaves no torn lines
    drawn = (cut(harmless(line).replace("\n", " "), columns - 1) + REST_OF_LINE + "\r\n" for line in shown)
    return HOME + "".join(drawn) + REST_OF_SCREEN


def _bar(name: str, count: int, of: int, room: int) -> str:
    filled = min(room, -(-count * room // of)) if count else 0
    return f"{cut(name, 12):<12} {FILLED * filled}{EMPTY * (room - filled)} {short_number(count):>6}"


def cut(text: str, columns: int) -> str:
    """The text cut to that many columns, with an ellipsis if it is longer; wide characters take two."""
    widths = [
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text
    ]
    if sum(widths) <= columns:
        return text
    taken = 0
    for place, width in enumerate(widths):
        if taken + width > columns - 1:
            return text[:place] + "…" * (columns > 0)
        taken += width
    return text
