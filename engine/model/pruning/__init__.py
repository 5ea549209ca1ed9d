"""What can be taken out of an encoder: attention heads and feed-forward neurons, and when."""
