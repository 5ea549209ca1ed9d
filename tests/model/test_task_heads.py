"""The heads of fine-tuning tasks in every architecture: logits, gradients and exports are those of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from engine.config import architecture_of
from engine.model.folder import described, export_huggingface
from engine.model.packing import pack

LENGTHS = (5, 150, 33)
SMALL = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 3, "intermediate_size": 48, "vocab_size": 97}
#: weights near 0 would leave rounding alone of gradients that cancel in their sums
WIDE = {"initializer_range": 0.1, "max_position_embeddings": 256, "num_labels": 5}
CONFIGS = {
    "bert": transformers.BertConfig(**SMALL, **WIDE),
    "roberta": transformers.RobertaConfig(**SMALL, **WIDE, pad_token_id=1),
    "xlm-roberta": transformers.XLMRobertaConfig(**SMALL, **WIDE, pad_token_id=1),
    "modernbert": transformers.ModernBertConfig(**SMALL, **WIDE, pad_token_id=0, local_attention=16),
}
HEADS = ("sequence_classification", "token_classification", "question_answering", "multiple_choice", "embeddings")


def config_of(name: str, head: str) -> Any:
    """Without dropout; of an answer there are two logits a token."""
    values = {**CONFIGS[name].to_dict(), "num_labels": 2 if head == "question_answering" else 5}
    for dropout in ("hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout", "mlp_dropout"):
        if dropout in values:
            values[dropout] = 0.0
    return type(CONFIGS[name])(**values)


def padded(config: Any) -> tuple[Tensor, Tensor]:
    """Token ids and mask of sequences of `LENGTHS`."""
    ids = torch.full((len(LENGTHS), max(LENGTHS)), config.pad_token_id)
    for row, length in enumerate(LENGTHS):
        ids[row, :length] = torch.randint(5, config.vocab_size, (length,), generator=torch.Generator().manual_seed(row))
    return ids, (ids != config.pad_token_id).long()


def both(name: str, head: str) -> tuple[Any, Any]:
    """transformers' model with random weights and ours with the same."""
    config = config_of(name, head)
    architecture = architecture_of(config)
    torch.manual_seed(3)
    theirs = architecture.export_class(architecture.class_for(head))(config).eval()
    ours = architecture.build(head, config, False).eval()
    ours.load_state_dict(theirs.state_dict(), strict=False)
    assert dict(ours.named_parameters()).keys() == dict(theirs.named_parameters()).keys()
    return theirs, ours


def their_logits(model: Any, head: str, ids: Tensor, mask: Tensor) -> Tensor:
    """[B, classes], or [T, classes] of the tokens that are no padding; of embeddings the mean states, [B, H]."""
    if head == "multiple_choice":  # one question, whose choices are the sequences
        logits: Tensor = model(input_ids=ids[None], attention_mask=mask[None]).logits
        return logits.reshape(-1, 1)
    output = model(input_ids=ids, attention_mask=mask)
    if head == "embeddings":
        return (output.last_hidden_state * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
    if head == "question_answering":
        return torch.stack((output.start_logits, output.end_logits), -1)[mask.bool()]
    logits = output.logits
    return logits[mask.bool()] if head == "token_classification" else logits


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_gradients_are_theirs(name: str, head: str) -> None:
    theirs, ours = both(name, head)
    ids, mask = padded(ours.config)
    expected, logits = their_logits(theirs, head, ids, mask), ours(**pack(ids, mask), max_length=max(LENGTHS))
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    (logits * weights).sum().backward()
    (expected * weights).sum().backward()
    peers = {key: parameter.grad for key, parameter in theirs.named_parameters() if parameter.grad is not None}
    assert [key for key, parameter in ours.named_parameters() if parameter.grad is None] == [
        key for key in dict(theirs.named_parameters()) if key not in peers
    ], "the pooler of an encoder alone"
    # the gradient of a key's bias is 0 but for rounding, since attention doesn't depend on it
    least = 1e-3 * max(float(gradient.abs().max()) for gradient in peers.values())
    own = {key: parameter for key, parameter in ours.named_parameters() if key in peers}
    for key, parameter in own.items():
        apart = (parameter.grad - peers[key]).abs().max() / peers[key].abs().max().clamp(min=least)
        assert float(apart) < 1e-5, key


@pytest.mark.parametrize("head", ["token_classification", "question_answering"])
@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_that_are_read_have_their_logits(name: str, head: str) -> None:
    _, ours = both(name, head)
    batch, read = pack(*padded(ours.config)), torch.tensor([0, 3, 5, 90, 187])
    torch.testing.assert_close(ours(**batch, read=read), ours(**batch)[read], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", CONFIGS)
def test_an_export_is_compared_with_its_class(name: str, head: str, tmp_path: Path) -> None:
    _, ours = both(name, head)
    config = described(ours.config, architecture_of(ours.config).class_for(head))
    told = export_huggingface(ours.state_dict(), config, {}, tmp_path / "export")
    assert told is not None
    assert max(told.differences.values()) < told.bound
    assert len(told.differences) == (2 if head == "question_answering" else 1)
