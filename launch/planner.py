"""The candidates of a plan, each with its memory and cost, and the choice among them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from engine.config import ModelConfig, OptimConfig, RunConfig, TrainConfig, ZeroConfig
from launch.hardware import Hardware, readable
from launch.memory import Forecast, Workload, forecast, largest_micro_batch, shape_of
from launch.step_time import StepCost, step_cost
from launch.workload import largest_divisor

if TYPE_CHECKING:
    from launch.zero_config import Resolution

#: (stage, where optimizer states go, where parameters go), from the least to the most that moves
CHOICES = [
    (0, "none", "none"),
    (1, "none", "none"),
    (2, "none", "none"),
    (3, "none", "none"),
    (2, "cpu", "none"),
    (3, "cpu", "none"),
    (3, "cpu", "cpu"),
]


@dataclass(frozen=True)
class Request:
    """What is to be trained, whatever the hardware."""

    model: ModelConfig
    vocabulary: int
    sequence_length: int
    global_batch: int
    precision: str
    optimizer: str
    checkpointing: str
    """auto, on or off"""
    attention: str
    mask_probability: float
    tokens: float


@dataclass(frozen=True)
class Candidate:
    """A way to shard, with its largest micro-batch; one that doesn't fit is shown with a micro-batch of 1."""

    work: Workload
    accumulation: int
    memory: Forecast
    cost: StepCost
    fits: bool

    @property
    def name(self) -> str:
        parts = [f"ZeRO-{self.work.stage}"]
        if self.work.offload_optimizer != "none":
            parts.append("+ optimizer on CPU")
        if self.work.offload_parameters != "none":
            parts.append("and parameters")
        return " ".join(parts)

    @property
    def offloads(self) -> bool:
        return self.work.offload_optimizer != "none"

    def tokens_per_second(self, request: Request) -> float:
        return request.global_batch * request.sequence_length / self.cost.seconds

    def days(self, request: Request) -> float:
        return request.tokens / self.tokens_per_second(request) / 86400


def workload(request: Request, hardware: Hardware, choice: tuple[int, str, str], checkpointing: bool) -> Workload:
    """A choice as a workload, with a micro-batch of 1."""
    stage, optimizer_place, parameter_place = choice
    return Workload(
        shape=shape_of(request.model, request.vocabulary),
        sequence_length=request.sequence_length,
        micro_batch=1,
        stage=stage,
        ranks=hardware.ranks,
        ranks_per_node=hardware.ranks_per_node,
        precision=request.precision,  # type: ignore[arg-type]
        optimizer=request.optimizer,
        activation_checkpointing=checkpointing,
        attention=request.attention,
        mask_probability=request.mask_probability,
        offload_optimizer=optimizer_place,
        offload_parameters=parameter_place,
        accelerator=hardware.accelerator,
        dropout=request.model.hidden_dropout,
    )


def candidate(request: Request, hardware: Hardware, choice: tuple[int, str, str], checkpointing: bool) -> Candidate:
    """The choice with the largest micro-batch that fits and divides the rank's share of the global batch."""
    work = workload(request, hardware, choice, checkpointing)
    share = request.global_batch // hardware.ranks
    limit = largest_micro_batch(work, hardware.memory, limit=share)
    micro_batch = largest_divisor(share, limit or 1)
    accumulation = share // micro_batch
    work = replace(work, micro_batch=micro_batch, accumulates=accumulation > 1)
    memory = forecast(work)
    host_fits = memory.host * hardware.ranks_per_node <= hardware.host_memory
    cost = step_cost(work, accumulation, hardware)
    return Candidate(work, accumulation, memory, cost, fits=limit is not None and host_fits)


def candidates(request: Request, hardware: Hardware) -> list[Candidate]:
    """Every choice, each with or without activation checkpointing, whichever is predicted to be faster."""
    options = {"auto": (False, True), "on": (True,), "off": (False,)}[request.checkpointing]
    usable = [c for c in CHOICES if hardware.accelerator != "cpu" or c[1] == "none"]
    if request.precision == "fp16":
        usable = [c for c in usable if c[0] > 0]
    rows = []
    for choice in usable:
        variants = [candidate(request, hardware, choice, checkpointing) for checkpointing in options]
        rows.append(min(variants, key=lambda row: (not row.fits, row.cost.seconds)))
    return rows


def choose(rows: list[Candidate]) -> Candidate | None:
    """The candidate that fits with the least communication, then the least time, then the lowest stage.

    Offload counts as last resort. Stages 0 and 1 communicate the same; where micro-batches are accumulated in half
    precision, stage 1 goes first, for it sums their gradients in fp32.
    """

    def key(row: Candidate) -> tuple[bool, float, bool, float, int]:
        rounds = row.work.stage == 0 and row.work.width < 4 and row.accumulation > 1
        communication, seconds = (float(f"{value:.2g}") for value in (row.cost.communication, row.cost.seconds))
        return row.offloads, communication, rounds, seconds, row.work.stage

    return min((row for row in rows if row.fits), key=key, default=None)


