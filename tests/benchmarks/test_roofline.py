"""The roofline's counts against the plan's FLOPs, hand counts, and the operators that the real model runs."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from transformers import BertConfig

from benchmarks import all as runner
from benchmarks import roofline
from benchmarks.step_kernels import (
    FUSED_NORM,
    OURS,
    PARTS,
    PLAIN,
    Kernel,
    Step,
    backward,
    forward,
    gradient_copies,
    kernels,
    logit_bytes,
    product,
    update,
)
from engine.kernels import select
from engine.model.bert import BertForPreTraining
from engine.model.flops import forward_flops
from engine.model.packing import pack
from launch.forecast.hardware import GPUS, described_hardware

A100 = described_hardware("a100", 1, 1, None)


def total(found: list[Kernel], what: str) -> float:
    return sum(getattr(kernel, what) for kernel in found)


@pytest.mark.parametrize("size", ["base", "large"])
@pytest.mark.parametrize("length", [128, 512])
def test_flops_of_the_kernels_are_those_of_the_plan(size: str, length: int) -> None:
    """`engine.model.flops.forward_flops` counts them another way; torch's own counter agrees with that one."""
    step = roofline.step_of(size, length, 8)
    once = 8 * forward_flops(step.shape, [length], 0.15 * length)
    hidden, unread = step.shape.hidden, 8 * (0.85 * length - 1)
    # on GPUs all ask in the last layer
    asked = 2 * unread * hidden * hidden + 4 * 8 * (length - 1) * length * hidden
    assert total(forward(step, OURS), "flops") == pytest.approx(once + asked)
    assert step.needed_flops() == pytest.approx(3 * once)
    scores_again = step.shape.layers * 2 * 8 * length**2 * hidden
    assert total(kernels(step, OURS), "flops") == pytest.approx(3 * (once + asked) + scores_again)


def test_plain_torch_decodes_every_token_and_computes_all_last_states() -> None:
    step = roofline.step_of("base", 128, 8)
    tokens, shape = 8 * 128, step.shape
    decoded = 0.85 * tokens * 2 * (shape.hidden**2 + shape.hidden * shape.vocabulary)
    unread = (0.85 * tokens - 8) * 2 * (shape.hidden**2 + 2 * shape.hidden * shape.intermediate)
    added = total(forward(step, PLAIN), "flops") - total(forward(step, OURS), "flops")
    assert added == pytest.approx(decoded + unread)


def test_bytes_by_hand() -> None:
    """A product moves its operands and its result; the optimizer 34 bytes a parameter; a logit 4, unfused 48."""
    assert product("FFN", 3, 5, 7) == Kernel("FFN", 2 * 3 * 5 * 7, 2 * (3 * 5 + 5 * 7 + 3 * 7), 1)
    step = roofline.step_of("base", 128, 8)
    count = step.shape.parameters()
    ours, theirs = ([one for one in update(step, v) if one.part != "gradient reduction"] for v in (OURS, PLAIN))
    assert total(ours, "bytes") == 34 * count
    assert total(theirs, "bytes") == 46 * count
    assert total(update(replace(step, optimizer="lamb"), OURS), "bytes") == gradient_copies(step) + 46 * count
    assert (logit_bytes(True), logit_bytes(False)) == (4, 48)


@pytest.mark.parametrize(("stage", "ranks", "expected"), [(0, 1, 6), (0, 4, 14), (1, 1, 24), (1, 4, 44), (2, 4, 17)])
def test_gradient_copies_by_hand(stage: int, ranks: int, expected: float) -> None:
    """Bytes a parameter of a step of two micro-batches."""
    step = replace(roofline.step_of("base", 128, 8), accumulation=2, stage=stage, ranks=ranks)
    assert gradient_copies(step) == pytest.approx(step.shape.parameters() * expected)


def test_layer_norm_fused_saves_what_its_passes_move() -> None:
    """Forward 7 tensors and a mask against 4, backward 7 and a mask against 4: 14 bytes a number and half-layer."""
    step = roofline.step_of("base", 128, 8)
    found = [
        total([one for one in kernels(step, v) if one.part == "residual + LayerNorm"], "bytes")
        for v in (OURS, FUSED_NORM)
    ]
    rows = (step.shape.layers - 1) * 8 * 128 + 8 + 0.15 * 8 * 128
    numbers = 2 * rows * step.shape.hidden
    assert found[0] - found[1] == pytest.approx(numbers * 14)


def test_packing_leaves_padding_out() -> None:
    half = replace(roofline.step_of("base", 128, 8), fill=0.5)
    assert total(forward(half, OURS), "flops") < 0.6 * total(forward(half, PLAIN), "flops")
    assert half.needed_flops() < 0.5 * replace(half, fill=1.0).needed_flops()
    attention = [one for one in forward(half, OURS) if one.part == "attention"]
    assert len(attention) == 8 * half.shape.layers, "queries, keys and values to the grid, the context back"


def test_every_kernel_belongs_to_a_part() -> None:
    step = roofline.step_of("base", 128, 2)
    assert {one.part for one in [*forward(step, OURS), *backward(step, OURS), *update(step, OURS)]} == set(PARTS)


