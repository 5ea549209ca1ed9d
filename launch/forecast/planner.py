"""The candidates of a plan, each with its memory and cost, and the choice among them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from engine.config import ARCHITECTURES, TASKS, ModelConfig, RunConfig
from engine.config.train import largest_divisor
from engine.errors import UserError
from engine.model.adapters.trained import trained_of
from launch.forecast.fit import within_memory
from launch.forecast.hardware import Hardware, compared, readable
from launch.forecast.memory import Forecast, Workload, forecast, largest_micro_batch, shape_of
from launch.forecast.step_time import StepCost, step_cost
from launch.forecast.workload import teacher_shapes

if TYPE_CHECKING:
    from launch.zero.build import Resolution

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
    """its dimensions, those of the folder to start from in their place"""
    vocabulary: int
    sequence_length: int
    global_batch: int
    precision: str
    optimizer: str
    checkpointing: str
    """auto, on or off"""
    attention: str
    read_share: float
    """of a sequence's tokens, those whose states the head reads; see `TaskEntry`"""
    tokens: float | None
    """of the whole training; None where only the data would tell"""
    run: RunConfig = field(default_factory=RunConfig)
    """the run as it is asked for, but for what a plan chooses"""
    recipe: RunConfig | None = None
    """the run as its recipe says, if there is one"""
    notes: tuple[str, ...] = ()
    """what a person should know of how the options were understood"""

    @property
    def steps(self) -> float | None:
        """Optimizer steps of the whole training."""
        return None if self.tokens is None else self.tokens / self.tokens_a_step

    @property
    def sequences_per_sample(self) -> int:
        return TASKS.get(self.run.task).sequences_per_sample(self.run)

    @property
    def tokens_a_step(self) -> int:
        return self.global_batch * self.sequences_per_sample * self.sequence_length


@dataclass(frozen=True)
class Candidate:
    """A way to shard, with its largest micro-batch; one that doesn't fit is shown with a micro-batch of 1."""

    work: Workload
    accumulation: int
    memory: Forecast
    cost: StepCost
    fits: bool
    of_recipe: bool = False
    """whether it is what the recipe says, not one of the choices"""

    @property
    def name(self) -> str:
        parts = [f"the recipe: ZeRO-{self.work.stage}" if self.of_recipe else f"ZeRO-{self.work.stage}"]
        if self.work.offload_optimizer != "none":
            parts.append(f"+ optimizer on {'NVMe' if self.work.offload_optimizer == 'nvme' else 'CPU'}")
        if self.work.offload_parameters != "none":
            on_cpu = self.work.offload_optimizer == "cpu"
            parts.append("and parameters" if on_cpu else "+ parameters on CPU")
        return " ".join(parts)

    @property
    def offloads(self) -> bool:
        return self.work.offload_optimizer != "none"

    def tokens_per_second(self, request: Request) -> float:
        return request.tokens_a_step / self.cost.seconds

    def days(self, request: Request) -> float | None:
        return None if request.tokens is None else request.tokens / self.tokens_per_second(request) / 86400

    @property
    def needed(self) -> int:
        """Bytes of a rank's device: of a step, and on CPUs, where it comes from the same memory, of the start."""
        if self.work.accelerator != "cpu":
            return self.memory.total
        return max(self.memory.total + self.memory.host, self.memory.startup)


def workload(request: Request, hardware: Hardware, choice: tuple[int, str, str], checkpointing: bool) -> Workload:
    """A choice as a workload, with a micro-batch of 1."""
    stage, optimizer_place, parameter_place = choice
    task, architecture = TASKS.get(request.run.task), ARCHITECTURES.get(request.model.fresh_architecture)
    shape = task.with_heads(shape_of(request.model, request.vocabulary), request.run)
    return Workload(
        shape=shape,
        sequence_length=request.sequence_length,
        micro_batch=1,
        stage=stage,
        ranks=hardware.ranks,
        ranks_per_node=hardware.ranks_per_node,
        precision=request.precision,  # type: ignore[arg-type]
        optimizer=request.optimizer,
        activation_checkpointing=checkpointing,
        attention=request.attention,
        sequences_per_sample=request.sequences_per_sample * request.run.regularise.copies,
        passes=request.run.regularise.passes,
        read_share=request.read_share,
        offload_optimizer=optimizer_place,
        offload_parameters=parameter_place,
        accelerator=hardware.accelerator,
        dropout=architecture.dropouts(request.model)[0],
        kernels=request.run.train.kernels != "reference",
        copies=request.run.regularise.weight_copies,
        teachers=teacher_shapes(request.run),
        verify_update=request.run.train.verify_update,
        trained=trained_of(request.run, shape, architecture),
    )


def candidate(request: Request, hardware: Hardware, choice: tuple[int, str, str], checkpointing: bool) -> Candidate:
    """The choice with the largest micro-batch that fits and divides the rank's share of the global batch."""
    work = workload(request, hardware, choice, checkpointing)
    share = request.global_batch // hardware.ranks
    limit = largest_micro_batch(work, hardware.memory, limit=share)
    micro_batch = largest_divisor(share, limit or 1)
    accumulation = share // micro_batch
    work = replace(work, micro_batch=micro_batch, accumulates=accumulation * work.passes > 1)
    return measured(work, accumulation, hardware)


