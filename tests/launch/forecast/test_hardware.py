"""What a user says about machines, and what this machine shows."""

from __future__ import annotations

import pytest

from engine.errors import UserError
from launch.forecast.gpus import ASSUMED, MIB, detected_gpu, named_gpu
from launch.forecast.hardware import (
    GIB,
    GPUS,
    assumed_gpu,
    compared,
    described_hardware,
    parse_bytes,
    readable,
    this_machine,
)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("80GiB", 80 * GIB),
        ("24 GB", 24 * 10**9),
        ("1.5gib", 3 * GIB // 2),
        ("40", 40 * GIB),
        ("0.5", GIB // 2),
        ("80G", 80 * GIB),
        ("512 MiB", GIB // 2),
    ],
)
def test_amounts_of_memory_are_read(text: str, size: int) -> None:
    assert parse_bytes(text, "gpu-memory") == size


@pytest.mark.parametrize("text", ["", "eighty", "80 GiBs", "-1GiB", "0", "1e3GiB", "GiB"])
def test_a_bad_amount_names_the_option(text: str) -> None:
    with pytest.raises(UserError, match=r"gpu-memory: .* is no amount of memory; give one such as 80GiB"):
        parse_bytes(text, "gpu-memory")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("85899345920", "is more than any machine has; a plain number means GiB; give one such as 80GiB"),
        ("40B", "is too little to train anything; give one such as 80GiB"),
        ("40KiB", "is too little to train anything"),
        ("9000TB", "is more than any machine has; give one"),
    ],
)
def test_an_amount_that_is_a_slip_names_the_option(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_bytes(text, "gpu-memory")
    assert str(caught.value).startswith(f"gpu-memory: {text!r} {message}")


def test_a_memory_size_stands_for_the_nearest_card() -> None:
    assert [assumed_gpu(size * GIB) for size in (16, 24, 32, 40, 48, 80, 141)] == [
        "a10", "a10", "rtx5090", "a100-40", "a6000", "a100", "h200",
    ]  # fmt: skip


def test_what_is_said_wins_over_the_card() -> None:
    found = described_hardware("h100", gpus=4, per_node=8, memory=70 * GIB)
    assert (found.memory, found.ranks_per_node, found.nodes) == (70 * GIB, 4, 1)
    assert found.peak_flops == GPUS["h100"].peak_flops


def test_an_unknown_card_is_refused() -> None:
    with pytest.raises(UserError, match="gpu: 'tpu' is unknown; choose one of"):
        described_hardware("tpu", 1, 1, None)


def test_this_machine_is_measured() -> None:
    found = this_machine("fp32")
    assert found.memory > GIB // 4
    assert 1e9 < found.peak_flops < 1e15
    assert found.memory_bandwidth > 1e8


def test_bytes_are_readable() -> None:
    assert [readable(3 * GIB // 2), readable(20 << 20)] == ["1.5 GiB", "20 MiB"]


@pytest.mark.parametrize(
    ("needed", "available", "expected"),
    [
        (2 * GIB + 1, 2 * GIB, ("2.000000001 GiB", "2.000000000 GiB")),
        (2.04 * GIB, 2 * GIB, ("2.04 GiB", "2.00 GiB")),
        (3 * GIB, 2 * GIB, ("3.0 GiB", "2.0 GiB")),
        (GIB - 1, GIB, ("0.999999999 GiB", "1.000000000 GiB")),
        (300 * MIB, 200 * MIB, ("300.0 MiB", "200.0 MiB")),
        (2 * GIB, 2 * GIB, ("2.0 GiB", "2.0 GiB")),
    ],
)
def test_two_amounts_that_differ_read_so(needed: float, available: float, expected: tuple[str, str]) -> None:
    assert compared(needed, available) == expected


@pytest.mark.parametrize("name", GPUS)
def test_a_card_is_plausible_and_known_by_its_own_name(name: str) -> None:
    card = GPUS[name]
    assert named_gpu(name) == named_gpu(f"NVIDIA {name.upper()}") == name
    assert 14 * GIB < card.memory < 192 * GIB
    assert card.peak_flops / card.fp32_flops == (2 if card.bf16 else 8)
    assert 0.25e12 < card.memory_bandwidth < 9e12
    assert 10e9 < card.link_bandwidth < 1e12
    assert card.bf16 == (name not in ("v100", "v100-16", "t4"))
    half, full = (described_hardware(name, 1, 1, None, precision) for precision in ("bf16", "fp32"))
    assert (half.peak_flops, full.peak_flops, half.bf16) == (card.peak_flops, card.fp32_flops, card.bf16)


def test_fp32_products_take_tf32_where_there_is_any() -> None:
    """NVIDIA's data sheets: 156 TFLOP/s of TF32 on an A100; 15.7 without tensor cores on a V100."""
    assert GPUS["a100"].fp32_flops == 156e12
    assert GPUS["v100"].fp32_flops == pytest.approx(15.7e12, rel=0.01)


def test_an_assumed_card_computes_in_bf16() -> None:
    assert all(GPUS[name].bf16 for name in ASSUMED)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("RTX 3090", "rtx3090"), ("GeForce RTX 4090", "rtx4090"), ("5090", "rtx5090"), ("rtx_a6000", "a6000"),
        ("RTX 6000 Ada Generation", "rtx6000ada"), ("6000 Ada", "rtx6000ada"), ("A100-80GB", "a100"),
        ("a100-40GB", "a100-40"), ("Tesla T4", "t4"), ("V100-16GB", "v100-16"), ("H100 SXM5", "h100"), ("L40S", "l40s"),
        ("tpu", None), ("", None), ("rtx2080", None),
    ],
)  # fmt: skip
def test_a_card_may_be_named_as_people_write_it(text: str, name: str | None) -> None:
    assert named_gpu(text) == name


@pytest.mark.parametrize(
    ("text", "mib", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", 81920, "a100"), ("NVIDIA A100-PCIE-40GB", 40536, "a100-40"),
        ("Tesla V100-SXM2-16GB", 16160, "v100-16"), ("Tesla V100-SXM2-32GB", 32510, "v100"), ("Tesla T4", 15109, "t4"),
        ("NVIDIA A10", 22731, "a10"), ("NVIDIA A10G", 22731, "a10g"), ("NVIDIA L4", 22731, "l4"),
        ("NVIDIA L40S", 45589, "l40s"), ("NVIDIA L40", 45589, "l40"), ("NVIDIA GeForce RTX 3090", 24268, "rtx3090"),
        ("NVIDIA RTX A6000", 48685, "a6000"), ("NVIDIA RTX 6000 Ada Generation", 48640, "rtx6000ada"),
        ("NVIDIA H100 80GB HBM3", 81081, "h100"), ("NVIDIA H100 PCIe", 81081, "h100-pcie"),
        ("NVIDIA H200", 143167, "h200"), ("NVIDIA B200", 182642, "b200"), ("Quadro RTX 6000", 24220, None),
    ],
)  # fmt: skip
def test_a_card_is_known_by_its_drivers_name(text: str, mib: int, name: str | None) -> None:
    assert detected_gpu(text, mib * MIB) == name
