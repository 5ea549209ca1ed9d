"""The DeepSpeed configuration of a run that starts: what needs its ranks, the machine or DeepSpeed itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from engine.config import RunConfig, ZeroConfig
from launch.zero.build import Resolution, check_hardware, put, resolve
from launch.zero.schema import check_models
from launch.zero.user_json import load, told, with_ranks

if TYPE_CHECKING:
    from engine.data.loading.loader import BatchLayout

REASONS = "deepspeed_reasons.json"


def complete(config: RunConfig, given: frozenset[str], ranks: int, accelerator: str) -> RunConfig:
    """The run's configuration with the batch sizes that its DeepSpeed JSON leaves to the ranks; checks the machine.

    Raises:
        UserError: the accelerator or the machine lacks what the run asks for, or batch sizes contradict each other.
    """
    check_hardware(config.train, accelerator)
    check_offload(config.zero)
    return with_ranks(config, given, ranks)


def resolved(config: RunConfig, layout: BatchLayout, accelerator: str) -> Resolution:
    """The DeepSpeed configuration, checked by the installed DeepSpeed's own models where a file took part in it.

    Raises:
        UserError: the file has an unknown key or a wrong value.
    """
    if config.deepspeed_config is not None:
        whole: dict[str, object] = {}
        for key, value in load(config.deepspeed_config).rest.items():
            put(whole, key, value)
        check_models(config.deepspeed_config, whole)
    found = resolve(config, layout, accelerator)
    check_models(config.deepspeed_config or "the run's options", found.values)
    return found


def record(config: RunConfig, resolution: Resolution) -> None:
    """Write the reasons beside the run's deepspeed.json, and tell about the user's file; rank 0 does it."""
    (Path(config.output) / REASONS).write_text(json.dumps(resolution.reasons, indent=2) + "\n")
    for line in told(config):
        print(f"note: {line}", flush=True)


def check_offload(zero: ZeroConfig) -> None:
    """Find out whether this machine can offload to NVMe; builds DeepSpeed's asynchronous I/O at its first run.

    Raises:
        UserError: the disk or what the build needs is missing.
    """
    if zero.offload_optimizer == "nvme":
        from engine.zero import nvme

        assert zero.nvme_path is not None
        nvme.check_offload(zero.nvme_path)
