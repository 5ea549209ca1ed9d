"""BERT on transformers' configuration and parameter names."""
