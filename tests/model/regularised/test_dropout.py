"""The schedule of dropout reaches every module that drops, those of fused layers too."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from engine.config import ModelConfig, architecture_of
from engine.errors import UserError
from engine.model.build import build_config
from engine.model.packing import pack
from engine.model.regularised.dropout import Dropouts, share_at
from tests.model.test_task_heads import padded


def dropping(name: str, dropout: float = 0.5) -> nn.Module:
    """A classifier of an architecture with all its dropout at one value, in training mode."""
    model = ModelConfig("tiny", name, hidden_dropout=dropout, attention_dropout=dropout, classifier_dropout=dropout)
    config = build_config(model, 97, 1, ["a", "b"])
    torch.manual_seed(1)
    return architecture_of(config).build("sequence_classification", config, False).train()


@pytest.mark.parametrize("name", ["bert", "roberta", "modernbert"])
def test_without_dropout_training_computes_what_an_evaluation_does(name: str) -> None:
    model = dropping(name)
    batch = pack(*padded(model.config))
    drops = Dropouts(model)
    outputs = []
    for share in (1.0, 0.0, 1.0):
        drops.scale(share)
        torch.manual_seed(2)
        outputs.append(model(**batch))
    first, none, again = outputs
    assert torch.equal(first, again), "the first values come back bit by bit"
    assert not torch.allclose(first, none)
    torch.testing.assert_close(none, model.eval()(**batch))


@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_a_share_is_a_model_of_that_dropout(name: str) -> None:
    """One that was built with it, from the same draws."""
    model, lower = dropping(name, 0.5), dropping(name, 0.125)
    batch = pack(*padded(model.config))
    Dropouts(model).scale(share_at(3, 5, 0.0))
    lower.load_state_dict(model.state_dict())
    outputs = []
    for each in (model, lower):
        torch.manual_seed(2)
        outputs.append(each(**batch))
    assert torch.equal(*outputs)


def test_the_first_and_last_step_have_their_shares() -> None:
    assert [share_at(step, 3, 2.0) for step in (0, 1, 2)] == [1.0, 1.5, 2.0]
    assert share_at(0, 1, 0.0) == 1.0


@pytest.mark.parametrize(
    ("dropout", "end", "said"),
    [
        (0.0, 0.5, r"regularise.dropout_end: 0.5 is not allowed; the model has no dropout; give model.hidden_dropout"),
        (0.5, 2.0, r"regularise.dropout_end: 2.0 is not allowed; dropout of 0.5 would end at 1; give less than 2"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(dropout: float, end: float, said: str) -> None:
    with pytest.raises(UserError, match=said):
        Dropouts(dropping("bert", dropout)).check(end)
    Dropouts(dropping("bert", 0.5)).check(1.9)