def measured(work: Workload, accumulation: int, hardware: Hardware) -> Candidate:
    """A workload with its forecast and its cost, and whether it fits."""
    cost = step_cost(work, accumulation * work.passes, hardware)
    candidate = Candidate(work, accumulation, forecast(work), cost, fits=False)
    host_fits = candidate.memory.host * hardware.ranks_per_node <= hardware.host_memory
    return replace(candidate, fits=candidate.needed <= hardware.memory and host_fits)


def recipe_candidate(request: Request, hardware: Hardware) -> Candidate | None:
    """What the recipe itself chooses: its stage, offload, recomputation and micro-batch; None without a recipe.

    Raises:
        UserError: it can't be trained so on this hardware, or with the plan's options.
    """
    from engine.data.loading.loader import default_micro_batch, resolve_layout

    recipe = request.recipe
    if recipe is None:
        return None
    if request.precision == "fp16" and recipe.train.zero_stage == 0:
        raise UserError("train.zero_stage: the recipe's 0 is not for fp16, whose loss DeepSpeed doesn't scale there")
    choice = (recipe.train.zero_stage, recipe.zero.offload_optimizer, recipe.zero.offload_parameters)
    checkpointing = {"on": True, "off": False}.get(request.checkpointing, recipe.model.activation_checkpointing)
    if recipe.train.micro_batch == "auto":
        return replace(candidate(request, hardware, choice, checkpointing), of_recipe=True)
    work = workload(request, hardware, choice, checkpointing)
    default = default_micro_batch(hardware.accelerator, request.sequence_length, request.sequences_per_sample)
    if hardware.accelerator != "cpu":
        default = within_memory(default, work, hardware.memory)
    layout = resolve_layout(request.global_batch, recipe.train.micro_batch, hardware.ranks, default=default)
    work = replace(work, micro_batch=layout.micro_batch, accumulates=layout.accumulation * work.passes > 1)
    return replace(measured(work, layout.accumulation, hardware), of_recipe=True)


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
        rounds = row.work.stage == 0 and row.work.width < 4 and row.work.accumulates
        communication, seconds = (float(f"{value:.2g}") for value in (row.cost.communication, row.cost.seconds))
        return row.offloads, communication, rounds, seconds, row.work.stage

    return min((row for row in rows if row.fits), key=key, default=None)


def reason(request: Request, chosen: Candidate | None, rows: list[Candidate], hardware: Hardware) -> str:
    """Why this candidate, in a sentence or two; or what would have to change."""
    if chosen is None:
        return nothing_fits(rows, hardware)
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
    rounds = [row for row in fitting if row.work.stage == 0 and row.work.accumulates and row.work.width < 4]
    if chosen.work.stage == 1 and rounds:
        sentences.append(f"ZeRO-0 would sum the gradients of its micro-batches in {chosen.work.precision}.")
    if chosen.work.activation_checkpointing and request.checkpointing == "on":
        sentences.append("Activations are recomputed, as asked.")
    elif chosen.work.activation_checkpointing:
        sentences.append("Activations are recomputed: that is predicted to be faster than what fits without, if any.")
    return " ".join(sentences)


def nothing_fits(rows: list[Candidate], hardware: Hardware) -> str:
    """What the candidate that lacks the least lacks, and the remedy."""
    beyond = [row for row in rows if row.needed > hardware.memory]
    if len(beyond) == len(rows):
        least = min(beyond, key=lambda row: row.needed)
        needed, there = compared(least.needed, hardware.memory)
        remedy = "take more GPUs, shorter sequences or GPUs with more memory"
        of_what = f"{there} a {'rank' if hardware.accelerator == 'cpu' else 'GPU'}"
    else:
        least = min((row for row in rows if row.needed <= hardware.memory), key=lambda row: row.memory.host)
        needed, there = compared(least.memory.host * hardware.ranks_per_node, hardware.host_memory)
        remedy = "take nodes with more memory (--host-memory), or more or larger GPUs"
        of_what = f"{there} of a node's host memory"
    batch = f"a micro-batch of {least.work.micro_batch}"
    return f"Nothing fits: {least.name} with {batch} needs {needed} of {of_what}; {remedy}."


def recipe_verdict(own: Candidate, chosen: Candidate | None, request: Request, hardware: Hardware) -> str:
    """Whether the recipe as it is fits, what it costs, and whether it is what the plan chose."""
    batch = f"micro-batch {own.work.micro_batch} x {own.accumulation}"
    recomputing = "with" if own.work.activation_checkpointing else "without"
    if not own.fits:
        over = own.needed > hardware.memory
        host = own.memory.host * hardware.ranks_per_node
        pair = (own.needed, hardware.memory) if over else (host, hardware.host_memory)
        needed, there = compared(*pair)
        where = "" if over else " of a node's host memory"
        return f"{own.name}, {batch}, {recomputing} recomputation, doesn't fit: it needs {needed} of {there}{where}."
    needed, there = compared(own.needed, hardware.memory)
    days = own.days(request)
    lasts = "" if days is None else f", {duration(days)} for {request.steps:,.0f} steps"
    if own.work.offload_optimizer == "nvme":
        lasts += " (without what the disk may cost)"
    same = chosen is not None and replace(own.work, accumulates=True) == replace(chosen.work, accumulates=True)
    end = "; that is the choice, too" if same else ""
    return (
        f"{own.name}, {batch}, {recomputing} recomputation, fits: {needed} of {there}, {own.cost.seconds:.3f} s a step"
        f"{lasts}{end}."
    )


