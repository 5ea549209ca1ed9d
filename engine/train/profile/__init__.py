"""Recorded steps: a trace, and where their time went."""
