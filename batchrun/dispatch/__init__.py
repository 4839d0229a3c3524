"""The event loop's part of a run: it sends pending rows and reports progress."""
