"""`zerobert prune` and `zerobert trim-vocabulary`."""
