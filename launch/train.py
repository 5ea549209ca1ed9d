"""Train: `deepspeed launch/train.py --config RECIPE`, or torchrun, mpirun, srun, or plain python for one process.

Everything is one configuration tree: defaults, then a YAML recipe, then dotted options on the command line.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if __name__ == "__main__":  # run as a file: import the packages of this checkout and not this folder's modules
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from engine.config import TASKS, RunConfig
from engine.errors import SharedError, UserError
from engine.train.output import newest_step
from engine.train.ranks.device import check as check_device
from engine.train.ranks.device import choose, prepare
from engine.train.watch.preempt import Stopped, StopRequest, agreed_stop, is_scheduled, write_marker
from engine.zero.quiet import silence_libraries
from launch.cli import run_command, tell
from launch.configure.options import build_parser as build_parser  # also for the shell's completion
from launch.configure.options import parse_given
from launch.launcher import (
    Launcher,
    announced_rank,
    check_world,
    detect_launcher,
    empty_variables,
    is_first_rank,
)

if TYPE_CHECKING:
    from engine.data.loading.loader import BatchLayout
    from engine.dist import World
    from engine.tasks.task import Task
    from engine.train.output import OutputLock
    from engine.train.ranks.meeting import Meeting
    from engine.train.watch.session import Session
    from engine.train.watch.watchdog import Watchdog


def build_task(config: RunConfig) -> Task:
    """The task that the configuration names."""
    task: Task = TASKS.get(config.task).load()(config)
    return task


def checked_task(config: RunConfig) -> Task:
    """The task of the run, and its data checked against the length of the run.

    Raises:
        UserError: data or model that don't fit, too little text for pairs, or too few steps for a schedule.
    """
    from engine.model.adapters.budget import Schedule
    from engine.model.pruning.schedule import Schedule as Pruning
    from engine.optim.schedule import check_phases

    task = build_task(config)
    steps = config.train.total_steps(task.train_source().epoch_size(0))
    check_phases(config.optim, steps)
    config.train.check_saved_steps(steps)
    if config.adapter.method == "adalora":
        Schedule.of(config.adapter, steps).check()
    if config.prune.is_on:
        Pruning.of(config.prune, steps).check()
    return task


def train(config: RunConfig, launcher: Launcher, request: StopRequest, given: frozenset[str] = frozenset()) -> int:
    """Run a validated configuration, of which the user set the options `given`, on this rank; collective.

    Returns:
        The exit code.
    """
    from engine.train.output import OutputLock, lost_output
    from engine.train.ranks.join import collective_timeout, end_ranks, start_ranks
    from engine.train.watch.peers import PeerWatch
    from engine.train.watch.session import Session

    output = Path(config.output)
    watchdog, lock = watch(config, launcher), OutputLock(output)
    peers = PeerWatch(lambda: watchdog.on_hang())
    world = None
    try:
        meeting = meet(config, lock, request, watchdog)
        world = start_ranks(config.train.threads, collective_timeout(watchdog.timeout), meeting)
        peers.start(world.rank)
        watchdog.open()
        run(config, launcher, Session(config, world, request, watchdog), given)
        code = 0
    except Stopped as stopped:
        if world is None:
            not_started(stopped, output)
        code = stopped.code
    except BaseException as error:
        peers.end()
        lost = watchdog.lost_rank(error)
        last_word = str(error) or type(error).__name__ if lost is None else lost.LAST_WORD
        watchdog.end(None if isinstance(error, UserError) else last_word)  # all ranks know of a mistake
        lock.abandon()
        if lost is not None:
            raise lost from error
        if world is not None:
            end_ranks(world, together=False)
        if isinstance(error, OSError) and (lost_folder := lost_output(output, error)) is not None:
            raise lost_folder from error
        raise
    watchdog.end()
    if world is not None:
        end_ranks(world, met=peers.end)
    lock.release()
    return code


def watch(config: RunConfig, launcher: Launcher) -> Watchdog:
    """This rank's watchdog, which also looks after the start; a debugger may take its time."""
    from engine.train.watch.watchdog import Watchdog

    timeout = None if sys.gettrace() else config.fault.hang_timeout
    watchdog = Watchdog(Path(config.output), announced_rank(os.environ), launcher.world_size, timeout)
    watchdog.start()
    return watchdog


def meet(config: RunConfig, lock: OutputLock, request: StopRequest, watchdog: Watchdog) -> Meeting:
    """Where this rank tells the others that it is ready, its folder is its own, or what is wrong."""
    from engine.train.output import check_output
    from engine.train.ranks.meeting import Meeting

    def check(rank: int) -> None:
        from deepspeed.accelerator import get_accelerator

        check_device(os.environ, config.train.deterministic, get_accelerator().device_name())
        lock.take() if rank == 0 else check_output(lock.output)

    return Meeting(
        check=check,
        asked=lambda: agreed_stop(request.counts(), is_scheduled(os.environ)),
        alive=lambda: watchdog.feed("meeting of the ranks"),
        limit=watchdog.timeout,
        tell=tell,
    )


