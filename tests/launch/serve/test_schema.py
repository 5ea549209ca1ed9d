"""schemathesis asks a server what its own OpenAPI page says it takes, and what it says it doesn't."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings

from tests.launch.serve.live import Live, serving
from tests.predict.models import write_model

HEADS = {"SequenceClassification": ("bad", "good"), "TokenClassification": ("O", "B-PER"), "MultipleChoice": ("x",)}
ASKED = [("SequenceClassification", path, "POSITIVE") for path in ("/", "/health", "/ready", "/metrics")]
ASKED += [("SequenceClassification", "/predict", mode) for mode in ("POSITIVE", "NEGATIVE")]
OTHERS = [(head, "/predict", mode) for head in list(HEADS)[1:] for mode in ("POSITIVE", "NEGATIVE")]


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Live]]:
    """A server of a head, the same one each time."""
    with contextlib.ExitStack() as stack:

        @cache
        def server(head: str) -> Live:
            folder = write_model(tmp_path_factory.mktemp("model"), head, HEADS[head])
            return stack.enter_context(serving(folder))

        yield server


@pytest.mark.parametrize(
    ("head", "path", "mode"), [*ASKED, *(pytest.param(*asked, marks=pytest.mark.slow) for asked in OTHERS)]
)
def test_a_server_keeps_to_its_schema(servers: Callable[[str], Live], head: str, path: str, mode: str) -> None:
    schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{servers(head).port}/openapi.json")
    operation = schema[path]["POST" if path == "/predict" else "GET"]
    statuses: Counter[int] = Counter()

    @settings(max_examples=15, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
    @given(operation.as_strategy(generation_mode=schemathesis.GenerationMode[mode]))
    def check(case: schemathesis.Case) -> None:
        statuses[case.call_and_validate().status_code] += 1

    check()
    assert statuses[200] if mode == "POSITIVE" else statuses[422]
