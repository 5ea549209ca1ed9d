"""Smaller encoders: heads and neurons that matter least are taken out, and layers dropped."""
