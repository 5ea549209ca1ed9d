"""The memory forecast of `launch.forecast.memory` against what CPU ranks allocate in real training steps.

    python -m benchmarks.memory_forecast               every case of CASES: some ten minutes
    python -m benchmarks.memory_forecast --cases 0 5   only these

Each case starts ranks of its own (torchrun, the engine's ZeroEngine, the launcher's DeepSpeed dict), builds the model
and takes three optimizer steps on full sequences of random tokens. Compared, on rank 0, in MB (10^6 bytes):

- states: forecast parameters + master + gradients + optimizer; measured the storages of all live tensors, each once,
  after a backward pass of the last step: activations are gone, moments are there, and buckets and inputs are left out.
- total: measured the most bytes that torch's CPU allocator had given out at a time (benchmarks/allocations.c, which is
  preloaded and needs gcc), from the second step on; with the certificate from the first. Memory that is allocated and
  not written counts, as it would on a GPU.
- resident: most resident memory (VmHWM) above what the process had before it built the model. It is told beside them
  and no target: it includes what libraries, gloo and malloc keep, and lacks pages that nothing was written to.

On a CUDA machine `torch.cuda.max_memory_allocated` is the measured total, and the margin is left out of the forecast.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import emit, run_ranks
from engine.config import (
    ARCHITECTURES,
    TASKS,
    DataConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
    ZeroConfig,
)
from launch.forecast.memory import Workload, forecast, shape_of

STEPS = 3
MEGA = 1e6


@dataclasses.dataclass(frozen=True)
class Case:
    """A run to measure."""

    size: str
    vocabulary: int
    stage: int
    precision: str
    ranks: int
    micro_batch: int
    sequence_length: int = 128
    optimizer: str = "adamw"
    checkpointing: bool = False
    accumulation: int = 2
    verify: int = 0
    dropout: float = 0.1
    reuse_distance: int = 1_000_000_000
    offload: str = "none"
    architecture: str = "bert"

    def config(self) -> RunConfig:
        """The run, as the launcher would have it."""
        return RunConfig(
            model=ModelConfig(
                self.size,
                self.architecture,
                hidden_dropout=self.dropout,
                attention_dropout=self.dropout,
                activation_checkpointing=self.checkpointing,
            ),
            data=DataConfig(objective="mlm_nsp" if self.pairs else "mlm"),
            optim=OptimConfig(self.optimizer),  # type: ignore[arg-type]
            train=TrainConfig(zero_stage=self.stage, precision=self.precision, verify_update=self.verify),  # type: ignore[arg-type]
            zero=ZeroConfig(self.offload),  # type: ignore[arg-type]
        )

    @property
    def pairs(self) -> bool:
        """Whether the architecture has a head for them; else the run is MLM alone."""
        return "pretraining" in ARCHITECTURES.get(self.architecture).export_classes

    def workload(self, accelerator: str) -> Workload:
        """What the forecast is asked for."""
        config = self.config()
        return Workload(
            TASKS.get(config.task).with_heads(shape_of(config.model, self.vocabulary), config),
            self.sequence_length,
            self.micro_batch,
            self.stage,
            self.ranks,
            self.ranks,
            self.precision,  # type: ignore[arg-type]
            optimizer=self.optimizer,
            activation_checkpointing=self.checkpointing,
            accelerator=accelerator,
            dropout=self.dropout,
            accumulates=self.accumulation > 1,
            verify_update=self.verify,
            stage3_max_reuse_distance=self.reuse_distance,
            offload_optimizer=self.offload,
        )

    @property
    def name(self) -> str:
        extra = [self.architecture] * (self.architecture != "bert")
        extra += [self.optimizer] * (self.optimizer != "adamw") + ["checkpointing"] * self.checkpointing
        extra += ["no dropout"] * (self.dropout == 0) + ["one micro-batch"] * (self.accumulation == 1)
        extra += ["certificate"] * (self.verify > 0) + ["offload"] * (self.offload != "none")
        extra += [f"reuse {self.reuse_distance}"] * (self.reuse_distance != 1_000_000_000)
        shape = f"{self.size} V{self.vocabulary} {self.micro_batch}x{self.sequence_length}"
        return " ".join([f"ZeRO-{self.stage} {self.precision} {self.ranks} rank(s), {shape}", *extra])


CASES = (
    Case("small", 30522, 0, "fp32", 1, 4),
    Case("small", 30522, 0, "bf16", 1, 4),
    Case("mini", 30522, 0, "fp32", 2, 8),
    Case("small", 30522, 1, "fp32", 1, 4),
    Case("small", 30522, 1, "bf16", 2, 4),
    Case("small", 30522, 2, "fp32", 2, 4),
    Case("small", 30522, 2, "bf16", 1, 4),
    Case("small", 30522, 2, "bf16", 2, 16),
    Case("medium", 30522, 2, "bf16", 2, 8, checkpointing=True),
    Case("small", 30522, 3, "fp32", 1, 4),
    Case("medium", 8192, 3, "bf16", 2, 8),
    Case("medium", 30522, 3, "fp32", 2, 2, sequence_length=512, checkpointing=True),
    Case("medium", 8192, 0, "fp32", 1, 16),
    Case("medium", 8192, 1, "fp32", 2, 4, optimizer="lamb"),
    Case("medium", 8192, 2, "fp32", 1, 2, sequence_length=512, dropout=0.0),
    Case("medium", 8192, 0, "fp32", 1, 16, accumulation=1),
    Case("small", 30522, 2, "fp32", 2, 1, verify=1),
    Case("medium", 8192, 3, "bf16", 2, 4, reuse_distance=0),
    Case("small", 30522, 2, "bf16", 2, 4, offload="cpu"),
    Case("small", 30522, 3, "fp32", 2, 4, offload="cpu"),
    Case("small", 8192, 0, "fp32", 1, 4, 512, architecture="modernbert", dropout=0.0),
    Case("small", 8192, 2, "fp32", 2, 4, 512, architecture="modernbert", dropout=0.0),
    Case("small", 8192, 2, "bf16", 2, 4, 512, architecture="modernbert", dropout=0.0),
    Case("small", 30522, 3, "bf16", 2, 2, 1024, architecture="modernbert", dropout=0.0),
    Case("small", 8192, 1, "fp32", 2, 4, 512, architecture="modernbert"),
    Case("medium", 8192, 2, "fp32", 2, 1, 2048, checkpointing=True, architecture="modernbert", dropout=0.0),
    Case("mini", 8192, 0, "fp32", 1, 1, 8192, accumulation=1, architecture="modernbert", dropout=0.0),
)


def batch_of(case: Case, device: torch.device) -> dict[str, Tensor]:
    """Full sequences of random tokens, packed."""
    generator = torch.Generator().manual_seed(0)
    tokens, rows = case.micro_batch * case.sequence_length, case.workload("cpu").rows
    batch = {
        "input_ids": torch.randint(case.vocabulary, (tokens,), generator=generator),
        "token_type_ids": torch.zeros(tokens, dtype=torch.int64),
        "position_ids": torch.arange(case.sequence_length).repeat(case.micro_batch),
        "lengths": torch.full((case.micro_batch,), case.sequence_length),
        "mlm_positions": torch.randperm(tokens, generator=generator)[:rows].sort().values,
        "mlm_labels": torch.randint(case.vocabulary, (rows,), generator=generator),
    }
    if case.pairs:
        batch["nsp_labels"] = torch.zeros(case.micro_batch, dtype=torch.int64)
    return {name: tensor.to(device) for name, tensor in batch.items()}


def build(case: Case, device: torch.device) -> Any:
    """The engine of a case, made as the trainer makes it."""
    from engine.data.loading.loader import BatchLayout
    from engine.model.build import build_config, initialise
    from engine.optim.build import build_optimizer
    from engine.zero.engine import ZeroEngine
    from launch.zero.build import deepspeed_config

    config, ranks = case.config(), torch.distributed.get_world_size()
    global_batch = ranks * case.micro_batch * case.accumulation
    layout = BatchLayout(global_batch, case.micro_batch, torch.distributed.get_rank(), ranks)
    head = "pretraining" if case.pairs else "masked_lm"
    shaped = build_config(config.model, case.vocabulary)
    model = ARCHITECTURES.get(case.architecture).build(head, shaped, case.checkpointing)
    initialise(model, config.seed)
    optimizer = build_optimizer(model, config.optim, device, case.stage)
    values = deepspeed_config(config, layout, device.type)
    if case.stage == 3:
        values["zero_optimization"]["stage3_max_reuse_distance"] = case.reuse_distance
    chosen = values["zero_optimization"].get("reduce_bucket_size")
    assert chosen in (None, case.workload(device.type).bucket), "the forecast assumes another bucket"
    return ZeroEngine(model, optimizer, values)


class Allocator:
    """Peaks of torch's allocator in bytes, above what there was at the start."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self._library = ctypes.CDLL(None)
        for name in () if self.cuda else ("allocated_bytes", "allocated_peak"):
            getattr(self._library, name).restype = ctypes.c_size_t
        self.base = torch.cuda.memory_allocated() if self.cuda else self._library.allocated_bytes()
        self.take()

    def take(self) -> int:
        """The peak since the last call."""
        if self.cuda:
            peak = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        else:
            peak = self._library.allocated_peak()
            self._library.reset_allocated_peak()
        return int(peak) - self.base


