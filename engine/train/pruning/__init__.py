"""What a run does while it prunes: scores units by gradients, and takes them out on a schedule."""
