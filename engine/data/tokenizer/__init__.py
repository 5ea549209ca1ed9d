"""Vocabularies: learned here, or read from a Hugging Face folder and obeyed or refused."""
