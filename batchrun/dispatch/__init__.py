"""Pending rows are asked: the event loop's share of a run, and what it tells while it works."""
