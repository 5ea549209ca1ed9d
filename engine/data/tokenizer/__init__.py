"""Vocabularies: learned here, or read from a Hugging Face folder whose every setting is followed or refused."""
