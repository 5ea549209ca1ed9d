"""What watches a run: stops, faults, hangs, slow ranks."""
