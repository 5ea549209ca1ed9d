"""FLOPs and communication against hand counts and published figures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig

from engine.config import ModelConfig, Shape
from engine.kernels import select
from engine.model.bert import BertForMaskedLM, BertForPreTraining
from engine.model.flops import forward_flops
from engine.model.heads import BertForSequenceClassification
from engine.model.packing import pack
from launch.forecast.hardware import described_hardware
from launch.forecast.kernels.bound import ATTAINABLE_FLOPS
from launch.forecast.memory import Workload, shape_of
from launch.forecast.step_time import communicated, step_cost, step_flops

LARGE = shape_of(ModelConfig(size="large"), 30522)
WORK = Workload(LARGE, 128, 32, stage=1, ranks=8, ranks_per_node=8, precision="bf16")


@pytest.fixture(autouse=True)
def plain_torch() -> Iterator[None]:
    """The counter doesn't know our kernels."""
    select("reference")
    yield
    select("auto")


def test_flops_are_those_that_torch_counts() -> None:
    """All FLOPs of the real model's forward pass, operator by operator."""
    config = BertConfig(
        vocab_size=1000, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=256
    )
    model = BertForPreTraining(config).eval()
    batch = pack(torch.randint(5, 1000, (2, 40)), torch.ones(2, 40))
    masked = torch.tensor([1, 2, 3, 50, 51, 52])
    labels = {"mlm_positions": masked, "mlm_labels": masked, "nsp_labels": torch.zeros(2, dtype=torch.long)}
    # the counter doesn't know attention's CPU kernel
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**batch, **labels, max_length=40)
    shape = shape_of(ModelConfig(hidden_size=64, layers=3, heads=4, intermediate_size=256), 1000)
    # torch's attention takes all queries of the last layer; of masked tokens only the projection is counted
    asked = 2 * (80 - 2 - 6) * 64 * 64 + 4 * (80 - 2) * 40 * 64
    assert 2 * forward_flops(shape, [40], 3) + asked == pytest.approx(counter.get_total_flops(), rel=1e-3)


def test_flops_of_mlm_alone_are_those_that_torch_counts() -> None:
    config = BertConfig(
        vocab_size=1000, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=256
    )
    model = BertForMaskedLM(config).eval()
    masked = torch.tensor([1, 2, 3, 50, 51, 52])
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        packed = pack(torch.randint(5, 1000, (2, 40)), torch.ones(2, 40))
        model(**packed, mlm_positions=masked, mlm_labels=masked, max_length=40)
    shape = Shape(64, 3, 4, 256, 1000, pooler=False)
    asked = 2 * (80 - 6) * 64 * 64 + 4 * 80 * 40 * 64
    assert forward_flops(shape, [40, 40], 6) + asked == pytest.approx(counter.get_total_flops(), rel=1e-3)


def test_flops_of_a_classifier_are_those_that_torch_counts() -> None:
    config = BertConfig(
        vocab_size=1000, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=256, num_labels=5
    )
    model = BertForSequenceClassification(config).eval()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**pack(torch.randint(5, 1000, (2, 40)), torch.ones(2, 40)), max_length=40)
    shape = Shape(64, 3, 4, 256, 1000, classes=5, decoder=False)
    asked = 2 * (80 - 2) * 64 * 64 + 4 * (80 - 2) * 40 * 64
    assert forward_flops(shape, [40, 40], 0) + asked == pytest.approx(counter.get_total_flops(), rel=1e-3)


@pytest.mark.parametrize("gpu", ["a100", "h100", "h200"])
def test_utilisation_follows_from_the_roofline(gpu: str) -> None:
    """A larger micro-batch loses less to weights and launches; a card with more FLOPs a byte waits more for memory."""
    hardware = described_hardware(gpu, 8, 8, None)
    small, usual, large = (step_cost(replace(WORK, micro_batch=size), 4, hardware) for size in (2, 32, 128))
    assert small.utilisation < usual.utilisation < large.utilisation < ATTAINABLE_FLOPS
    assert small.limit == "launches"
    assert large.compute_seconds == pytest.approx(large.flops / hardware.peak_flops / large.utilisation)
    slower = replace(hardware, memory_bandwidth=hardware.memory_bandwidth / 10)
    assert step_cost(WORK, 4, slower).limit == "memory"
    assert step_cost(WORK, 4, slower).utilisation < usual.utilisation


def test_a_given_utilisation_wins() -> None:
    given = step_cost(WORK, 4, replace(described_hardware("a100", 8, 8, None), utilisation=0.3))
    assert (given.utilisation, given.limit) == (pytest.approx(0.3), "")
    assert given.compute_seconds == pytest.approx(step_flops(WORK, 4) / (0.3 * 312e12))


def test_recomputation_costs_a_forward_pass() -> None:
    again = replace(WORK, activation_checkpointing=True)
    assert step_flops(again, 2) * 3 == pytest.approx(step_flops(WORK, 2) * 4)


@pytest.mark.parametrize(
    ("stage", "accumulation", "sent"), [(0, 4, 2), (1, 4, 2), (2, 1, 2), (2, 4, 5), (3, 1, 3), (3, 4, 12)]
)
def test_communication_follows_the_zero_paper(stage: int, accumulation: int, sent: int) -> None:
    """In units of the parameters' bytes: stages 0 to 2 send 2, stage 3 sends 3 (Rajbhandari et al. 2020, section 7)."""
    unit = LARGE.parameters() * 2 * 7 / 8
    assert sum(communicated(replace(WORK, stage=stage), accumulation)) == pytest.approx(sent * unit)


def test_one_rank_sends_nothing() -> None:
    for stage in range(4):
        assert sum(communicated(replace(WORK, stage=stage, ranks=1), 2)) == 0


def test_a_slow_network_shows_and_a_fast_one_hides() -> None:
    work = replace(WORK, stage=3, ranks=16)
    slow, fast = (replace(described_hardware("a100", 16, 8, None), network_bandwidth=b) for b in (1e9, 1e12))
    assert step_cost(work, 1, slow).exposed_seconds > 0
    assert step_cost(work, 1, fast).exposed_seconds == 0
    assert step_cost(work, 1, slow).compute_seconds == step_cost(work, 1, fast).compute_seconds


def test_offload_pays_the_bus() -> None:
    hardware = described_hardware("a100", 8, 8, None)
    on_host = step_cost(replace(WORK, stage=2, offload_optimizer="cpu"), 1, hardware)
    assert on_host.seconds > step_cost(replace(WORK, stage=2), 1, hardware).seconds
    assert on_host.host_seconds > 0
