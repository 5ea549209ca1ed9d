from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import BertConfig

from engine.kernels import dispatch
from engine.model.build import initialise
from engine.model.heads import BertForSequenceClassification
from engine.model.packing import pack

LABELS = torch.tensor([0, 2, 1, 1, 2])


@pytest.fixture
def model(config: BertConfig) -> BertForSequenceClassification:
    config.num_labels = 3
    model = BertForSequenceClassification(config).eval()
    initialise(model, seed=2)
    return model


def test_logits_and_gradients_equal_transformers(
    config: BertConfig, model: BertForSequenceClassification, padded: dict[str, Tensor]
) -> None:
    peer = transformers.BertForSequenceClassification(config).eval()
    peer.load_state_dict(model.state_dict())
    logits = model(**pack(**padded))
    cross_entropy(logits, LABELS).backward()
    expected = peer(**padded, labels=LABELS)
    expected.loss.backward()
    torch.testing.assert_close(logits, expected.logits, rtol=1e-5, atol=1e-5)
    theirs = dict(peer.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-5, atol=1e-5)


def test_dropout_lies_where_transformers_has_it(
    config: BertConfig, model: BertForSequenceClassification, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the last states of all tokens computed, as there; dropout would draw fewer numbers otherwise."""
    monkeypatch.setattr(dispatch, "_selected", "reference")
    forward = model.bert.forward
    monkeypatch.setattr(model.bert, "forward", lambda *inputs, read: forward(*inputs))
    ids = torch.randint(1, 97, (3, 16), generator=torch.Generator().manual_seed(0))
    peer = transformers.BertForSequenceClassification(config).train()
    peer.load_state_dict(model.state_dict())
    torch.manual_seed(8)
    logits = model.train()(**pack(ids, torch.ones_like(ids)))
    torch.manual_seed(8)
    torch.testing.assert_close(logits, peer(ids).logits, rtol=1e-5, atol=1e-5)


def test_classifier_dropout_overrides_hidden_dropout(config: BertConfig) -> None:
    config.hidden_dropout_prob = 0.3
    assert BertForSequenceClassification(config).dropout.p == 0.3
    config.classifier_dropout = 0.0
    assert BertForSequenceClassification(config).dropout.p == 0.0


def test_logits_are_fp32_in_bf16_models(model: BertForSequenceClassification, padded: dict[str, Tensor]) -> None:
    assert model.to(torch.bfloat16)(**pack(**padded)).dtype == torch.float32
