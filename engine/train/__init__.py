"""The training loop on DeepSpeed, its checkpoints, its curves, and what watches it."""
