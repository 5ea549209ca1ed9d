"""A small corpus, and shards so small that it has several."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.store.corpora import TEXTS, write_corpus


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "corpus.jsonl", TEXTS)


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut blocks after 40 kB, so that a small corpus has several."""
    monkeypatch.setattr("engine.data.store.blocks.MEGABYTE", 40_000)
