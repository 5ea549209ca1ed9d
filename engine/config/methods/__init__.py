"""What a run may train with beside the plain loss of its task over all weights: a section a file."""
