"""A layer whose attention takes packed tokens is the layer on the padded grid, and asks a GPU for less."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from transformers import BertConfig

from engine.kernels import cuda, dispatch, reference
from engine.model.bert import BertModel
from engine.model.layers import BertLayer
from engine.model.packing import Packing, pack
from tests.kernels.recorder import Recorder

Choose = Callable[[ModuleType | None], None]


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch) -> Choose:
    """Says what attention runs on."""
    return lambda kernels: monkeypatch.setattr(dispatch, "attention", lambda *_: kernels)


def layer_of(config: BertConfig, dtype: torch.dtype) -> BertLayer:
    generator = torch.Generator().manual_seed(7)
    layer = BertLayer(config)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return layer.to(dtype).eval()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)], ids=str)
@pytest.mark.parametrize("read", [None, [0, 3, 5, 6, 11], [0, 6, 7]], ids=str)
@pytest.mark.parametrize("spare", [0, 3])
@pytest.mark.parametrize("lengths", [[6, 1, 5], [12], [6, 6]], ids=str)
def test_a_layer_is_that_of_the_grid(
    lengths: list[int],
    spare: int,
    read: list[int] | None,
    dtype: torch.dtype,
    bound: float,
    config: BertConfig,
    choose: Choose,
) -> None:
    tokens, generator = sum(lengths), torch.Generator().manual_seed(1)
    start = torch.randn(tokens + spare, config.hidden_size, generator=generator).to(dtype)
    start[tokens:] = 0.0
    grad = torch.randn(start.shape, generator=generator).to(dtype)
    rows = None if read is None else torch.tensor(read)
    asked = tokens if read is None else len(read)
    results = []
    for kernels in (reference, None):
        choose(kernels)
        layer, hidden = layer_of(config, dtype), start.clone().requires_grad_()
        states = layer(hidden, Packing.from_lengths(torch.tensor(lengths), tokens, max(lengths)), rows)[:asked]
        states.backward(grad[:asked])
        gradients = [parameter.grad for parameter in layer.parameters()]
        assert hidden.grad is not None
        results.append([states.detach(), hidden.grad[:tokens], *gradients])
    for packed, grid in zip(*results, strict=True):
        assert packed is not None
        assert grid is not None
        # a key's bias changes no probability, so its gradient is nothing but rounding
        assert float((packed - grid).abs().max()) <= bound * max(1.0, float(grid.abs().max()))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_in_training_drops_the_same_again_when_it_recomputes(
    checkpointing: bool, config: BertConfig, padded: dict[str, Tensor], choose: Choose
) -> None:
    choose(reference)
    torch.manual_seed(0)
    model = BertModel(config, activation_checkpointing=checkpointing).train()
    batch = pack(**padded)
    torch.manual_seed(1)
    states, pooled = model(**batch, read=torch.tensor([2, 9, 20]))
    (states.sum() + pooled.sum()).backward()
    norm = sum(float(parameter.grad.square().sum()) for parameter in model.parameters() if parameter.grad is not None)
    torch.manual_seed(0)
    again = BertModel(config, activation_checkpointing=not checkpointing).train()
    torch.manual_seed(1)
    other, _ = again(**batch, read=torch.tensor([2, 9, 20]))
    (other.sum() + _.sum()).backward()
    assert torch.equal(states, other)
    right = sum(float(parameter.grad.square().sum()) for parameter in again.parameters() if parameter.grad is not None)
    assert norm == right > 0


def recorded(config: BertConfig) -> Recorder:
    """What forward and backward pass of a ragged micro-batch ask of a device, where some states are read.

    The device is that of shapes: it has no values to look at, as a GPU's are far, and has gradients without a GPU.
    """
    model = BertModel(config).to("meta", torch.bfloat16)
    ids, lengths, read = (torch.ones(count, dtype=torch.int64, device="meta") for count in (37, 4, 8))
    with Recorder() as recorder:
        states, pooled = model(ids, ids, ids, lengths, max_length=12, read=read)
        (states.sum() + pooled.sum()).backward()
    return recorder


def one_operator(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor, dropout_p: float) -> Tensor:
    """Torch's attention as it runs on a GPU where there is a mask; shapes alone would get its many small steps."""
    bias = torch.where(attn_mask, 0.0, -torch.inf).to(query.dtype).expand(*query.shape[:3], key.shape[2])
    attend = torch.ops.aten._scaled_dot_product_efficient_attention
    context: Tensor = attend(query, key, value, bias, True, dropout_p)[0]
    return context


#: operators that only the grid needs
GRID = {"arange", "repeat_interleave", "index_copy", "index_copy_", "new_zeros", "lt"}


def test_a_micro_batch_on_a_gpu_never_waits_and_launches_less_without_the_grid(
    config: BertConfig, choose: Choose, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(F, "scaled_dot_product_attention", one_operator)
    launches = {}
    for kernels, layers in itertools.product((cuda, None), (1, 2)):
        choose(kernels)
        config.num_hidden_layers = layers
        recorder = recorded(config)
        assert recorder.waits == []
        launches[kernels, layers] = recorder.launches()
    names = launches[cuda, 2]
    assert names.count("varlen_attention") == names.count("varlen_attention_backward") == 2
    counts = {which: len(names) for which, names in launches.items()}
    a_layer = {kernels: counts[kernels, 2] - counts[kernels, 1] for kernels in (cuda, None)}
    once = {kernels: counts[kernels, 1] - a_layer[kernels] for kernels in (cuda, None)}
    # 47 and 62 a layer, 40 and 51 for the bounds or the grid, embeddings and pooler, with torch 2.13
    assert a_layer[None] - a_layer[cuda] >= 12
    assert once[None] - once[cuda] >= 8
    assert not GRID.difference({"new_zeros"}).intersection(names)
