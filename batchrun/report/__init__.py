"""What a run reports: its summary, where it stands, and the bill over many runs."""
