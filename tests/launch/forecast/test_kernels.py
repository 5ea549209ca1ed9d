"""Counts of a step's kernels against the plan's FLOPs and hand counts, and the bound that follows."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.config import ModelConfig, Shape
from engine.model.flops import forward_flops
from launch.forecast.hardware import described_hardware
from launch.forecast.kernels.bound import ATTAINABLE_BANDWIDTH, ATTAINABLE_FLOPS, attainable, bound
from launch.forecast.kernels.counting import OURS, PARTS, Kernel, Step, Variant, product
from launch.forecast.kernels.layer import layer_backward, layer_forward
from launch.forecast.kernels.step import backward, forward, gradient_copies, kernels, passes
from launch.forecast.memory import Workload, shape_of

A100 = described_hardware("a100", 1, 1, None)
BASE = shape_of(ModelConfig(size="base"), 30522)
LARGE = shape_of(ModelConfig(size="large"), 30522)
STEP = Step(Workload(BASE, 128, 8, stage=2, ranks=1, ranks_per_node=1, precision="bf16"))
UNFUSED = Variant(fused=False)


def changed(**fields: object) -> Step:
    """The step with some fields of its workload changed."""
    return replace(STEP, work=replace(STEP.work, **fields))  # type: ignore[arg-type]


def total(found: list[Kernel], what: str, part: str | None = None) -> float:
    return sum(getattr(kernel, what) for kernel in found if part in (None, kernel.part))


@pytest.mark.parametrize(
    "shape", [BASE, LARGE, replace(BASE, feed_forward_matrices=3, biases=False), replace(BASE, pooler=False)]
)
@pytest.mark.parametrize("length", [128, 512])
def test_flops_of_the_kernels_are_those_of_the_plan(shape: Shape, length: int) -> None:
    """`engine.model.flops.forward_flops` counts them another way; torch's own counter agrees with that one."""
    step = changed(shape=shape, sequence_length=length)
    once = 8 * forward_flops(shape, [length], 0.15 * length)
    asked = 4 * 8 * 0.15 * length * length * shape.hidden  # by masked tokens in the last layer, which isn't needed
    assert total(forward(step), "flops") == pytest.approx(once + asked)
    assert step.needed_flops() == pytest.approx(3 * once)
    queries = 8 * length * (shape.layers - 1) + 8 * shape.pooler + 0.15 * 8 * length
    scores_again = 2 * queries * length * shape.hidden
    assert total(kernels(step), "flops") == pytest.approx(3 * (once + asked) + scores_again)


@pytest.mark.parametrize("read_share", [0.0, 1.0])
def test_flops_of_classifiers_are_those_of_the_plan(read_share: float) -> None:
    """On pooled vectors, and on the states of all tokens."""
    shape = replace(BASE, decoder=False, classes=5)
    step = changed(shape=shape, read_share=read_share)
    asked = 4 * 8 * 127 * 128 * shape.hidden if read_share else 0
    once = 8 * forward_flops(shape, [128], read_share * 128)
    assert total(forward(step), "flops") == pytest.approx(once + asked)


def test_recomputation_runs_the_layers_twice() -> None:
    again = changed(activation_checkpointing=True)
    layers = [kernel for rows in STEP.behind_attention(OURS) for kernel in layer_forward(STEP, rows)]
    for what in ("flops", "bytes", "launches"):
        assert total(kernels(again), what) == pytest.approx(total(kernels(STEP), what) + total(layers, what))


def test_bytes_by_hand() -> None:
    """A product moves its operands and its result."""
    assert product(STEP, "FFN", 3, 5, 7) == Kernel("FFN", 2 * 3 * 5 * 7, 2 * (3 * 5 + 5 * 7 + 3 * 7), 1)


def test_bytes_of_a_layer_by_hand() -> None:
    """Tensors of bf16 that a token's state is one of, the feed-forward network's inner ones four; weights apart."""
    rows, hidden = 8 * 128, BASE.hidden
    weights = 2 * (4 * hidden**2 + 2 * hidden * BASE.intermediate)
    attention = 4 * rows * BASE.heads  # of fp32 statistics
    tensors = (6 + 4 + 2 + 4) + (5 + 8 + 5 + 4)
    assert total(layer_forward(STEP, rows), "bytes") == pytest.approx(2 * rows * hidden * tensors + weights + attention)
    behind = 4 + (5 + 5 + 1) + 12 + 10 + 3  # norm; FFN out: two products and a sum; GELU; FFN in; residual
    before = 4 + 5 + (9 + 8) + 15 + 6 + 3  # norm; output projection; attention with fp32 sums; QKV; their sum; residual
    moved = 2 * rows * hidden * (behind + before) + 2 * weights + 3 * attention
    assert total(layer_backward(STEP, rows), "bytes") == pytest.approx(moved)


@pytest.mark.parametrize(("stage", "ranks", "expected"), [(0, 1, 6), (0, 4, 14), (1, 1, 24), (1, 4, 44), (2, 4, 17)])
def test_gradient_copies_by_hand(stage: int, ranks: int, expected: float) -> None:
    """Bytes a parameter of a step of two micro-batches."""
    step = replace(changed(stage=stage, ranks=ranks), accumulation=2)
    assert gradient_copies(step) == pytest.approx(BASE.parameters() * expected)


