"""The curves of a run: averages, and back ends that record them."""
