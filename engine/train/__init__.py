"""The training loop on DeepSpeed: engine, checkpoints, monitor."""
