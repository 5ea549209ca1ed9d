"""Layers that sequences skip: what is computed is what transformers computes of each sequence without them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from engine.config import architecture_of
from engine.errors import UserError
from engine.model.packing import pack
from engine.model.regularised.layer_drop import drop_layers
from tests.model.test_task_heads import CONFIGS, LENGTHS, both, padded, their_logits

CHANCE, LAYERS = 0.9, 3
HEADS = ("sequence_classification", "token_classification")


def stack_of(model: nn.Module) -> tuple[nn.Module, str]:
    """The module that holds transformers' list of layers, and the list's name."""
    return next((module, name) for module in model.modules() for name in ("layer", "layers") if hasattr(module, name))


def stays(seed: int) -> Tensor:
    """Whether each layer keeps each sequence, [L, B], from the same draws."""
    torch.manual_seed(seed)
    return torch.stack([torch.rand(len(LENGTHS)) >= CHANCE * (l + 1) / LAYERS for l in range(LAYERS)])  # noqa: E741


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_sequence_sees_the_layers_that_it_keeps(name: str, head: str) -> None:
    theirs, ours = both(name, head)
    drop_layers(ours.train(), CHANCE)
    ids, mask = padded(ours.config)
    parent, listed = stack_of(theirs)
    layers = getattr(parent, listed)
    seen = set()
    for seed in range(6):
        kept = stays(seed)
        torch.manual_seed(seed)
        logits = ours(**pack(ids, mask), max_length=max(LENGTHS))
        parts = logits.split(1 if head == HEADS[0] else LENGTHS)
        for row, part in enumerate(parts):
            seen.add(tuple(kept[:, row].tolist()))
            own = [layer for layer, stays_in in zip(layers, kept[:, row], strict=True) if stays_in]
            setattr(parent, listed, nn.ModuleList(own))
            expected = their_logits(
                theirs, head, ids[row : row + 1, : LENGTHS[row]], mask[row : row + 1, : LENGTHS[row]]
            )
            torch.testing.assert_close(part, expected, rtol=1e-5, atol=1e-5)
    assert len(seen) > 4, "few ways to skip"


@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_a_recomputed_layer_skips_what_it_skipped(name: str) -> None:
    _, plain = both(name, HEADS[0])
    recomputed = architecture_of(plain.config).build(HEADS[0], plain.config, True)
    recomputed.load_state_dict(plain.state_dict())
    batch = pack(*padded(plain.config))
    gradients = []
    for model in (plain, recomputed):
        drop_layers(model.train(), CHANCE)
        torch.manual_seed(1)
        model(**batch).square().sum().backward()
        gradients.append({key: p.grad for key, p in model.named_parameters()})
    assert all(torch.equal(gradients[0][key], gradients[1][key]) for key in gradients[0])
    assert not torch.equal(plain(**batch), plain.eval()(**batch))
    assert torch.equal(plain(**batch), recomputed.eval()(**batch)), "nothing is skipped in an evaluation"


def hooks(model: nn.Module) -> Iterator[float]:
    for module in model.modules():
        yield from (hook.chance for hook in module._forward_hooks.values())  # type: ignore[attr-defined]


def test_the_chance_rises_with_depth() -> None:
    _, model = both("bert", HEADS[0])
    drop_layers(model, 0.0)
    assert not list(hooks(model))
    drop_layers(model, 0.3)
    assert list(hooks(model)) == pytest.approx([0.1, 0.2, 0.3])
    with pytest.raises(UserError, match=r"regularise.layer_drop: 0.3 is not allowed; the model has no layers that can"):
        drop_layers(nn.Linear(2, 2), 0.3)


def test_half_precision_rows_of_no_sequence_stay() -> None:
    """bf16 on a CPU has spare rows behind the last token."""
    _, model = both("modernbert", HEADS[1])
    model.bfloat16().train()
    drop_layers(model, 0.999)
    logits = model(**pack(*padded(model.config)))
    assert logits.shape == (sum(LENGTHS), 5)
    assert bool(logits.isfinite().all())
