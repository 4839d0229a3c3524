"""What a test must allow a timer when it compares a time it measured with the wait that made it."""

TIMER_S = 0.002
"""How early a timer may ring: libuv, so uvloop, counts whole milliseconds from a time it read before (docs.libuv.org,
"Timer handle"), and asyncio rings up to the resolution of its clock too soon.
"""
