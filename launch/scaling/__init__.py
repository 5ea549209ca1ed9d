"""Studies of scale: ladders of runs, the laws of their losses, and reports."""
