"""The check that decides whether a GPU's kernels are used passes right kernels and names what wrong ones do."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.kernels import cpu, cuda, dispatch, reference
from engine.kernels.cuda.selfcheck import FAMILIES, disagreement
from engine.kernels.terms import Dropout
from tests.cuda_emulator.emulated import emulated_kernels

CPU = torch.device("cpu")
NAMES = ("softmax_cross_entropy_", "global_norm", "adamw_step_", "lamb_step_", "lamb_moments_", "lamb_apply_")
NAMES += ("varlen_attention", "varlen_attention_backward")


def changed(**functions: Any) -> SimpleNamespace:
    """Plain torch with some functions replaced."""
    return SimpleNamespace(**{name: getattr(reference, name) for name in NAMES} | functions)


def test_right_kernels_pass() -> None:
    for family in FAMILIES.keys() - {"attention"}:
        assert disagreement(emulated_kernels(), CPU, family) is None
        if cpu.available() and family not in ("gelu", "layer_norm"):  # the CPU's take no fp16
            assert disagreement(cpu, CPU, family) is None
    assert disagreement(reference, CPU, "attention") is None


def test_a_wrong_loss_is_named() -> None:
    def wrong(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        loss, hit, grad_bias = reference.softmax_cross_entropy_(*arguments, **options)
        return loss * 1.001, hit, grad_bias

    assert disagreement(changed(softmax_cross_entropy_=wrong), CPU, "loss") == (
        "the loss in torch.float32 differs from plain torch by 1.0e-03"
    )


def test_a_kernel_that_does_nothing_is_named() -> None:
    idle = changed(adamw_step_=lambda *_: torch.zeros(()))
    assert "adamw: weights differs" in str(disagreement(idle, CPU, "adamw"))
    halved = changed(lamb_apply_=lambda *_: None)
    assert "lamb in halves: weights differs" in str(disagreement(halved, CPU, "lamb"))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gelu", "GELU in torch.bfloat16 differs"),
        ("geglu_backward", "GeGLU's gradient in torch.bfloat16 differs"),
        ("column_sum", "the sum over rows in torch.bfloat16 differs"),
    ],
)
def test_a_wrong_activation_is_named(name: str, said: str) -> None:
    kernels = emulated_kernels()
    right = getattr(kernels, name)
    names = ("gelu", "gelu_backward", "geglu", "geglu_backward", "column_sum")
    functions = {each: getattr(kernels, each) for each in names} | {name: lambda *given: right(*given) * 1.02}
    assert said in str(disagreement(SimpleNamespace(**functions), CPU, "gelu"))


@pytest.mark.parametrize(
    ("place", "what"),
    [(0, "its gradient of x"), (1, "of the residual"), (2, "of the weight"), (3, "of the bias")],
)
def test_a_wrong_gradient_of_layer_normalisation_is_named(place: int, what: str) -> None:
    kernels = emulated_kernels()

    def wrong(*arguments: Any) -> tuple[Tensor, ...]:
        gradients = list(kernels.layer_norm_backward(*arguments))
        gradients[place] = gradients[place] * 1.001
        return tuple(gradients)

    found = str(
        disagreement(SimpleNamespace(layer_norm=kernels.layer_norm, layer_norm_backward=wrong), CPU, "layer_norm")
    )
    assert found.startswith(f"{what} in torch.float32 differs")


def test_other_masks_are_no_agreement() -> None:
    kernels = emulated_kernels()

    def reseeded(*arguments: Any) -> tuple[Tensor, ...]:
        *others, inner, outer = arguments
        return kernels.layer_norm(*others, Dropout(inner.probability, inner.seed + 1), outer)

    other = SimpleNamespace(layer_norm=reseeded, layer_norm_backward=kernels.layer_norm_backward)
    assert str(disagreement(other, CPU, "layer_norm")).startswith("the sum in torch.float32 differs")


def test_a_run_may_start_in_inference_mode() -> None:
    with torch.inference_mode():
        assert disagreement(emulated_kernels(), CPU, "layer_norm") is None


def neighbouring(*arguments: Any) -> tuple[Tensor, ...]:
    """Attention of all tokens to all, whatever sequence they are of."""
    query, key, value, asking, asked, *rest = arguments
    return reference.varlen_attention(query, key, value, asking[[0, -1]], asked[[0, -1]], *rest)


def forgetful(*arguments: Any) -> tuple[Tensor, ...]:
    """A backward pass that drops with other random numbers than the forward pass."""
    *before, random, unused = arguments[:8]
    return reference.varlen_attention_backward(*before, random.clone().fill_(7), unused, *arguments[8:])


def undropping(*arguments: Any) -> tuple[Tensor, ...]:
    """Attention that drops nothing."""
    return reference.varlen_attention(*arguments[:8], 0.0, *arguments[9:])


def careless(*arguments: Any) -> tuple[Tensor, ...]:
    """A backward pass that leaves one row of the keys' gradient unwritten."""
    of_query, of_key, of_value = reference.varlen_attention_backward(*arguments)
    of_key[5] = 0.0
    return of_query, of_key, of_value


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        ({"varlen_attention": neighbouring}, "the context of attention where all ask in torch.float16 differs"),
        ({"varlen_attention_backward": careless}, "the gradient of the key of attention where all ask"),
        ({"varlen_attention_backward": forgetful}, "dropout of attention backward in torch.float16 differs"),
        ({"varlen_attention": undropping}, "dropout of attention backward in torch.float16 differs"),
        (
            {"varlen_attention": undropping, "varlen_attention_backward": lambda *a: undropped(*a)},
            "the share that attention drops in torch.float16 differs",
        ),
    ],
)
def test_wrong_attention_is_named(wrong: dict[str, Any], what: str) -> None:
    assert what in str(disagreement(changed(**wrong), CPU, "attention"))


