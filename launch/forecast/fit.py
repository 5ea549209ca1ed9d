"""The micro-batch that fits (`train.micro_batch auto`), and what to say when memory ran out all the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from engine.config import TASKS, RunConfig, architecture_of
from engine.config.train import largest_divisor
from engine.errors import RunError
from engine.model.adapters.trained import trained_of
from launch.forecast.hardware import readable
from launch.forecast.memory import Forecast, Workload, forecast, largest_micro_batch
from launch.forecast.workload import teacher_shapes

if TYPE_CHECKING:
    from pathlib import Path

    from engine.data.loading.loader import BatchLayout, Default
    from engine.dist import World
    from engine.tasks.task import Task

#: what a process takes after the trial besides tensors: threads, TensorBoard, back ends' buffers, the allocator's gaps
RESERVE = 256 << 20


def workload_of(config: RunConfig, made: Task, micro_batch: int, world: World) -> Workload:
    """The run on these ranks as the forecast sees it."""
    task, model = TASKS.get(config.task), made.model_config
    architecture = architecture_of(model)
    shape = task.with_heads(architecture.shape_of(model), config)
    return Workload(
        shape=shape,
        sequence_length=task.sequence_length(config),
        micro_batch=micro_batch,
        stage=config.train.zero_stage,
        ranks=world.size,
        ranks_per_node=world.local_size,
        precision=config.train.precision,
        optimizer=config.optim.name,
        activation_checkpointing=config.model.activation_checkpointing,
        sequences_per_sample=made.sequences_per_sample * config.regularise.copies,
        passes=config.regularise.passes,
        read_share=task.read_share(config),
        offload_optimizer=config.zero.offload_optimizer,
        offload_parameters=config.zero.offload_parameters,
        accelerator=world.device.type,
        dropout=architecture.dropouts(config.model)[0],
        kernels=config.train.kernels != "reference",
        copies=config.regularise.weight_copies,
        teachers=teacher_shapes(config),
        trained=trained_of(config, shape, architecture),
    )


def halvings(share: int, first: int) -> Iterator[int]:
    """Micro-batches to try: divisors of the rank's share from `first` down, each at most half of the one before.

    So accumulation doubles, or more where the share has no such divisor, and the global batch stays.
    """
    limit = first
    while limit >= 1:
        size = largest_divisor(share, limit)
        yield size
        limit = size // 2


def ballast(memory: Forecast, work: Workload) -> int:
    """Bytes of a run that the trial's own model doesn't hold: its weights and gradients, and teachers, are there."""
    run = memory.total - memory.activations - memory.head - work.teachers_bytes
    return RESERVE + max(0, run - work.width * (work.parameters + work.trained_parameters))


def fitting_micro_batch(config: RunConfig, task: Task, world: World) -> int:
    """The largest micro-batch that fits on every rank, from the forecast and then by trial; collective.

    Raises:
        RunError: not even one sequence fits.
    """
    from engine import dist
    from engine.train.fit import available_memory, fits

    share = config.train.global_batch // world.size
    work = workload_of(config, task, 1, world)
    memory = min(dist.gather_objects(available_memory(world.device, world.local_size)))
    first = largest_micro_batch(work, memory, limit=share) or 1
    held = ballast(forecast(work), work)
    for size in halvings(share, first):
        if all(dist.gather_objects(fits(task, size, config.train.precision, world.device, held))):
            return size
        if world.is_main:
            print(f"train.micro_batch auto: {size} doesn't fit", flush=True)
    raise RunError(
        f"train.micro_batch: auto found that not even 1 sequence fits into {readable(memory)} a rank "
        f"({breakdown(forecast(work))}); {remedies(config, 1)}"
    )


def within_memory(default: Default, work: Workload, memory: int) -> Default:
    """The default micro-batch, or the fewer sequences of it that fit by the forecast; 1 where not even that fits.

    Args:
        work: the run with any micro-batch.
        memory: bytes of a rank.
    """
    limit = largest_micro_batch(work, memory, limit=default.limit) or 1
    if limit == default.limit:
        return default
    room = f"up to the {limit} that the forecast fits into {readable(memory)}"
    return replace(default, limit=limit, reason=f"the largest that divides a rank's share, {room}")


def default_layout(config: RunConfig, task: Task, start: Path | None, world: World) -> BatchLayout:
    """The layout of a run that leaves `train.micro_batch` open; collective.

    It is that of the checkpoint which the run goes on from, where that had left it open too on as many ranks.
    """
    from engine import dist
    from engine.data.loading.loader import Default, default_micro_batch, resolve_layout
    from engine.train.checkpoint.folder import read_state
    from engine.train.fit import available_memory

    accelerator, train = world.device.type, config.train
    length = TASKS.get(config.task).sequence_length(config)
    default = default_micro_batch(accelerator, length, task.sequences_per_sample)
    if accelerator != "cpu":
        memory = min(dist.gather_objects(available_memory(world.device, world.local_size)))
        default = within_memory(default, workload_of(config, task, 1, world), memory)
    state = None if start is None else read_state(start)
    if state is not None and state.micro_batch and state.world_size == world.size:
        before = state.config.get("train", {})
        same = ("micro_batch", None), ("global_batch", train.global_batch)
        if all(before.get(name) == value for name, value in same):
            default = Default(state.micro_batch, "as in the checkpoint that the run goes on from")
    return resolve_layout(train.global_batch, None, world.size, world.rank, default)


def breakdown(memory: Forecast) -> str:
    """The parts of a forecast that matter, in words."""
    parts = [f"{name} {readable(size)}" for name, size in memory.kinds().items() if size >= memory.total / 50]
    return f"forecast {readable(memory.total)}: {', '.join(parts)}"


def remedies(config: RunConfig, micro_batch: int) -> str:
    """The settings that would help, the cheapest first; none of them changes the global batch."""
    options = []
    if micro_batch > 1:
        options.append(f"train.micro_batch {max(1, micro_batch // 2)} or auto")
    if not config.model.activation_checkpointing:
        options.append("model.activation_checkpointing true")
    if config.train.zero_stage < 3:
        options.append(f"train.zero_stage {config.train.zero_stage + 1} with more ranks")
    if config.zero.offload_optimizer == "none":
        options.append("zero.offload_optimizer cpu")
    return f"set {', '.join(options)}" if options else "take ranks with more memory"


@contextmanager
def explained_memory(config: RunConfig, task: Task, layout: BatchLayout, world: World) -> Iterator[None]:
    """Turn running out of memory into one line: the forecast beside the fact, and what to change.

    Raises:
        RunError: instead of the allocator's exception.
    """
    from engine.train.curves.monitor import memory_bytes
    from engine.train.fit import is_out_of_memory

    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        work = workload_of(config, task, layout.micro_batch, world)
        raise RunError(
            f"out of memory on rank {world.rank} with micro-batch {layout.micro_batch}: the rank's peak was "
            f"{readable(memory_bytes(world.device))} ({breakdown(forecast(work))}); "
            f"{remedies(config, layout.micro_batch)}"
        ) from error
