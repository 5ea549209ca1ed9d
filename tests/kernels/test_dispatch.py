"""Which implementation of an operator runs: every operator in every situation, and a back end from outside."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from engine.kernels import cpu, cuda, dispatch, linear_cross_entropy, reference, select
from engine.optim.fused import FusedAdamW, FusedLamb
from tests.cuda_emulator.emulated import emulated_kernels

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)

#: what an operator is asked with, made of the device and the type
QUESTIONS: dict[str, Callable[[torch.device, torch.dtype], ModuleType | bool | None]] = {
    "rows, norm, steps": lambda device, _: dispatch.backend(device, "loss"),
    "tensor lists": lambda device, _: dispatch.tensor_lists(device),
    "adamw": lambda device, _: dispatch.adamw(device),
    "reads half": lambda device, _: dispatch.reads_half(device),
    "bias in rows": lambda device, _: dispatch.adds_bias(device),
    "padded classes": lambda device, _: dispatch.class_unit(device) > 1,
    "sums of loss rows": lambda *kind: dispatch.column_sum(ones(4, 16, *kind)),
    "linear": lambda *kind: dispatch.linear(ones(4, 8, *kind), ones(16, 8, *kind), ones(16, *kind)),
    "geglu": lambda *kind: dispatch.geglu(ones(4, 16, *kind)),
    "normalised sum": lambda *kind: dispatch.normalised_sum(ones(4, 8, *kind), ones(4, 8, *kind), ones(8, *kind)),
    "attention": lambda *kind: dispatch.attention(ones(4, 64, *kind), 2),
    "rotary attention": lambda *kind: dispatch.rotary_attention(ones(4, 192, *kind), 2),
    "tied embedding": lambda *kind: dispatch.tied_embedding(ones(9, 8, *kind).requires_grad_()),
}
#: the answers on a CPU with the kernels but without bf16 instructions, by type; in the order of the questions
ON_CPU: dict[torch.dtype, list[Any]] = {
    FP32: [cpu, cpu, True, True, True, False, None, None, cpu, cpu, cpu, cpu, None],
    BF16: [cpu, cpu, True, True, True, False, None, None, cpu, cpu, cpu, cpu, cpu],
    FP16: [cpu, cpu, True, True, True, False, None, None, None, None, None, None, None],
}
#: the same where oneDNN multiplies bf16 and the CPU has AVX512-BF16
ON_NEW_CPU = {**ON_CPU, BF16: [cpu, cpu, True, True, True, False, None, cpu, cpu, cpu, cpu, None, cpu]}
#: the answers on a GPU with the kernels and flash attention
ON_GPU: dict[torch.dtype, list[Any]] = {
    FP32: [cuda, None, True, True, False, True, cuda, None, None, cuda, None, None, None],
    BF16: [cuda, None, True, True, False, True, cuda, cuda, cuda, cuda, cuda, None, None],
    FP16: [cuda, None, True, True, False, True, cuda, cuda, cuda, cuda, cuda, None, None],
}
PLAIN_CPU = [reference, None, False, False, True, False, None, None, None, None, None, None, None]
PLAIN_GPU = [reference, None, False, False, False, True, None, None, None, None, None, None, None]


def ones(*shape_and_kind: Any) -> Tensor:
    *shape, device, dtype = shape_and_kind
    return torch.ones(shape, device=device, dtype=dtype)


def answers(device: torch.device, dtype: torch.dtype) -> list[Any]:
    """Tensors of a GPU are shapes and types alone here."""
    with FakeTensorMode() if device == GPU else nullcontext():
        return [ask(device, dtype) for ask in QUESTIONS.values()]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Says what this machine has."""

    def has(
        library: bool = True, bf16: bool = False, cuda_core: bool = True, flash: bool = True, agrees: bool = True
    ) -> None:
        for name, value in {"available": library, "multiplies_bf16": bf16, "attends_bf16": bf16}.items():
            monkeypatch.setattr(cpu, name, lambda value=value: value)
        monkeypatch.setattr(cuda, "available", lambda: cuda_core)

        def answer(_: int | None, family: str, compare: bool) -> bool:
            return (flash if family == "attention" else cuda_core) and (agrees or not compare)

        monkeypatch.setattr(dispatch, "_agrees", answer)

    yield has
    select("auto")


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("bf16", [False, True], ids=["old", "new"])
def test_on_a_cpu(dtype: torch.dtype, bf16: bool, machine: Callable[..., None]) -> None:
    machine(bf16=bf16)
    assert answers(CPU, dtype) == (ON_NEW_CPU if bf16 else ON_CPU)[dtype]


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_on_a_gpu(dtype: torch.dtype, machine: Callable[..., None]) -> None:
    machine(bf16=True)
    assert answers(GPU, dtype) == ON_GPU[dtype]


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_flash_attention_and_compiled_kernels_do_without_each_other(
    dtype: torch.dtype, machine: Callable[..., None]
) -> None:
    place = list(QUESTIONS).index("attention")
    machine(flash=False)
    assert answers(GPU, dtype) == [*ON_GPU[dtype][:place], None, *ON_GPU[dtype][place + 1 :]]
    machine(cuda_core=False)
    assert answers(GPU, dtype) == [*PLAIN_GPU[:place], cuda, *PLAIN_GPU[place + 1 :]]


