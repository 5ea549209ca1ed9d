"""The same training with several seeds, or on the folds of its data, and one report of what they score."""
