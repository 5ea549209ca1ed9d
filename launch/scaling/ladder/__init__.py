"""The runs of a ladder: read, planned, trained, measured."""
