"""Vectors of texts: contrastive training, similarity, retrieval."""