def test_layer_norm_fused_saves_what_its_passes_move() -> None:
    """Forward 7 tensors and a mask against 4, backward 7 and a mask against 4: 14 bytes a number and half-layer."""
    found = [total(kernels(STEP, variant), "bytes", "residual + LayerNorm") for variant in (UNFUSED, OURS)]
    rows = (BASE.layers - 1) * 8 * 128 + 8 + 0.15 * 8 * 128
    assert found[0] - found[1] == pytest.approx(2 * rows * BASE.hidden * 14)


def test_without_dropout_one_gradient_serves_input_and_residual() -> None:
    found = [total(kernels(step), "bytes", "residual + LayerNorm") for step in (STEP, changed(dropout=0.0))]
    rows = (BASE.layers - 1) * 8 * 128 + 8 + 0.15 * 8 * 128
    assert found[0] - found[1] == pytest.approx(2 * rows * BASE.hidden * 2)


def test_a_model_without_biases_sums_none() -> None:
    bare = changed(shape=replace(BASE, biases=False))
    rows = 8 * 128
    assert total(layer_backward(bare, rows), "launches") < total(layer_backward(STEP, rows), "launches")
    saved = total(layer_backward(STEP, rows), "bytes") - total(layer_backward(bare, rows), "bytes")
    assert saved == pytest.approx(2 * rows * BASE.hidden * 5), "of Q, K, V and both projections back to the width"


def test_windows_of_modernbert_save_scores() -> None:
    """A query meets the keys of its window in most layers; the rest is counted as the plan does."""
    shape = shape_of(ModelConfig(size="base", architecture="modernbert", max_positions=1024), 30522)
    step = changed(shape=shape, sequence_length=1024, dropout=0.0)
    once = 8 * forward_flops(shape, [1024], 0.15 * 1024)
    asked = 4 * 8 * 0.15 * 1024 * 1024 * shape.hidden
    pooled = 4 * 8 * 1024 * shape.hidden if shape.pooler else 0
    assert total(forward(step), "flops") == pytest.approx(once + asked, rel=1e-6, abs=pooled)
    narrow, whole = (total(layer_backward(step, 8192, window=window), "flops") for window in (True, False))
    within = 129 - 64 * 65 / 1024
    assert whole - narrow == pytest.approx(10 * 8192 * (1024 - within) * shape.hidden)


def test_rotary_positions_are_passes_and_no_tables() -> None:
    turning = changed(shape=replace(BASE, learned_positions=False, segments=0))
    state = 8 * 128 * BASE.hidden
    for found in (layer_forward, layer_backward):
        more = total(found(turning, 1024), "bytes", "attention") - total(found(STEP, 1024), "bytes", "attention")
        assert more == pytest.approx(2 * state * (2 * 2 + 11 * 4))
    saved = total(forward(STEP), "bytes", "embedding") - total(forward(turning), "bytes", "embedding")
    assert saved == pytest.approx(2 * state * (2 + 6))


def test_packing_leaves_padding_out() -> None:
    half = replace(STEP, fill=0.5)
    padded = Variant(packed=False)
    assert total(forward(half), "flops") < 0.6 * total(forward(half, padded), "flops")
    assert half.needed_flops() < 0.5 * STEP.needed_flops()
    assert total(layer_forward(half, 512), "bytes", "attention") * 2 == total(
        layer_forward(STEP, 1024), "bytes", "attention"
    )


def test_plain_attention_moves_its_scores() -> None:
    """Forward: both products, softmax of two tensors, dropout of two and a mask; in fp32."""
    plain = changed(attention="plain")
    moved = total(layer_forward(plain, 1024), "bytes", "attention")
    scores, state = 8 * BASE.heads * 128**2, 1024 * BASE.hidden
    assert moved == pytest.approx(scores * (4 * 6 + 1) + 2 * state * (4 + 8))
    assert total(backward(plain), "bytes") > total(backward(STEP), "bytes")


def test_every_kernel_belongs_to_a_part() -> None:
    assert {kernel.part for kernel in kernels(STEP)} == set(PARTS)


def test_fp32_moves_twice_the_bytes_of_a_pass() -> None:
    wide = changed(precision="fp32")
    for part in ("GELU", "FFN", "residual + LayerNorm"):
        assert total(kernels(wide), "bytes", part) == pytest.approx(2 * total(kernels(STEP), "bytes", part))


def test_a_kernel_is_bound_by_the_slower_resource() -> None:
    compute, memory = Kernel("FFN", A100.peak_flops, 1.0), Kernel("GELU", 0.0, 2 * A100.memory_bandwidth)
    both = bound([compute, memory], A100)
    assert both.device_seconds == both.seconds == pytest.approx(3.0)
    assert (bound([compute], A100).limit, bound([memory], A100).limit) == ("compute", "memory")
    assert both.limit == "memory"
    assert (both.compute_seconds, both.memory_seconds) == (pytest.approx(1.0), pytest.approx(2.0))
    late = bound([compute, memory], A100, launch_seconds=2.0)
    assert (late.limit, late.seconds) == ("launches", 4.0)


def test_what_is_attainable_is_a_share_of_either_rate() -> None:
    card = attainable(A100)
    assert card.peak_flops == ATTAINABLE_FLOPS * A100.peak_flops
    assert card.memory_bandwidth == ATTAINABLE_BANDWIDTH * A100.memory_bandwidth
    slower = bound(passes(STEP), card, 0.0).seconds / bound(passes(STEP), A100, 0.0).seconds
    assert 1 / ATTAINABLE_BANDWIDTH < slower < 1 / ATTAINABLE_FLOPS
