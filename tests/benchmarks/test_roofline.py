"""The roofline's tables, and what it counts for plain torch against the operators that the real model runs."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import BertConfig

from benchmarks import all as runner
from benchmarks import fused_loss, optimizer_step, roofline
from benchmarks.roofline import JOINT, PLAIN
from engine.config import OPTIMIZERS
from engine.kernels import select
from engine.model.bert import BertForPreTraining
from engine.model.packing import pack
from launch.forecast.hardware import GPUS, described_hardware
from launch.forecast.kernels.counting import OURS, PARTS, Kernel
from launch.forecast.kernels.step import LOGIT_BYTES, PLAIN_LOGIT_BYTES, forward, kernels, update

A100 = described_hardware("a100", 1, 1, None)


def total(found: list[Kernel], what: str) -> float:
    return sum(getattr(kernel, what) for kernel in found)


def counted(benchmark: list[dict[str, Any]], name: str) -> dict[str, float]:
    """A rival's row of a table of counts."""
    return next(values for rival, values in benchmark[0]["rivals"].items() if rival.startswith(name))


def test_loss_and_optimizers_are_counted_as_their_own_benchmarks_count_them() -> None:
    logits = fused_loss.counts()
    assert counted(logits, "ours, CUDA, row in registers")["bytes a logit"] == LOGIT_BYTES
    assert counted(logits, "torch, fp32 softmax")["bytes a logit"] == PLAIN_LOGIT_BYTES
    rivals = {"adamw": ("AdamW, ours", "AdamW, torch fused"), "lamb": ("LAMB, ours", "LAMB, apex FusedLAMB")}
    for optimizer, names in rivals.items():
        step = roofline.step_of("base", 128, 8, optimizer=optimizer)
        count = step.work.shape.parameters()
        ours, theirs = (counted(optimizer_step.counts(), name)["all"] for name in names)
        assert total(update(step), "bytes") == ours * count == OPTIMIZERS.get(optimizer).step_bytes * count
        assert total(update(step, PLAIN), "bytes") == theirs * count


def test_plain_torch_decodes_every_token_and_computes_all_last_states() -> None:
    step = roofline.step_of("base", 128, 8)
    tokens, shape = 8 * 128, step.work.shape
    decoded = 0.85 * tokens * 2 * (shape.hidden**2 + shape.hidden * shape.vocabulary)
    unread = (0.85 * tokens - 8) * (2 * (2 * shape.hidden**2 + 2 * shape.hidden * shape.intermediate) + 4 * 128 * 768)
    added = total(forward(step, PLAIN), "flops") - total(forward(step), "flops")
    assert added == pytest.approx(decoded + unread)


def test_slow_launches_bound_a_step() -> None:
    step = roofline.step_of("base", 128, 2)
    table = roofline.variants_table([step], A100, launch_us=1000)
    ours = table["ours, micro-batch 2"]
    assert ours["bound"] == "launches"
    assert ours["ms"] == pytest.approx(ours["launches"])
    assert table[f"{JOINT.name}, micro-batch 2"]["bound"] == "memory", "one graph is launched"
    assert roofline.variants_table([step], A100, launch_us=0)["ours, micro-batch 2"]["bound"] == "memory"


def test_parts_add_up_to_the_step() -> None:
    table = roofline.parts_table(roofline.step_of("large", 128, 32), OURS, A100)
    for name in ("GFLOP", "GB", "launches", "ms"):
        assert sum(float(table[part][name]) for part in PARTS) == pytest.approx(table["step"][name])


@pytest.mark.parametrize("gpu", ["a100", "h100", "h200"])
@pytest.mark.parametrize("length", [128, 512])
def test_ours_is_bound_less_than_plain_torch(gpu: str, length: int) -> None:
    card = described_hardware(gpu, 1, 1, None)
    step = roofline.step_of("large", length, 8192 // length)
    plain, ours, joint = (roofline.step_bound(step, variant, card, 5).seconds for variant in (PLAIN, OURS, JOINT))
    assert step.needed_flops() / GPUS[gpu].peak_flops < joint < ours < plain


def test_a_layer_moves_more_than_the_least() -> None:
    """Base keeps 16 states of bf16, those in the feed-forward network four times as wide, and statistics."""
    table = roofline.layer_table(roofline.step_of("base", 128, 128))
    assert table["the least"]["kB a token forward"] == pytest.approx(2 * (16 * 2 * 768 + 16 + 12 * 4) / 1e3)
    ratios = [float(row["x the least"]) for row in table.values()]
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[-1] == 1


def test_the_forecast_meets_what_others_measured() -> None:
    """Within 5 %, and where sequences were shorter than they are taken to be it stays below."""
    for known, row in zip(roofline.PUBLISHED, roofline.published_table(5).values(), strict=True):
        if known.full:
            assert abs(float(row["error %"])) < 5, row["source"]
        else:
            assert float(row["forecast of theirs"]) < known.sequences
        assert float(row["forecast of ours"]) > float(row["forecast of theirs"])


def test_all_rows_say_that_they_are_computed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["roofline", "--json", "--sizes", "base", "--gpus", "h100"])
    roofline.main()
    rows = runner.document(capsys.readouterr().out)
    assert rows
    assert len(rows) == 9
    assert all("computed, not measured" in row["title"] for row in rows)


@pytest.mark.parametrize("wrong", ["--fill=0", "--fill=1.1", "--launch-us=-1", "--micro-batches=0", "--lengths=4096"])
def test_wrong_rooflines_are_refused(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as found:
        roofline.parse([wrong])
    assert found.value.code == 2
    assert wrong.split("=")[0] in capsys.readouterr().err


@pytest.fixture
def plain_kernels() -> Iterator[None]:
    """Torch's operators around the matrix products."""
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

    def products(found: list[Kernel], *parts: str) -> float:
        return len([one for one in found if one.part in parts and one.flops]) / layers

    linear = ("QKV projections", "output projection", "FFN")
    for variant in (PLAIN, OURS):
        assert calls["aten::addmm"] == products(forward(step, variant), *linear) == 6
        assert calls["aten::addmm"] + calls["aten::mm"] == products(kernels(step, variant), *linear) == 18
    assert (calls["aten::gelu"], calls["aten::gelu_backward"]) == (1, 1)
    assert (calls["aten::native_layer_norm"], calls["aten::native_layer_norm_backward"]) == (2, 2)
    assert calls["aten::add"] == 2, "residual sums"
    assert calls["aten::add_"] == 4, "gradients of the two states that are used twice and four times"
    assert calls["aten::scaled_dot_product_attention"] == 1