def test_states_that_flash_attention_does_not_take(machine: Callable[..., None]) -> None:
    """A head's width is a multiple of 8, and 256 at most."""
    machine()
    with FakeTensorMode():
        for hidden, heads, takes in ((768, 12, True), (256, 1, True), (264, 1, False), (36, 3, False), (40, 10, False)):
            assert (dispatch.attention(ones(4, hidden, GPU, BF16), heads) is cuda) is takes
        assert dispatch.attention(ones(0, 64, GPU, BF16), 1) is None


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize(("device", "expected"), [(CPU, PLAIN_CPU), (GPU, PLAIN_GPU)], ids=str)
@pytest.mark.parametrize("reason", ["chosen", "not built", "wrong"])
def test_plain_torch_runs(
    reason: str, device: torch.device, expected: list[Any], dtype: torch.dtype, machine: Callable[..., None]
) -> None:
    built = reason != "not built"
    machine(library=built, bf16=True, cuda_core=built, flash=built, agrees=reason != "wrong")
    select("reference" if reason == "chosen" else "auto")
    if (reason, device) == ("wrong", CPU):
        expected = ON_NEW_CPU[dtype]  # a GPU's kernels are what can be wrong
    assert answers(device, dtype) == expected


def test_kernels_that_are_wrong_run_where_they_are_insisted_on(machine: Callable[..., None]) -> None:
    machine(agrees=False)
    select("fused")
    assert answers(GPU, FP32) == ON_GPU[FP32]
    assert answers(GPU, BF16) == ON_GPU[BF16]


