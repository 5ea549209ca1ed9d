"""Tests of engine/compress/quantise."""
