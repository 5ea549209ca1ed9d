"""Losses and best spans of packed windows: those of transformers, and those of a search over all pairs."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import transformers
from torch import Tensor

from engine.config import architecture_of
from engine.tasks.answers.spans import best_spans, log_normaliser, span_losses

SMALL = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 48, "vocab_size": 97}
CONFIGS = {
    "bert": transformers.BertConfig(**SMALL, initializer_range=0.1),
    "roberta": transformers.RobertaConfig(**SMALL, initializer_range=0.1, pad_token_id=1),
    "modernbert": transformers.ModernBertConfig(**SMALL, initializer_range=0.1, pad_token_id=0, local_attention=16),
}
LENGTHS = torch.tensor([7, 1, 40, 12])
#: at both edges of a window, of one token, over the whole of it, and none
LABELS = torch.tensor([[0, 6], [0, 0], [39, 39], [3, 11]])


def without_dropout(config: transformers.PreTrainedConfig) -> transformers.PreTrainedConfig:
    for name, value in config.to_dict().items():
        if "dropout" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    return config


@pytest.mark.parametrize("name", CONFIGS)
def test_losses_and_gradients_are_those_of_transformers(name: str) -> None:
    """transformers counts padding among an answer's places, so its windows are computed one by one."""
    config = without_dropout(CONFIGS[name])
    architecture = architecture_of(config)
    torch.manual_seed(2)
    theirs = architecture.export_class(architecture.class_for("question_answering"))(config)
    ours = architecture.build("question_answering", config, False)
    ours.load_state_dict(theirs.state_dict(), strict=False)
    ids = torch.randint(5, 97, (int(LENGTHS.sum()),))
    expected = [
        theirs(input_ids=part[None], start_positions=label[:1], end_positions=label[1:]).loss
        for part, label in zip(ids.split(LENGTHS.tolist()), LABELS, strict=True)
    ]
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    packed = {"input_ids": ids, "token_type_ids": torch.zeros_like(ids), "position_ids": positions, "lengths": LENGTHS}
    losses = span_losses(ours(**packed), LENGTHS, LABELS)
    torch.testing.assert_close(losses, torch.stack(expected), rtol=1e-5, atol=1e-6)
    losses.mean().backward()
    torch.stack(expected).mean().backward()
    peers = {key: parameter.grad for key, parameter in theirs.named_parameters()}
    # a softmax's gradients cancel in the sums of biases, where rounding alone is left
    largest = max(float(gradient.abs().max()) for gradient in peers.values() if gradient is not None)
    for key, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, peers[key], rtol=1e-5, atol=1e-6 * largest, msg=key)


def test_windows_of_one_length_have_the_loss_of_a_whole_batch() -> None:
    logits = torch.randn(4, 9, 2)
    labels = torch.tensor([[0, 0], [8, 8], [0, 8], [4, 5]])
    expected = sum(
        torch.nn.functional.cross_entropy(logits[..., column], labels[:, column], reduction="none") / 2
        for column in (0, 1)
    )
    torch.testing.assert_close(span_losses(logits.view(36, 2), torch.full((4,), 9), labels), expected)


def test_the_normaliser_bears_large_logits_and_its_gradient_is_the_softmax() -> None:
    logits = torch.tensor([[1e4, -1e4], [1e4, 3.0], [-2e4, 0.0]], requires_grad=True)
    found = log_normaliser(logits, torch.tensor([2, 1]))
    expected = torch.stack([logits[:2].logsumexp(0), logits[2]])
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[0.5, 0.0], [0.5, 1.0], [1.0, 1.0]]))


def searched(logits: Tensor, begin: int, end: int, longest: int) -> list[tuple[float, int, int]]:
    pairs = [(s, e) for s, e in product(range(begin, end), repeat=2) if 0 <= e - s < longest]
    return sorted(((float(logits[s, 0] + logits[e, 1]), s, e) for s, e in pairs), key=lambda found: -found[0])


@pytest.mark.parametrize("longest", [1, 3, 30])
def test_the_best_spans_are_those_of_a_search(longest: int) -> None:
    logits = torch.randn(int(LENGTHS.sum()), 2, generator=torch.Generator().manual_seed(4))
    context = torch.tensor([[2, 6], [0, 1], [10, 38], [11, 11]])
    found = best_spans(logits, LENGTHS, context, 40, longest)
    for window, part in enumerate(logits.split(LENGTHS.tolist())):
        expected = searched(part, *context[window].tolist(), longest)[:40]
        count = int(found.first_logits[window].isfinite().sum())
        assert count == len(expected)
        sums = (found.first_logits + found.last_logits)[window, :count]
        torch.testing.assert_close(sums, torch.tensor([value for value, _, _ in expected]))
        places = torch.stack((found.first[window, :count], found.last[window, :count]), 1).tolist()
        assert places == [[first, last] for _, first, last in expected]


def test_the_best_span_is_found_with_few_candidates_and_ties_go_to_the_first() -> None:
    logits = torch.zeros(10, 2)
    found = best_spans(logits, torch.tensor([10]), torch.tensor([[3, 9]]), 2, 30)
    assert (int(found.first[0, 0]), int(found.last[0, 0])) == (3, 3)
    logits[7, 0] = logits[8, 1] = 1.0
    found = best_spans(logits, torch.tensor([10]), torch.tensor([[3, 9]]), 2, 30)
    assert (int(found.first[0, 0]), int(found.last[0, 0])) == (7, 8)
