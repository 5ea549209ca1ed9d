"""The curves of a run and where they go."""