def reason(chosen: Candidate | None, rows: list[Candidate], hardware: Hardware) -> str:
    """Why this candidate, in a sentence or two; or what would have to change."""
    if chosen is None:
        least = min(rows, key=lambda row: row.memory.total)
        return (
            f"Nothing fits: {least.name} with a micro-batch of 1 needs {readable(least.memory.total)} of "
            f"{readable(hardware.memory)}; take more GPUs, shorter sequences or GPUs with more memory."
        )
    sends = "fits, and one rank has nothing to send"
    if hardware.ranks > 1:
        sends = f"sends the least of all that fit ({readable(chosen.cost.communication)} a rank and step)"
    batch = f"a micro-batch of {chosen.work.micro_batch}, accumulated {chosen.accumulation} time(s)"
    sentences = [f"{chosen.name} with {batch}, {sends}."]
    smaller = [row.name for row in rows if not row.fits and not row.offloads and row.work.stage < chosen.work.stage]
    if smaller:
        sentences.append(f"{', '.join(smaller)}: not enough memory.")
    fitting = [row for row in rows if row.fits and row is not chosen]
    same = [row for row in fitting if row.cost.communication == chosen.cost.communication]
    if hardware.ranks > 1 and same:
        sentences.append(f"{same[0].name} sends the same and takes {readable(same[0].memory.total)}.")
    rounds = [row for row in fitting if row.work.stage == 0 and row.accumulation > 1 and row.work.width < 4]
    if chosen.work.stage == 1 and rounds:
        sentences.append(f"ZeRO-0 would sum the gradients of its micro-batches in {chosen.work.precision}.")
    if chosen.work.activation_checkpointing:
        sentences.append("Activations are recomputed: that is predicted to be faster than what fits without, if any.")
    return " ".join(sentences)


def run_config(request: Request, chosen: Candidate) -> RunConfig:
    """The run that a candidate means."""
    train = TrainConfig(
        global_batch=request.global_batch,
        micro_batch=chosen.work.micro_batch,
        zero_stage=chosen.work.stage,
        precision=request.precision,  # type: ignore[arg-type]
    )
    places = {"offload_optimizer": chosen.work.offload_optimizer, "offload_parameters": chosen.work.offload_parameters}
    config = RunConfig(
        model=replace(request.model, activation_checkpointing=chosen.work.activation_checkpointing),
        train=train,
        optim=OptimConfig(name=request.optimizer),  # type: ignore[arg-type]
        zero=ZeroConfig(**places),  # type: ignore[arg-type]
    )
    config.data.sequence_length = request.sequence_length
    return config


def resolution(request: Request, chosen: Candidate, hardware: Hardware) -> Resolution:
    """The resolved DeepSpeed configuration of a candidate, with the reason of each value."""
    from engine.data.loader import resolve_layout
    from launch.zero_config import resolve

    layout = resolve_layout(request.global_batch, chosen.work.micro_batch, hardware.ranks)
    return resolve(run_config(request, chosen), layout, hardware.accelerator)


def options_for(chosen: Candidate) -> str:
    """The options of launch/train.py that choose this candidate."""
    parts = [f"--train.zero_stage {chosen.work.stage}", f"--train.micro_batch {chosen.work.micro_batch}"]
    if chosen.work.activation_checkpointing:
        parts.append("--model.activation_checkpointing true")
    if chosen.work.offload_optimizer != "none":
        parts.append(f"--zero.offload_optimizer {chosen.work.offload_optimizer}")
    if chosen.work.offload_parameters != "none":
        parts.append(f"--zero.offload_parameters {chosen.work.offload_parameters}")
    return " ".join(parts)


def as_json(request: Request, hardware: Hardware, rows: list[Candidate], chosen: Candidate | None) -> dict[str, Any]:
    """The plan for programs; bytes and seconds."""

    def row(one: Candidate) -> dict[str, Any]:
        return {
            "name": one.name,
            "stage": one.work.stage,
            "fits": one.fits,
            "micro_batch": one.work.micro_batch,
            "accumulation": one.accumulation,
            "activation_checkpointing": one.work.activation_checkpointing,
            "offload_optimizer": one.work.offload_optimizer,
            "offload_parameters": one.work.offload_parameters,
            "memory": {**one.memory.kinds(), "total": one.memory.total, "host": one.memory.host},
            "cost": {**asdict(one.cost), "seconds": one.cost.seconds},
            "tokens_per_second": one.tokens_per_second(request),
            "days": one.days(request),
        }

    resolved = None if chosen is None else resolution(request, chosen, hardware)
    return {
        "request": asdict(request),
        "hardware": asdict(hardware),
        "predicted": True,
        "candidates": [row(one) for one in rows],
        "choice": None if chosen is None else row(chosen),
        "reason": reason(chosen, rows, hardware),
        "deepspeed": None if resolved is None else resolved.values,
        "deepspeed_reasons": None if resolved is None else resolved.reasons,
    }
