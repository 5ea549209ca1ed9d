"""Tests of engine/train/adapters."""
