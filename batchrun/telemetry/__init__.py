"""Shows a run to other programs while it works: views of its summary. Off unless the job has `[telemetry]`."""
