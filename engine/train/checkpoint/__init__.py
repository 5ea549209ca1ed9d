"""Checkpoints: whole or absent, verified, independent of the layout."""
