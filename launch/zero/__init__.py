"""RunConfig -> DeepSpeed configuration; DeepSpeed JSON files of a user."""
