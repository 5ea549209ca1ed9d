"""The top of an encoder that starts afresh, in every architecture and as a task builds it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import AdapterConfig, RegulariseConfig, RunConfig, TrainConfig, architecture_of
from engine.errors import UserError
from engine.model.build import initialise
from engine.model.pretrained import load_pretrained
from engine.model.regularised.fresh import check_fresh, top_of
from tests.model.test_task_heads import CONFIGS, both, config_of
from tests.tasks.labels import maker

TOP = re.compile(r"(encoder\.layer|layers)\.[12]\.|\.pooler\.|^pooler\.")


@pytest.mark.parametrize("head", ["multiple_choice", "embeddings"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_top_alone_is_the_initialiser_s(name: str, head: str, tmp_path: Path) -> None:
    theirs, _ = both(name, head)
    theirs.save_pretrained(tmp_path)
    config = config_of(name, head)
    drawn, model = (architecture_of(config).build(head, config, False) for _ in range(2))
    for each in (drawn, model):
        initialise(each, 7)
    report = load_pretrained(model, tmp_path, without=top_of(model, 2))
    given, initial = theirs.state_dict(), dict(drawn.named_parameters())
    fresh = set()
    for key, parameter in model.named_parameters():
        assert torch.equal(parameter, (initial if TOP.search(key) else given)[key]), key
        fresh |= {key} if TOP.search(key) else set()
    assert set(report.initialised) == fresh
    assert "newly initialised: encoder layers 1 to 2" in str(report)
    assert ("pooler (2)" in str(report)) == any("pooler" in key for key in fresh) == (name != "modernbert")
    assert top_of(model, 0) == ()


def test_a_task_says_what_started_fresh(tmp_path: Path) -> None:
    make = maker(tmp_path)
    plain = make("sequence_classification").build_model().state_dict()
    task = make("sequence_classification")
    task.config.regularise = RegulariseConfig(fresh_layers=1)
    fresh = task.build_model().state_dict()
    assert "taken: embeddings (5); newly initialised: encoder layers 0 (16), pooler (2)" in str(task.loaded)
    changed = {key for key in plain if not torch.equal(plain[key], fresh[key])}
    assert {key.split(".")[1] for key in changed} == {"encoder", "pooler"}
    assert torch.equal(task.build_model().state_dict()["bert.pooler.dense.weight"], fresh["bert.pooler.dense.weight"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "regularise.fresh_layers: 4 is not allowed; bert has 3 layers"),
        ({"adapter": AdapterConfig("lora")}, "regularise.fresh_layers: 2 is not allowed; adapter.method lora adapts"),
        ({"train": TrainConfig(freeze="layers:0-1")}, "'layers:0-1' is not allowed; regularise.fresh_layers 2 lets la"),
        ({"train": TrainConfig(freeze="pooler")}, "train.freeze: 'pooler' is not allowed; regularise.fresh_layers 2"),
        ({"train": TrainConfig(freeze="encoder")}, "freeze none of them"),
    ],
)
def test_what_cannot_start_fresh_is_refused(changes: dict[str, Any], said: str) -> None:
    config = RunConfig(regularise=RegulariseConfig(fresh_layers=2 if changes else 4))
    config.model.init_from = "bert"
    with pytest.raises(UserError, match=re.escape(said)):
        check_fresh(replace(config, **changes), 3)
    check_fresh(replace(config, regularise=RegulariseConfig(fresh_layers=2), train=TrainConfig(freeze="layers:0")), 3)
