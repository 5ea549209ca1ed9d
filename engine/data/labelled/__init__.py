"""Labelled files -> examples -> encoded samples."""
