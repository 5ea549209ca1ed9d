"""What a user says about machines, and what this machine shows."""

from __future__ import annotations

import pytest

from engine.errors import UserError
from launch.hardware import GIB, GPUS, assumed_gpu, described_hardware, parse_bytes, readable, this_machine


@pytest.mark.parametrize(
    ("text", "size"), [("80GiB", 80 * GIB), ("24 GB", 24 * 10**9), ("1.5gib", 3 * GIB // 2), ("512", 512)]
)
def test_amounts_of_memory_are_read(text: str, size: int) -> None:
    assert parse_bytes(text, "gpu-memory") == size


@pytest.mark.parametrize("text", ["", "eighty", "80 GiBs", "-1GiB", "0", "1e3GiB", "GiB"])
def test_a_bad_amount_names_the_option(text: str) -> None:
    with pytest.raises(UserError, match=r"gpu-memory: .* is no amount of memory; give one such as 80GiB"):
        parse_bytes(text, "gpu-memory")


def test_a_memory_size_stands_for_the_nearest_card() -> None:
    assert [assumed_gpu(size * GIB) for size in (16, 24, 32, 40, 48, 80, 141)] == [
        "a10", "a10", "v100", "a100-40", "a6000", "a100", "h200",
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
