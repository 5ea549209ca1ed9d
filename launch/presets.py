"""The DeepSpeed configurations in ds_configs/: what the builder makes of a typical run.

`python -m launch.presets` writes them again; a test keeps them equal to the builder. A run makes its own from
its recipe, so these are to read, and for scripts that call DeepSpeed themselves.
"""

from __future__ import annotations

import json
from pathlib import Path

from engine.config import OptimConfig, Precision, RunConfig, TrainConfig
from engine.data.loader import resolve_layout
from launch.zero_config import deepspeed_config

FOLDER = Path(__file__).resolve().parent.parent / "ds_configs"
#: name -> (ZeRO stage, precision, ranks, global batch, accelerator)
PRESETS: dict[str, tuple[int, Precision, int, int, str]] = {
    "zero0_bf16": (0, "bf16", 1, 256, "cuda"),
    "zero1_bf16": (1, "bf16", 8, 1024, "cuda"),
    "zero2_bf16": (2, "bf16", 8, 1024, "cuda"),
    "zero3_bf16": (3, "bf16", 8, 1024, "cuda"),
    "zero2_fp16": (2, "fp16", 8, 1024, "cuda"),
    "cpu_debug": (2, "fp32", 2, 16, "cpu"),
}


def preset(name: str) -> dict[str, object]:
    """The DeepSpeed dict of a preset."""
    stage, precision, ranks, batch, accelerator = PRESETS[name]
    train = TrainConfig(zero_stage=stage, precision=precision, global_batch=batch)
    layout = resolve_layout(batch, None, ranks)
    return deepspeed_config(RunConfig(train=train, optim=OptimConfig()), layout, accelerator)


def render(name: str) -> str:
    """The file of a preset."""
    return json.dumps(preset(name), indent=2) + "\n"


if __name__ == "__main__":
    for name in PRESETS:
        (FOLDER / f"{name}.json").write_text(render(name))
