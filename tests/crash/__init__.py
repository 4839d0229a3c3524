"""Kills the real command line at marked places and random moments, resumes it, and judges it by the ledger alone.

`python -m tests.crash 1000 --seed 7`; docs/crash.md says how it works and what a long run found.
"""
