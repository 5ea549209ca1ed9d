"""The training engine: data, model, optimisation, tasks and the training loop."""

__version__ = "0.1.0"
