"""int8 models within a budget of accuracy."""
