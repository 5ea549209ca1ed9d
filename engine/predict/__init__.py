"""Predictions of a trained model on new data, row by row: read, encoded, packed, computed, written in order."""
