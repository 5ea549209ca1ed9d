"""Supervision of a run: requests to stop, faults, hangs, slow ranks."""
