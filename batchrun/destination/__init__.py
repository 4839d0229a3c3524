"""A run whose result goes to an object store: `place` publishes it, `replica` keeps its parts there while it works."""