def test_a_kernel_is_bound_by_the_slower_resource() -> None:
    compute, memory = Kernel("FFN", A100.peak_flops, 1.0), Kernel("GELU", 0.0, 2 * A100.memory_bandwidth)
    both = roofline.bound([compute, memory], A100)
    assert both.device_seconds == pytest.approx(3.0)
    assert (roofline.bound([compute], A100).limit, roofline.bound([memory], A100).limit) == ("compute", "memory")
    assert both.limit == "memory"
    assert (both.compute_seconds, both.memory_seconds) == (pytest.approx(1.0), pytest.approx(2.0))


def test_slow_launches_bound_a_step() -> None:
    step = roofline.step_of("base", 128, 2)
    table = roofline.variants_table([step], A100, launch_us=1000)
    ours = table["ours, micro-batch 2"]
    assert ours["bound"] == "launches"
    assert ours["ms"] == pytest.approx(ours["launches"])
    assert roofline.variants_table([step], A100, launch_us=0)["ours, micro-batch 2"]["bound"] == "memory"


def test_parts_add_up_to_the_step() -> None:
    table = roofline.parts_table(roofline.step_of("large", 128, 32), OURS, A100)
    for name in ("GFLOP", "GB", "launches", "ms"):
        assert sum(float(table[part][name]) for part in PARTS) == pytest.approx(table["step"][name])


@pytest.mark.parametrize("gpu", ["a100", "h100"])
@pytest.mark.parametrize("length", [128, 512])
def test_ours_is_bound_less_than_plain_torch(gpu: str, length: int) -> None:
    card = described_hardware(gpu, 1, 1, None)
    step: Step = roofline.step_of("large", length, 8)
    plain, ours, fused = (roofline.step_seconds(step, variant, card, 5) for variant in (PLAIN, OURS, FUSED_NORM))
    assert step.needed_flops() / GPUS[gpu].peak_flops < fused < ours < plain


def test_what_others_measured_is_below_the_bound() -> None:
    for name, row in roofline.published_table(5).items():
        assert 0 < row["measured by others"] < row["bound of ours"], name
    assert roofline.published_table(5)["large, 128 tokens, a100"]["% of it"] == pytest.approx(63, abs=5)


def test_all_rows_say_that_they_are_computed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["roofline", "--json", "--sizes", "base", "--gpus", "h100"])
    roofline.main()
    rows = runner.document(capsys.readouterr().out)
    assert rows
    assert len(rows) == 7
    assert all("computed, not measured" in row["title"] for row in rows)


@pytest.mark.parametrize("wrong", ["--fill=0", "--fill=1.1", "--launch-us=-1", "--micro-batches=0", "--lengths=4096"])
def test_wrong_rooflines_are_refused(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as found:
        roofline.parse([wrong])
    assert found.value.code == 2
    assert wrong.split("=")[0] in capsys.readouterr().err


@pytest.fixture
def plain_kernels() -> Iterator[None]:
    """What runs on GPUs around the matrix products."""
    select("reference")
    yield
    select("auto")


def calls_of_a_layer() -> Counter[str]:
    """How often operators run for one layer of the real model, forward and backward: three layers against one."""
    found = []
    for layers in (1, 3):
        config = BertConfig(vocab_size=99, hidden_size=32, num_hidden_layers=layers, num_attention_heads=2)
        model = BertForPreTraining(config).train()
        batch = pack(torch.randint(5, 99, (2, 10)), torch.ones(2, 10))
        masked = torch.tensor([1, 2, 15])
        labels = {"mlm_positions": masked, "mlm_labels": masked, "nsp_labels": torch.zeros(2, dtype=torch.long)}
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            output = model(**batch, **labels, max_length=10)
            (output["mlm_loss_sum"] + output["nsp_loss_sum"]).backward()
        found.append(Counter(event.name for event in profile.events()))
    return Counter({name: (found[1][name] - found[0][name]) // 2 for name in found[1]})


@pytest.mark.usefixtures("plain_kernels")
def test_the_real_model_runs_the_operators_that_are_counted() -> None:
    calls, layers = calls_of_a_layer(), 12
    step = roofline.step_of("base", 128, 8)

    def counted(found: list[Kernel], *parts: str) -> float:
        products = [one for one in found if one.part in parts and one.flops]
        return len(products) / layers

    linear = ("QKV projections", "output projection", "FFN")
    assert calls["aten::addmm"] == counted(forward(step, OURS), *linear) == 6
    assert calls["aten::addmm"] + calls["aten::mm"] == counted(kernels(step, OURS), *linear) == 18
    assert (calls["aten::gelu"], calls["aten::gelu_backward"]) == (1, 1)
    assert (calls["aten::native_layer_norm"], calls["aten::native_layer_norm_backward"]) == (2, 2)
    assert calls["aten::add"] == 2, "residual sums"
    assert calls["aten::add_"] == 4, "gradients of the two states that are used twice and four times"
    assert calls["aten::scaled_dot_product_attention"] == 1