def model_states(zero: Any, batch: dict[str, Tensor]) -> int:
    """Bytes of all live storages but those of the batch and of DeepSpeed's buckets, known by their size.

    Stage 1's gradients of other ranks' parts lie in a bucket after the reduction, and keep it until the step.
    """
    left_out = {tensor.untyped_storage().data_ptr() for tensor in batch.values()}
    width = next(zero.model.module.parameters()).element_size()
    bucket = width * zero.config["zero_optimization"].get("reduce_bucket_size", 0)
    found = {}
    # A gradient that only autograd has touched is no Python object until it is asked for.
    gradients = [p.grad for p in zero.model.module.parameters() if p.grad is not None]
    for thing in [*gradients, *gc.get_objects()]:
        if issubclass(type(thing), Tensor) and thing.device.type != "meta":
            storage = thing.untyped_storage()
            if storage.data_ptr() not in left_out and storage.nbytes() != bucket:
                found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def train(case: Case, zero: Any, allocator: Allocator, folder: Path) -> dict[str, int]:
    """Take the steps; bytes of model states, and peaks of the first step and of later ones."""
    from engine.train.certificate.certificate import UpdateCertificate

    certificate = UpdateCertificate(zero, case.config().optim, case.verify, folder)
    batch = batch_of(case, zero.device)
    found = {"states": 0, "first step": 0, "total": 0}
    for step in range(STEPS):
        for index in range(case.accumulation):
            output = zero.model(**batch, max_length=case.sequence_length)
            zero.backward(sum(output[name] for name in output if name.endswith("loss_sum")) / 1000)
            del output
            if step == STEPS - 1:
                found["states"] = max(found["states"], model_states(zero, batch))
            last = index + 1 == case.accumulation
            with certificate.watch(step + 1, 1e-4, last_micro_batch=last):
                zero.step(1e-4, last_micro_batch=last)
        phase = "total" if step else "first step"
        found[phase] = max(found[phase], allocator.take())
    return found


