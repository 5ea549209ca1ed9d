"""Search for the best options of a training: trials proposed by Optuna, each an ordinary run."""
