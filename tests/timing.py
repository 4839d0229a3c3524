"""What tests must know of clocks: how early a timer may ring, and where no day ends while a test runs."""

from datetime import datetime
from zoneinfo import ZoneInfo

TIMER_S = 0.002
"""How early a timer may ring: libuv, so uvloop, counts whole milliseconds from a time it read before (docs.libuv.org,
"Timer handle"), and asyncio rings up to the resolution of its clock too soon.
"""


def zone_before_midnight() -> str:
    """The name of a time zone whose present day lasts another hour at least."""
    return next(zone for zone in ("Asia/Tokyo", "Europe/Berlin") if datetime.now(ZoneInfo(zone)).hour < 23)
