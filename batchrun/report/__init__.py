"""What a run reports: its summary, its state, and the bill over many runs."""
