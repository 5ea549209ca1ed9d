"""A small prepared store, made once for every test of training."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.data.prepare import PrepareConfig, prepare


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded corpus with a vocabulary of 1,000 pieces."""
    folder = tmp_path_factory.mktemp("stores") / "embedded"
    prepare(PrepareConfig(source=["embedded"], output=str(folder), vocab_size=1000, workers=0))
    return folder
