"""One model, and one server of it for the tests that change nothing of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.serve.live import Live, serving
from tests.predict.models import write_model


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("classifier"), "SequenceClassification", ("bad", "fair", "good"))


@pytest.fixture(scope="module")
def live(classifier: Path) -> Iterator[Live]:
    """Its bodies have at most 4,096 bytes, and its clients half a second."""
    with serving(classifier, max_body=4096, max_rows=8, max_tokens=100, client_timeout=0.5) as server:
        yield server
