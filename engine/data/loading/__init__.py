"""Exact, resumable global batches of any sample source."""
