"""The command line and recipes -> one validated RunConfig."""
