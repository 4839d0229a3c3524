"""What a run tells of itself: its summary, where it stands, and the bill over many."""
