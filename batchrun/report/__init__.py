"""Reports on runs: the summary and state of one, and the bill over many."""