def undropped(*arguments: Any) -> tuple[Tensor, ...]:
    """The gradients of `undropping`."""
    return reference.varlen_attention_backward(*arguments[:13], 0.0, *arguments[14:])


def test_the_check_of_attention_leaves_the_random_numbers_alone() -> None:
    state = torch.get_rng_state()
    disagreement(reference, CPU, "attention")
    assert torch.equal(torch.get_rng_state(), state)


def test_nan_is_no_agreement() -> None:
    broken = changed(global_norm=lambda grad, _: torch.tensor(float("nan")))
    assert "the gradient norm differs from plain torch by nan" in str(disagreement(broken, CPU, "norm"))


def failing(error: Exception) -> SimpleNamespace:
    """Plain torch whose AdamW step raises."""

    def fails(*_: Any) -> Tensor:
        raise error

    return changed(adamw_step_=fails)


@pytest.mark.parametrize("compare", [True, False])
@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("CUDA_ERROR_NO_BINARY_FOR_GPU\nmore", "CUDA_ERROR_NO_BINARY_FOR_GPU"),
        ("NVRTC_ERROR_COMPILATION\nlog:\na.cuh(86): error: no\nb: error: too", "a.cuh(86): error: no"),
    ],
)
def test_a_failure_to_build_or_launch_is_the_line_that_says_why(message: str, line: str, compare: bool) -> None:
    kernels = failing(RuntimeError(message))
    assert disagreement(kernels, CPU, "adamw", compare) == line
    assert disagreement(kernels, CPU, "lamb", compare) is None


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A GPU that is said to be there."""
    dispatch._agrees.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "available", lambda: True)
    yield monkeypatch
    dispatch._agrees.cache_clear()
    dispatch.select("auto")


@pytest.mark.parametrize("chosen", ["auto", "fused"])
def test_a_family_that_fails_does_not_drop_the_others(
    chosen: dispatch.Kernels, gpu: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gpu.setattr(dispatch, "disagreement", lambda *asked: "not built" if asked[2] == "lamb" else None)
    dispatch.select(chosen)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            used = [dispatch.backend(torch.device("cuda", 0), family) for family in ("loss", "norm", "adamw", "lamb")]
            assert used == [cuda, cuda, cuda, reference]
    assert [record.getMessage() for record in caplog.records] == [
        "CUDA kernels: lamb: not built; plain torch runs instead"
    ]


def test_flash_attention_is_judged_without_our_kernels(
    gpu: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is torch's own: cuda-core need not be there. What it lacks is said in a line."""
    gpu.setattr(cuda, "available", lambda: False)
    gpu.setattr(dispatch, "disagreement", lambda *_: None)
    gpu.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    gpu.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0) if device.index == 0 else (7, 5))
    with caplog.at_level(logging.WARNING):
        used = [dispatch.ours(torch.device("cuda", index), "attention") for index in (0, 1)]
        gpu.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
        used.append(dispatch.ours(torch.device("cuda", 2), "attention"))
    assert used == [cuda, None, None]
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == [
        "attention: flash attention needs compute capability 8.0, and this GPU has 7.5; plain torch runs instead",
        "attention: this build of torch has no flash attention; plain torch runs instead",
    ]


def test_running_out_of_memory_is_no_answer(gpu: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        disagreement(failing(torch.OutOfMemoryError("full")), CPU, "adamw")

    gpu.setattr(dispatch, "disagreement", full)
    with pytest.raises(torch.OutOfMemoryError):
        dispatch.backend(torch.device("cuda", 0), "adamw")
    gpu.setattr(dispatch, "disagreement", lambda *_: None)
    assert dispatch.backend(torch.device("cuda", 0), "adamw") is cuda


def test_what_another_rank_lacks_is_used_by_none(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(dispatch.BACK_ENDS, "cpu", lambda *_: cpu)
    monkeypatch.setattr(dispatch.dist, "gather_objects", lambda mine: [mine, ("node7", "cpu", {"lamb"})])
    with caplog.at_level(logging.WARNING):
        dispatch.agree(CPU)
    used = [dispatch.backend(CPU, family) for family in ("adamw", "lamb")]
    dispatch.select("auto")
    assert used == [cpu, reference]
    assert dispatch.backend(CPU, "lamb") is cpu
    (line,) = [record.getMessage() for record in caplog.records]
    assert "lamb can't be used on node7" in line
