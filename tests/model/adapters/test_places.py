"""Which linear layers are adapted, also of an encoder alone."""

from __future__ import annotations

import pytest

from engine.config import ARCHITECTURES, AdapterConfig
from engine.config.methods.adapter import frozen_parts
from engine.model.adapters.places import targets


@pytest.mark.parametrize("prefix", ["bert.", ""])
def test_a_frozen_layer_gets_no_adapter(prefix: str) -> None:
    modules = [f"{prefix}encoder.layer.{layer}.attention.self.query" for layer in range(3)]
    adapter = AdapterConfig(method="lora", targets="query")
    found = targets(adapter, ARCHITECTURES.get("bert"), frozen_parts("layers:0-1"), ["classifier", *modules])
    assert found == modules[2:]
