"""What a run will need: bytes, FLOPs, seconds; zerobert plan."""