@pytest.mark.parametrize(("dtype", "widest"), [(FP32, 1024), (BF16, 2048), (FP16, 2048)])
def test_rows_that_the_gpu_kernels_of_layer_normalisation_take(
    dtype: torch.dtype, widest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked with tensors on a CPU, as those of a GPU have no views here."""
    monkeypatch.setitem(dispatch.BACK_ENDS, "cpu", lambda *_: cuda)
    pack = 16 // dtype.itemsize
    x, weight = ones(4, widest, CPU, dtype), ones(widest, CPU, dtype)
    assert dispatch.normalised_sum(x, None, weight) is cuda
    assert dispatch.normalised_sum(x[1:], x[:3], weight, weight) is cuda
    assert dispatch.normalised_sum(x[:, :pack].contiguous(), None, weight[:pack]) is cuda
    unaligned = ones(4 * widest + 1, CPU, dtype)[1:].view(4, widest)
    refused = {
        "too wide": ones(4, widest + pack, CPU, dtype),
        "half a pack": ones(4, pack // 2, CPU, dtype),
        "empty": x[:0],
        "strided": x[:, :pack],
        "transposed": ones(widest, 4, CPU, dtype).T,
        "unaligned": unaligned,
        "three dimensions": x[None],
    }
    for why, rows in refused.items():
        assert dispatch.normalised_sum(rows, None, weight) is None, why
    assert dispatch.normalised_sum(x, unaligned, weight) is None
    for mixed in ((x, x.double(), weight), (x, x, weight.double()), (x, None, weight, weight.double())):
        assert dispatch.normalised_sum(*mixed) is None


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_deterministic_mode_changes_nothing(deterministic: bool, machine: Callable[..., None]) -> None:
    machine(bf16=True)
    torch.use_deterministic_algorithms(deterministic)
    try:
        assert answers(CPU, BF16) == ON_NEW_CPU[BF16]
        assert answers(GPU, BF16) == ON_GPU[BF16]
    finally:
        torch.use_deterministic_algorithms(False)


def test_other_devices_have_plain_torch() -> None:
    meta = torch.device("meta")
    assert (dispatch.ours(meta), dispatch.backend(meta, "loss")) == (None, reference)
    assert not dispatch.adamw(meta)


def test_inputs_that_no_kernel_takes(machine: Callable[..., None]) -> None:
    machine(bf16=True)
    x, wide, bias = ones(4, 8, CPU, BF16), ones(4, 64, CPU, BF16), ones(8, CPU, BF16)
    square = ones(8, 8, CPU, BF16)
    assert dispatch.linear(x, square, bias) is cpu
    for changed in (
        (x.float(), square, bias),
        (x, square, bias.float()),
        (x[None], square, bias),
        (x[:0], square, bias),
    ):
        assert dispatch.linear(*changed) is None
    assert dispatch.geglu(wide) is cpu
    for halves in (wide.half(), wide[None], wide[:0], wide[:, :3]):
        assert dispatch.geglu(halves) is None
    assert dispatch.normalised_sum(x, None, bias) is cpu
    for other in ((x, x.float(), bias), (x, x, bias.float()), (x[:0], None, bias)):
        assert dispatch.normalised_sum(*other) is None
    assert dispatch.attention(wide, 4) is cpu
    for states, heads in ((wide, 8), (wide[:, :24], 1), (wide[:0], 4)):
        assert dispatch.attention(states, heads) is None
    assert dispatch.attention(wide, 4, window=(64, 64)) is None
    projected = ones(4, 192, CPU, BF16)
    assert dispatch.rotary_attention(projected, 4, window=(64, 64)) is cpu
    assert dispatch.rotary_attention(projected.float(), 4) is cpu
    for states, heads in ((projected, 4), (projected, 8), (projected[:0], 4), (projected.half(), 4)):
        assert dispatch.rotary_attention(states, heads) is None


def test_rows_of_no_whole_16_bytes_are_plain_torch_s_on_a_gpu(machine: Callable[..., None]) -> None:
    machine()
    with FakeTensorMode():
        x, bias = ones(4, 8, GPU, BF16), ones(16, GPU, BF16)
        assert dispatch.linear(x, ones(16, 8, GPU, BF16), bias) is cuda
        assert dispatch.linear(x, ones(12, 8, GPU, BF16), bias) is None
        assert dispatch.linear(ones(0, 8, GPU, BF16), ones(16, 8, GPU, BF16), bias) is None
        assert dispatch.geglu(ones(4, 24, GPU, BF16)) is None


def test_a_gradient_waits_only_where_there_is_one_and_the_weight_is_whole(machine: Callable[..., None]) -> None:
    machine()
    weight = ones(9, 8, CPU, BF16).requires_grad_()
    assert dispatch.tied_embedding(weight) is cpu
    assert dispatch.tied_embedding(weight.detach()) is None
    with torch.no_grad():
        assert dispatch.tied_embedding(weight) is None
    weight.ds_id = 1  # type: ignore[attr-defined]
    assert dispatch.tied_embedding(weight) is None


class Wrapped(nn.Linear):
    """An adapter that takes the layer's place."""


def hooked(hook: str, module: str = __name__) -> nn.Linear:
    def nothing(*_: Any) -> None: ...

    nothing.__module__ = module
    layer = nn.Linear(8, 8)
    getattr(layer, f"register_{hook}")(nothing)
    return layer


def replaced() -> nn.Linear:
    layer = nn.Linear(8, 8)
    layer.forward = lambda x: x  # type: ignore[method-assign]
    return layer


@pytest.mark.parametrize(
    ("layer", "activation", "together"),
    [
        (nn.Linear(8, 8), nn.GELU(), True),
        (nn.Linear(8, 8), nn.GELU(approximate="tanh"), False),
        (nn.Linear(8, 8), nn.ReLU(), False),
        (Wrapped(8, 8), nn.GELU(), False),
        (replaced(), nn.GELU(), False),
        (hooked("forward_hook"), nn.GELU(), False),
        (hooked("full_backward_hook"), nn.GELU(), False),
        (hooked("full_backward_pre_hook"), nn.GELU(), False),
        (hooked("forward_pre_hook"), nn.GELU(), True),
        (hooked("forward_hook", "deepspeed.runtime.zero.parameter_offload"), nn.GELU(), True),
    ],
)
def test_gelu_is_asked_of_a_layer_that_nothing_wraps(layer: nn.Module, activation: nn.Module, together: bool) -> None:
    assert dispatch.gelu_in_linear(layer, activation, nn.Linear) is together


@pytest.mark.parametrize("optimizer", [FusedAdamW, FusedLamb])
def test_a_back_end_from_outside_computes_losses_norms_and_steps(
    optimizer: type[FusedAdamW | FusedLamb], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CUDA kernels, emulated, in the place of the CPU's: it has neither lists of tensors nor layers' kernels."""
    emulated = emulated_kernels()
    results = []
    for back_end in (emulated, None):
        monkeypatch.setitem(dispatch.BACK_ENDS, "cpu", lambda *_, kernels=back_end: kernels)
        generator = torch.Generator().manual_seed(1)
        hidden, start = torch.randn(6, 20, generator=generator), torch.randn(50, 20, generator=generator)
        weight, bias = nn.Parameter(start), nn.Parameter(torch.zeros(20))
        for _ in range(2):
            loss = linear_cross_entropy(hidden + bias, weight, None, torch.arange(6))
            assert isinstance(loss, Tensor)
            loss.backward()
        stepped = optimizer([weight, bias], lr=0.1, max_grad_norm=0.5)
        stepped.step()
        results.append([loss.detach(), weight.detach(), bias.detach(), stepped.grad_norm])
        assert dispatch.backend(CPU, "loss") is (emulated if back_end else reference)
        assert dispatch.normalised_sum(hidden, None, bias) is None
    for emulated_result, plain in zip(*results, strict=True):
        torch.testing.assert_close(emulated_result, plain, rtol=2e-5, atol=2e-6)
