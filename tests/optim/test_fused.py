"""The fused optimizers against torch's AdamW and the equations of LAMB, and their state through save and load."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine.kernels import select
from engine.optim import FusedAdamW, FusedLamb
from engine.optim.fused import adjoined

SHAPES = [(70, 50), (3,), (1,), (40_000,), (0,)]
Optimizer = type[FusedAdamW] | type[FusedLamb]


@pytest.fixture(autouse=True, params=["auto", "reference"])
def _kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    """The C++ kernels, which take tensors where they lie, and plain torch, which gathers them into flat buffers."""
    select(request.param)
    yield
    select("auto")


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": params[:1], "weight_decay": 0.1}, {"params": params[1:], "weight_decay": 0.0}]


def set_gradients(params: list[nn.Parameter], step: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = (torch.randn(p.shape, generator=generator) * scale).to(p.dtype)


def train(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: range, **options: Any) -> None:
    for step in steps:
        set_gradients(params, step, 1.0 / options.get("grad_scale", 1.0))
        optimizer.step(**options)


def assert_equal(ours: list[nn.Parameter], theirs: list[nn.Parameter], tolerance: float = 2e-6) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.detach().float(), b.detach().float(), rtol=tolerance, atol=tolerance)


def test_tensors_are_moved_next_to_each_other_once() -> None:
    tensors = [torch.randn(shape) for shape in SHAPES]
    before = [tensor.clone() for tensor in tensors]
    flat = adjoined(tensors)
    assert torch.equal(flat, torch.cat([tensor.view(-1) for tensor in before]))
    for tensor, old in zip(tensors, before, strict=True):
        assert torch.equal(tensor, old)
    flat.mul_(2.0)
    assert all(torch.equal(tensor, 2.0 * old) for tensor, old in zip(tensors, before, strict=True))
    assert adjoined(tensors).data_ptr() == flat.data_ptr()
    assert adjoined(tensors[1:3]).data_ptr() == tensors[1].data_ptr()
    assert adjoined([*tensors[:2], tensors[3]]).data_ptr() != flat.data_ptr()
    assert torch.equal(flat, 2.0 * torch.cat([tensor.view(-1) for tensor in before]))
    assert adjoined([torch.empty(0), torch.empty(0, 3)]).numel() == 0


def test_tensors_of_two_allocations_are_not_one() -> None:
    """Even where the second begins at the end of the first."""
    memory = bytearray(32)
    halves = [torch.frombuffer(memory, dtype=torch.float32, count=4, offset=offset) for offset in (0, 16)]
    first = halves[0].data_ptr()
    assert halves[1].data_ptr() == first + 16
    assert adjoined(halves).data_ptr() != first


def test_adamw_equals_torch_with_clipping_and_unscaling() -> None:
    ours, theirs = parameters(), parameters()
    optimizer = FusedAdamW(groups(ours), lr=1e-2, eps=1e-6, max_grad_norm=5.0)
    peer = torch.optim.AdamW(groups(theirs), lr=1e-2, eps=1e-6)
    for step in range(4):
        set_gradients(ours, step, 128.0)
        optimizer.step(grad_scale=1 / 128)
        set_gradients(theirs, step)
        norm = nn.utils.clip_grad_norm_(theirs, 5.0)
        peer.step()
        assert float(optimizer.grad_norm) == pytest.approx(float(norm), rel=1e-5)
    assert_equal(ours, theirs)
    assert int(optimizer.nonfinite) == 0


def test_lamb_follows_its_equations() -> None:
    ours, exact = parameters(), [p.detach().double() for p in parameters()]
    optimizer = FusedLamb(groups(ours), lr=1e-2, max_grad_norm=0.0)
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in exact]
    for step in range(3):
        train(optimizer, ours, range(step, step + 1))
        for index, (p, (m, v)) in enumerate(zip(exact, moments, strict=True)):
            g = ours[index].grad
            assert g is not None
            m.mul_(0.9).add_(0.1 * g.double())
            v.mul_(0.999).add_(0.001 * g.double() ** 2)
            update = m / (1 - 0.9 ** (step + 1)) / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-6)
            update += 0.1 * p if index == 0 else 0.0
            p -= 1e-2 * (p.norm() / update.norm() if index == 0 else 1.0) * update
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.detach().double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [FusedAdamW, FusedLamb])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_are_copies_of_fp32_masters(kind: Optimizer, dtype: torch.dtype) -> None:
    low, full = parameters(dtype), [nn.Parameter(p.detach().float()) for p in parameters(dtype)]
    mine, theirs = kind(groups(low), lr=1e-4), kind(groups(full), lr=1e-4)
    for step in range(5):
        set_gradients(low, step)
        for a, b in zip(low, full, strict=True):
            assert a.grad is not None
            b.grad = a.grad.float()
        mine.step()
        theirs.step()
    for a, b in zip(low, full, strict=True):
        master = mine.state[a]["master"]
        torch.testing.assert_close(master, b.detach(), rtol=1e-6, atol=1e-6)
        assert torch.equal(a, master.to(dtype))


@pytest.mark.parametrize("kind", [FusedAdamW, FusedLamb])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_is_bitwise_the_same(kind: Optimizer, dtype: torch.dtype) -> None:
    straight, first = parameters(dtype), parameters(dtype)
    train(kind(groups(straight), lr=1e-2), straight, range(6))
    optimizer = kind(groups(first), lr=1e-2)
    train(optimizer, first, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    resumed = [nn.Parameter(p.detach().clone()) for p in first]
    other = kind(groups(resumed), lr=9.0)
    other.load_state_dict(saved)
    train(other, resumed, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))


def test_the_state_of_torchs_adamw_loads() -> None:
    ours, theirs = parameters(), parameters()
    peer = torch.optim.AdamW(groups(theirs), lr=1e-2, eps=1e-8)
    train(peer, theirs, range(2))
    for a, b in zip(ours, theirs, strict=True):
        a.data.copy_(b.data)
    optimizer = FusedAdamW(groups(ours), lr=0.5)
    optimizer.load_state_dict(peer.state_dict())
    train(optimizer, ours, range(2, 4))
    train(peer, theirs, range(2, 4))
    assert_equal(ours, theirs)


def test_a_step_counter_that_is_shared_counts_once() -> None:
    params = parameters()
    optimizer = FusedAdamW(params)
    train(optimizer, params, range(1))
    shared = torch.tensor(1.0)
    for p in params:
        optimizer.state[p]["step"] = shared
    train(optimizer, params, range(1))
    assert {float(optimizer.state[p]["step"]) for p in params} == {2.0}
    assert float(shared) == 1.0


@pytest.mark.parametrize("kind", [FusedAdamW, FusedLamb])
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_gradients_that_are_not_finite_are_kept_out(kind: Optimizer, clip: float) -> None:
    params = parameters()
    optimizer = kind(params, lr=1e-2, max_grad_norm=clip)
    before = [p.detach().clone() for p in params]
    set_gradients(params, 0)
    params[0].grad[3, 4] = float("inf")  # type: ignore[index]
    optimizer.step()
    assert int(optimizer.nonfinite) == 1
    changed = [int((a != b).sum()) for a, b in zip(before, params, strict=True)]
    sizes = [p.numel() for p in params]
    assert changed == ([0] * len(sizes) if clip else [sizes[0] - 1, *sizes[1:]])


def test_parameters_without_gradients_and_closures_are_served() -> None:
    params = parameters()
    optimizer = FusedAdamW(params, lr=1e-2)

    def closure() -> float:
        set_gradients(params[:2], 0)
        return 7.0

    before = [p.detach().clone() for p in params]
    assert optimizer.step(closure) == 7.0
    assert [bool((a != b).any()) for a, b in zip(before, params, strict=True)] == [True, True, False, False, False]
    assert params[3] not in optimizer.state
    train(optimizer, params, range(1))
    assert [float(optimizer.state[p]["step"]) for p in params] == [2.0, 2.0, 1.0, 1.0, 1.0]


def test_gradients_are_left_alone_and_weights_change_their_version() -> None:
    params = parameters()
    optimizer = FusedLamb(params)
    set_gradients(params, 0)
    before, versions = [p.grad.clone() for p in params if p.grad is not None], [p._version for p in params]
    optimizer.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(params, before, strict=True) if p.grad is not None)
    assert all(p._version > version for p, version in zip(params, versions, strict=True))


@pytest.mark.parametrize(
    "make",
    [
        lambda p: FusedAdamW(p, lr=-1.0),
        lambda p: FusedAdamW(p, betas=(0.9, 1.0)),
        lambda p: FusedLamb(p, eps=-1e-6),
        lambda p: FusedLamb(p, max_grad_norm=float("nan")),
    ],
)
def test_wrong_terms_are_refused(make: Callable[[list[Tensor]], object]) -> None:
    with pytest.raises(ValueError, match=r"(lr|betas|eps|max_grad_norm): "):
        make([torch.zeros(1, requires_grad=True)])
