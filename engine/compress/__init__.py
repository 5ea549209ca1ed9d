"""Smaller and faster models from trained ones, each step with the accuracy that it costs."""
