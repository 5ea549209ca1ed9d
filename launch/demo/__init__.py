"""zerobert demo: the whole way on text that ships with Python."""