def resident(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) << 10


def worker(case: Case, output: Path) -> None:
    """One rank; rank 0 writes bytes."""
    from engine.train.ranks.join import end_ranks, start_ranks

    world = start_ranks()
    import engine.train.certificate.certificate  # noqa: F401  (libraries belong to the baseline)

    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    baseline, allocator = resident("VmRSS"), Allocator(world.device)
    zero = build(case, world.device)
    measured = {"startup": allocator.take()} | train(case, zero, allocator, output.parent)
    if case.verify:
        measured["total"] = max(measured["total"], measured["first step"])
    measured["resident"] = resident("VmHWM") - baseline
    if world.is_main:
        output.write_text(json.dumps(measured | {"device": world.device.type}))
    end_ranks(world)


def counting_library(folder: Path) -> Path:
    """Compile benchmarks/allocations.c.

    Raises:
        RuntimeError: there is no gcc.
    """
    source, library = Path(__file__).with_name("allocations.c"), folder / "allocations.so"
    command = ["gcc", "-O2", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl", "-lpthread"]
    try:
        subprocess.run(command, check=True)
    except FileNotFoundError as missing:
        raise RuntimeError("gcc is not installed; it compiles what counts the allocations") from missing
    return library


def measure(case: Case) -> dict[str, Any]:
    """Start a case's ranks; what rank 0 measured, in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "found.json"
        before = os.environ.get("LD_PRELOAD")
        os.environ["LD_PRELOAD"] = str(counting_library(Path(folder)))
        try:
            chosen = ["--worker", str(output), "--case", json.dumps(dataclasses.asdict(case))]
            run_ranks("benchmarks.memory_forecast", case.ranks, chosen)
        finally:
            os.environ.pop("LD_PRELOAD")
            if before is not None:
                os.environ["LD_PRELOAD"] = before
        found: dict[str, Any] = json.loads(output.read_text())
    return found


def compare(case: Case) -> dict[str, float]:
    """Forecast, measured and error of a case, in MB and per cent."""
    measured = measure(case)
    guess = forecast(case.workload(measured["device"]))
    states, total = guess.model_states, guess.total - guess.margin
    if measured["device"] == "cpu":  # where the host's memory is the device's
        states, total = states + guess.host, total + guess.host
    return {
        "states": states / MEGA,
        "measured states": measured["states"] / MEGA,
        "states error %": 100 * (states / measured["states"] - 1),
        "total": total / MEGA,
        "measured total": measured["total"] / MEGA,
        "total error %": 100 * (total / measured["total"] - 1),
        "startup": guess.startup / MEGA,
        "measured startup": measured["startup"] / MEGA,
        "resident": measured["resident"] / MEGA,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, nargs="+", default=range(len(CASES)), help="which of CASES, from 0")
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(Case(**json.loads(args.case)), args.worker)
        return
    rows = {}
    for index in args.cases:
        print(CASES[index].name, file=sys.stderr)
        rows[CASES[index].name] = compare(CASES[index])
    emit([{"title": "Memory of rank 0, MB: forecast and measured", "rivals": rows}], args.json)


if __name__ == "__main__":
    try:
        main()
    except Exception:
        traceback.print_exc()
        os._exit(1)  # a rank that fails alone must not wait for the others at exit
