"""What a step's kernels on a GPU compute and move, and how long that takes at least."""
