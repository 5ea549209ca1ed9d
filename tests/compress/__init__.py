"""Tests of engine/compress."""
