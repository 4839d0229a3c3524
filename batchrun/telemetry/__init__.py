"""What other programs see of a run while it works: views of its summary. Off unless the job has `[telemetry]`."""