def tell_ranks(mistake: UserError) -> NoReturn:
    """Tell of a mistake that this rank has met before the ranks meet, to the user and to the other ranks; collective.

    Where the ranks can't meet, rank 0 gets a moment to speak for all: most launchers then end the others.

    Raises:
        UserError: always.
    """
    rank = announced_rank(os.environ)
    if rank == 0:
        tell(mistake)
    from engine.train.ranks.meeting import Meeting, place_of

    place = place_of(os.environ)
    if place is not None and place.size > 1:
        Meeting().settle(place, mistake)
    if rank > 0:
        time.sleep(2.0)
    raise SharedError(f"rank {rank}: {mistake}" if rank else str(mistake), speaks=rank > 0)


def not_started(stopped: Stopped, output: Path) -> None:
    """Leave word that the run was stopped before its ranks had met; another start is to go on with it."""
    if not is_first_rank(os.environ):
        return
    if not stopped.stop.by_a_person and output.is_dir():
        write_marker(output, newest_step(output) or 0)
    print(f"stopped by {stopped.stop.reason} before all ranks were there; nothing was saved", flush=True)


def run(config: RunConfig, launcher: Launcher, session: Session, given: frozenset[str] = frozenset()) -> None:
    """Check what needs the ranks or the data, then train and report; collective."""
    from engine.data.loading.loader import resolve_layout
    from engine.dist import agreed, gather_objects
    from engine.evaluate import final_report
    from engine.train.curves.monitor import check_monitor
    from engine.train.start import find_start, is_over, recorded_facts, told_over, trained_lines, with_hub_model
    from engine.train.trainer import Trainer
    from launch.forecast.fit import default_layout, explained_memory
    from launch.zero.run import complete, record, resolved

    world = session.world
    check_world(launcher, world.size)
    accelerator = world.device.type
    config = agreed(lambda: complete(config, given, world.size, accelerator))
    agreed(lambda: check_monitor(config.monitor))
    batch = config.train
    micro_batch = None if batch.micro_batch == "auto" else batch.micro_batch
    layout = agreed(lambda: resolve_layout(batch.global_batch, micro_batch, world.size, world.rank))
    config = agreed(lambda: TASKS.get(config.task).load().with_own_data(config, world.is_main))
    start = agreed(lambda: find_start(config))
    config = with_hub_model(config, start, world)
    task = agreed(lambda: checked_task(config))
    facts = agreed(lambda: recorded_facts(task, config, start) if world.is_main else {})
    if any(gather_objects(world.is_main and is_over(task, config, start, facts))):
        if world.is_main and start is not None:
            print(told_over(config, start), flush=True)
        return
    choose(batch, world.device)
    if batch.micro_batch == "auto":
        config, layout = fitted(config, task, world)
    elif batch.micro_batch is None:
        layout = default_layout(config, task, start, world)
    agreed(lambda: config.regularise.check_micro_batch(layout.micro_batch))
    deepspeed = agreed(lambda: resolved(config, layout, accelerator))
    agreed(lambda: session.count_start(config.resume, start))
    with session.reporting(), explained_memory(config, task, layout, world):
        trainer = agreed(lambda: Trainer(task, config, deepspeed.values, layout, start, session, facts))
    if world.is_main:
        record(config, deepspeed)
        for line in (*task.describe_data(), *task.describe_model(), *trained_lines(task, trainer.zero, trainer.output)):
            print(line)
        ranks = "one process" if launcher.name == "none" else f"{launcher.name}: {world.size} rank(s)"
        print(
            f"{ranks} on {accelerator}, ZeRO-{batch.zero_stage}, {batch.precision}; "
            f"global batch {layout.global_batch} = {world.size} x {layout.micro_batch} x {layout.accumulation}, "
            f"{trainer.total} steps",
            flush=True,
        )
    with session.reporting():
        with explained_memory(config, task, layout, world):
            result = trainer.run()
        final_report(task, config, result, layout, world)
        session.finished()


def fitted(config: RunConfig, task: Task, world: World) -> tuple[RunConfig, BatchLayout]:
    """The run with the largest micro-batch that fits, and its layout; collective."""
    from engine.data.loading.loader import resolve_layout
    from launch.forecast.fit import fitting_micro_batch

    size = fitting_micro_batch(config, task, world)
    layout = resolve_layout(config.train.global_batch, size, world.size, world.rank)
    layout = replace(layout, reason="the largest that fits in memory")
    return replace(config, train=replace(config.train, micro_batch=size)), layout


def main(arguments: list[str]) -> int:
    """The command: parse, recognise the launcher, train."""
    silence_libraries()
    for name in empty_variables(os.environ):
        del os.environ[name]
    try:
        config, given = parse_given(arguments)
        launcher = detect_launcher(os.environ, free_port=0)
        prepare(os.environ, config.train.deterministic)  # before torch is imported
    except UserError as error:
        with contextlib.suppress(UserError):
            os.environ.update(detect_launcher(os.environ, free_port=0).variables)
        tell_ranks(error)
    os.environ.update(launcher.variables)
    if launcher.notice and is_first_rank(os.environ):
        print(f"note: {launcher.notice}", flush=True)
    request = StopRequest()
    request.listen(launched=launcher.name in ("deepspeed", "torchrun", "mpirun"))
    return train(config, launcher, request, given)


if __name__ == "__main__":
    run_command(main)
