"""The DeepSpeed configuration at the start of a run: what depends on ranks, machine or the installed DeepSpeed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from engine.config import RunConfig, ZeroConfig
from launch.zero.build import Resolution, check_hardware, put, resolve
from launch.zero.schema import check_models
from launch.zero.user_json import with_ranks

if TYPE_CHECKING:
    from engine.data.loading.loader import BatchLayout

REASONS = "deepspeed_reasons.json"


def complete(config: RunConfig, given: frozenset[str], ranks: int, accelerator: str) -> RunConfig:
    """The run's configuration with the batch sizes that follow from its DeepSpeed JSON and the number of ranks.

    It also checks that accelerator and machine have what the run asks for.

    Raises:
        UserError: they don't, or batch sizes contradict each other.
    """
    check_hardware(config.train, accelerator)
    check_nvme(config.zero)
    return with_ranks(config, given, ranks)


def resolved(config: RunConfig, layout: BatchLayout, accelerator: str) -> Resolution:
    """The DeepSpeed configuration, validated by the installed DeepSpeed's own models, as is the user's file before.

    Raises:
        UserError: the file has an unknown key or a wrong value.
    """
    resolution = resolve(config, layout, accelerator)
    if resolution.file is not None:
        whole: dict[str, object] = {}
        for key, value in resolution.file.rest.items():
            put(whole, key, value)
        check_models(resolution.file.path, whole)
    check_models(config.deepspeed_config or "the run's options", resolution.values)
    return resolution


def record(config: RunConfig, resolution: Resolution) -> None:
    """Write the reasons beside the run's deepspeed.json, and print the messages about the user's file; on rank 0."""
    (Path(config.output) / REASONS).write_text(json.dumps(resolution.reasons, indent=2) + "\n")
    for line in resolution.file.notes(config) if resolution.file else ():
        print(f"note: {line}", flush=True)


def check_nvme(zero: ZeroConfig) -> None:
    """Check that this machine can offload to NVMe; builds DeepSpeed's asynchronous I/O at the first call.

    Raises:
        UserError: the disk is missing, or something that the build needs.
    """
    if zero.offload_optimizer == "nvme":
        from engine.zero import nvme

        assert zero.nvme_path is not None
        nvme.check_offload(zero.nvme_path)
