"""The DeepSpeed configurations in ds_configs/: those that the builder makes for typical runs.

`python -m launch.zero.presets` writes them again; a test keeps them equal to what the builder makes.
`python -m benchmarks.presets` trains 5 real steps with each on 2 CPU ranks. A run builds its own from its recipe, so
these are for reading, as a start for one's own file (train.py --deepspeed_config FILE), and for scripts that call
DeepSpeed themselves.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from engine.config import ModelConfig, Precision, RunConfig, TrainConfig, ZeroConfig
from launch.cli import CommandParser, run_command
from launch.zero.build import deepspeed_config

if TYPE_CHECKING:
    from engine.data.loading.loader import BatchLayout

FOLDER = Path(__file__).resolve().parents[2] / "ds_configs"


@dataclass(frozen=True)
class Preset:
    """A typical run."""

    recipe: str
    """the recipe in launch/recipes that trains this way"""
    stage: int
    precision: Precision = "bf16"
    ranks: int = 8
    batch: int = 1024
    size: str = "base"
    accelerator: str = "cuda"
    zero: ZeroConfig = field(default_factory=ZeroConfig)


PRESETS = {
    "zero0_bf16": Preset("finetune_one_gpu", 0, ranks=1, batch=256),
    "zero1_bf16": Preset("pretrain_base_phase1", 1),
    "zero2_bf16": Preset("pretrain_large_phase1", 2),
    "zero3_bf16": Preset("pretrain_1.3b", 3),
    "zero2_fp16": Preset("pretrain_base_fp16", 2, "fp16"),
    "zero2_offload_optimizer": Preset("pretrain_large_offload", 2, zero=ZeroConfig(offload_optimizer="cpu")),
    "zero3_offload": Preset("pretrain_1.3b_offload", 3, zero=ZeroConfig(offload_optimizer="cpu")),
    "zero3_offload_parameters": Preset(
        "pretrain_1.3b_one_gpu", 3, zero=ZeroConfig(offload_optimizer="cpu", offload_parameters="cpu")
    ),
    "zero3_nvme": Preset("pretrain_1.3b_nvme", 3, zero=ZeroConfig(offload_optimizer="nvme", nvme_path="/nvme")),
    "cpu_debug": Preset("pretrain_tiny", 2, "fp32", ranks=2, batch=16, size="tiny", accelerator="cpu"),
}


def layout(preset: Preset) -> BatchLayout:
    """How the preset's global batch is divided over its ranks."""
    from engine.data.loading.loader import default_micro_batch, resolve_layout

    default = default_micro_batch(preset.accelerator, RunConfig().data.sequence_length)
    return resolve_layout(preset.batch, None, preset.ranks, default=default)


def preset(name: str) -> dict[str, object]:
    """The DeepSpeed dict of a preset."""
    chosen = PRESETS[name]
    train = TrainConfig(zero_stage=chosen.stage, precision=chosen.precision, global_batch=chosen.batch)
    config = RunConfig(train=train, zero=chosen.zero, model=ModelConfig(size=chosen.size))
    return deepspeed_config(config, layout(chosen), chosen.accelerator)


def render(name: str) -> str:
    """The content of a preset's file."""
    return json.dumps(preset(name), indent=2) + "\n"


def main(arguments: list[str]) -> int:
    """Write the files."""
    CommandParser(prog="python -m launch.zero.presets", description="Write ds_configs/ again.").parse_args(arguments)
    for name in PRESETS:
        (FOLDER / f"{name}.json").write_text(render(name))
    return 0


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
