"""Prepares a start: the check pass, a changed input, a retry, an estimate."""
