"""The run on disk: its directory, the checkpoint database, the in-flight slots, chunks, parts and the result."""