def duration(days: float) -> str:
    """Days in the unit that reads best."""
    for size, unit in ((1.0, "days"), (1 / 24, "hours"), (1 / 1440, "minutes")):
        if days >= size:
            return f"{days / size:.1f} {unit}"
    return f"{days * 86400:.1f} seconds"


def run_config(request: Request, chosen: Candidate) -> RunConfig:
    """The run that a candidate means."""
    run, work = request.run, chosen.work
    train = replace(run.train, micro_batch=work.micro_batch, zero_stage=work.stage)
    zero = replace(
        run.zero,
        offload_optimizer=work.offload_optimizer,  # type: ignore[arg-type]
        offload_parameters=work.offload_parameters,  # type: ignore[arg-type]
    )
    model = replace(run.model, activation_checkpointing=work.activation_checkpointing)
    return replace(run, model=model, train=train, zero=zero)


def resolution(request: Request, chosen: Candidate, hardware: Hardware) -> Resolution:
    """The resolved DeepSpeed configuration of a candidate, with the reason of each value."""
    from engine.data.loading.loader import resolve_layout
    from launch.zero.build import resolve

    layout = resolve_layout(request.global_batch, chosen.work.micro_batch, hardware.ranks)
    return resolve(run_config(request, chosen), layout, hardware.accelerator)


#: options that a plan may set beside stage, micro-batch and length; those of the model only where it starts fresh
PLANNED = (
    "zero.offload_optimizer", "zero.offload_parameters", "model.activation_checkpointing", "train.precision",
    "optim.name", "train.global_batch", "data.objective",
)  # fmt: skip
PLANNED_MODEL = (
    "model.architecture", "model.size", "model.hidden_size", "model.layers", "model.heads", "model.max_positions",
    "model.init_from",
)  # fmt: skip


def options_for(request: Request, chosen: Candidate) -> str:
    """The options of launch/train.py that choose this candidate, where they differ from the recipe or the defaults."""
    planned, before = run_config(request, chosen), request.recipe or RunConfig()
    parts = [f"--train.zero_stage {chosen.work.stage}", f"--train.micro_batch {chosen.work.micro_batch}"]
    task = TASKS.get(planned.task)
    for name in (*PLANNED, f"{task.section}.{task.length}", *(PLANNED_MODEL if task.starts_fresh else ())):
        section, field_name = name.split(".")
        value = getattr(planned.part(section), field_name)
        if value != getattr(before.part(section), field_name):
            shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else value
            parts.append(f"--{name} {shown}")
    if not task.starts_fresh and planned.model.init_from is None:
        parts.append("--model.init_from FOLDER")
    missing = (name for name in task.required if getattr(planned.part(task.section), name) is None)
    parts.extend(f"--{task.section}.{name} FILE" for name in missing)
    return " ".join(parts)


def as_json(
    request: Request, hardware: Hardware, rows: list[Candidate], chosen: Candidate | None, own: Candidate | None = None
) -> dict[str, Any]:
    """The plan for programs; bytes and seconds. `own` is what the recipe itself chooses."""

    def row(candidate: Candidate) -> dict[str, Any]:
        return {
            "name": candidate.name,
            "stage": candidate.work.stage,
            "fits": candidate.fits,
            "micro_batch": candidate.work.micro_batch,
            "accumulation": candidate.accumulation,
            "activation_checkpointing": candidate.work.activation_checkpointing,
            "offload_optimizer": candidate.work.offload_optimizer,
            "offload_parameters": candidate.work.offload_parameters,
            "memory": {**candidate.memory.kinds(), "total": candidate.memory.total, "host": candidate.memory.host},
            "cost": {**asdict(candidate.cost), "seconds": candidate.cost.seconds},
            "tokens_per_second": candidate.tokens_per_second(request),
            "days": candidate.days(request),
        }

    resolved = None if chosen is None else resolution(request, chosen, hardware)
    return {
        "request": {**without(asdict(request), "run", "recipe"), "steps": request.steps},
        "hardware": asdict(hardware),
        "predicted": True,
        "candidates": [row(one) for one in rows],
        "choice": None if chosen is None else row(chosen),
        "recipe": None if own is None else row(own),
        "reason": reason(request, chosen, rows, hardware),
        "deepspeed": None if resolved is None else resolved.values,
        "deepspeed_reasons": None if resolved is None else resolved.reasons,
    }


def without(values: dict[str, Any], *names: str) -> dict[str, Any]:
    """A dict without some of its keys."""
    return {name: value for name, value in values.items() if name not in names}
