"""Pre-training steps of base and large: sequences/s, MFU and memory, each as the engine itself measures it.

Speed is that of steps without a profiler; FLOPs, the measured peak and the parts of a step are those of recorded steps
of the same run (`--train.profile`). Memory is the most that torch's allocator gave out, beside what `launch.forecast`
says without its margin for CUDA's libraries, which that allocator doesn't see.
"""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.proof import materials
from benchmarks.proof.runs import LEAN, Run, run_all, tail
from benchmarks.proof.stage import Report, Setting
from engine.config import ModelConfig
from launch.forecast.gpus import GPUS, detected_gpu
from launch.forecast.memory import forecast
from launch.forecast.workload import Workload, shape_of

#: steps recorded, and from which step on speed counts: the first recorded steps need a start of their own
PROFILED, UNMEASURED = 2, 10


@dataclass(frozen=True)
class Case:
    """One run, whose step is one micro-batch."""

    size: str
    length: int
    batch: int
    stage: int = 1
    precision: str = "bf16"
    steps: int = 40
    every: int = 5
    """steps of a point of the curves: on a GPU each point waits for it"""
    toy: bool = False

    @property
    def name(self) -> str:
        return f"{self.size}-{self.length}-batch{self.batch}-zero{self.stage}"

    def model(self) -> ModelConfig:
        if self.toy:
            return ModelConfig(hidden_size=32, layers=2, heads=2, max_positions=self.length)
        return ModelConfig(size=self.size)

    def options(self, store: Path) -> list[str]:
        model = self.model()
        shape = ["--model.hidden_size=32", "--model.layers=2", "--model.heads=2"] if self.toy else []
        return [
            *LEAN, *shape, f"--model.size={model.size}", f"--model.max_positions={model.positions}",
            f"--data.path={store}", f"--data.sequence_length={self.length}", "--data.short_sequence_probability=0",
            f"--train.global_batch={self.batch}", f"--train.micro_batch={self.batch}", f"--train.steps={self.steps}",
            f"--train.zero_stage={self.stage}", f"--train.precision={self.precision}", "--train.verify_update=0",
            f"--train.log_interval={self.every}", f"--train.profile={PROFILED}", "--train.eval_samples=16",
            "--monitor.norm_interval=0",
        ]  # fmt: skip


def cases(toy: bool) -> Sequence[Case]:
    """In the order of their worth: batches of 16,384 tokens, then small ones, which the host bounds."""
    if toy:
        return [Case("tiny", 32, 8, steps=12, every=1, toy=True)]
    return [
        Case("base", 128, 128),
        Case("large", 128, 128),
        Case("base", 512, 32),
        Case("large", 512, 32),
        Case("base", 128, 128, stage=0),
        Case("base", 128, 32),
        Case("base", 128, 128, stage=3),
    ]


def memory(case: Case, vocabulary: int, device: str) -> int:
    """What the forecast says of torch's allocator, in bytes."""
    said = forecast(
        Workload(
            shape_of(case.model(), vocabulary), case.length, case.batch, case.stage, 1, 1, case.precision,  # type: ignore[arg-type]
            accelerator=device, accumulates=False, verify_update=0,
        )
    )  # fmt: skip
    return said.total - said.margin


def after(run: Run, tag: str) -> list[float]:
    """Values of a curve without those of the first steps, or of its second half in a short run."""
    curve = run.curve(tag)
    kept = [value for step, value in curve if step > UNMEASURED]
    return kept or [value for _, value in curve[len(curve) // 2 :]]


def figures(run: Run, case: Case, vocabulary: int, device: str, sheet_flops: float | None) -> dict[str, Any]:
    """What a run has shown."""
    if run.code:
        return {"failed": run.why}
    tokens, step = after(run, "train/tokens_per_second"), after(run, "train/step_time")
    seconds = statistics.median(step)
    used, said = max(after(run, "train/memory_bytes")), memory(case, vocabulary, device)
    found: dict[str, Any] = {
        "sequences/s": case.batch / seconds,
        "tokens/s": statistics.median(tokens),
        "step ms": 1e3 * seconds,
        "memory GB": used / 1e9,
        "forecast GB": said / 1e9,
        "forecast, share of the memory": said / used,
    }
    path = run.output / "profile" / "summary.json"
    profile = json.loads(path.read_text()) if path.exists() else None
    if profile is None:
        return found | {"profile": "none was written"}
    flops = profile["flops_per_step"] / seconds
    found["TFLOP/s"] = flops / 1e12
    if profile["gemm_peak"]:
        found["MFU % of the measured peak"] = 100 * flops / profile["gemm_peak"]
    if sheet_flops:
        found["MFU % of the data sheet"] = 100 * flops / sheet_flops
    whole = profile["step_seconds"]
    found["step ms while recorded"] = 1e3 * whole
    for group in ("parts", "kinds"):
        shares = {name: 100 * part / whole for name, part in profile[group].items()}
        found[group] = ", ".join(f"{name} {share:.0f} %" for name, share in shares.items() if share >= 1)
    return found


def sheet(device: str) -> float | None:
    """The data sheet's FLOP/s of this card; None for others and for a CPU."""
    if device == "cpu":
        return None
    import torch

    properties = torch.cuda.get_device_properties(0)
    key = detected_gpu(properties.name, properties.total_memory)
    return GPUS[key].peak_flops if key else None


def run(setting: Setting, report: Report) -> None:
    store, scratch = Path(setting.materials) / materials.STORE, Path(setting.scratch)
    vocabulary = json.loads((store / "manifest.json").read_text())["vocab_size"]
    flops = sheet(setting.device)
    rivals: dict[str, dict[str, Any]] = {}
    chosen = {case.name: case for case in cases(setting.toy)}
    runs = {name: case.options(store) for name, case in chosen.items()}
    for name, ended in run_all(runs, scratch, setting.device, at_once=1):
        rivals[name] = figures(ended, chosen[name], vocabulary, setting.device, flops)
        title = f"pre-training steps, bf16, one rank, vocabulary {vocabulary}"
        report.put({"title": title, "rivals": rivals})
        if ended.code:
            tail(ended)
        shutil.rmtree(ended.output / "export", ignore_errors=True)
