"""The ranks of a run: they meet, join, and share a machine."""
