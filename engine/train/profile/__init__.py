"""Recorded steps: where their time went."""
