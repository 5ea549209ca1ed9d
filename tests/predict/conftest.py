"""Tiny models, made once a module."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.predict.models import TAGS, write_model


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("classifier"), "SequenceClassification", ("bad", "fair", "good"))


@pytest.fixture(scope="module")
def tagger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tagger"), "TokenClassification", TAGS)
