"""Where a run starts: at step 0 or from a checkpoint that its configuration must not contradict; or that it is done."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

from engine import dist
from engine.config import RunConfig, architecture_of
from engine.errors import UserError
from engine.hub import HubModel, fetch, hub_model
from engine.model.adapters.places import place, plain
from engine.model.folder import PROJECTIONS
from engine.tasks import identity
from engine.tasks.task import Task
from engine.train import best
from engine.train.checkpoint import folder as checkpoint
from engine.zero.engine import ZeroEngine

#: the file that is written last in a report's folder
LAST_OF_REPORT = "report.txt"


def find_start(config: RunConfig) -> Path | None:
    """The checkpoint that the run resumes from, verified and compared with its configuration; None for a new run.

    Collective, and called before anything is built.

    Raises:
        UserError: `resume` or `branch_from` asks for a checkpoint that isn't there, is damaged or contradicts the run.
    """
    own = Path(config.output) / "checkpoints"
    path = checkpoint.find(config.resume, own)
    if path is None and config.branch_from is not None:
        path = checkpoint.named(config.branch_from, "branch_from", "give a step-NNNNNN folder")
    if path is not None:
        checkpoint.check_resumable(checkpoint.read_state(path), path, config.to_dict())
    return path


def with_hub_model(config: RunConfig, start: Path | None, world: dist.World) -> RunConfig:
    """The run with model.init_from at one commit where it names a model of the hub, which is fetched; collective.

    The main rank asks what the name means, then a rank of each machine looks after that machine's cache: where
    machines share it, the files are there and nobody asks again. A resume takes the commit that the run began with.

    Args:
        start: the checkpoint that the run goes on from.

    Raises:
        UserError: the model can't be had.
    """
    given = config.model.init_from
    if given is None:
        return config
    (named, *_) = dist.gather_objects(dist.agreed(lambda: hub_model(given)))
    if named is None:
        return config
    if named.revision is None and start is not None:
        named = begun_with(checkpoint.read_state(start).config, named)
    own = dist.agreed(lambda: named.at(fetch(named)) if world.is_main else None)
    (pinned, *_) = dist.gather_objects(own)
    assert pinned is not None
    dist.agreed(lambda: fetch(pinned) if world.local_rank == 0 else None)
    return replace(config, model=replace(config.model, init_from=str(pinned)))


def begun_with(config: dict[str, Any], named: HubModel) -> HubModel:
    """The commit of a model that a run began with, by its configuration; `named` itself where that tells none."""
    before = hub_model(config.get("model", {}).get("init_from") or "")
    return before if before is not None and before.is_pinned and before.name == named.name else named


def recorded_facts(task: Task, config: RunConfig, start: Path | None) -> dict[str, Any]:
    """What the run's checkpoints record of its data and model, compared with the checkpoint that it resumes from.

    Raises:
        UserError: the checkpoint was made with other data, or is beyond the end of the run.
    """
    facts = task.facts()
    if start is not None:
        state = checkpoint.read_state(start)
        if state.facts is not None:
            identity.check_same(facts, state.facts, start)
        total = config.train.total_steps(task.train_source().epoch_size(0))
        if total < state.step:
            field = "train.steps" if config.train.epochs is None else "train.epochs"
            raise UserError(
                f"{field}: the run would end at step {total} and {start} is at step {state.step}; "
                f"give at least {state.step} steps, or another --output"
            )
    return identity.values(facts)


def tell_loaded(task: Task, config: RunConfig) -> None:
    """Report which tensors of the start model (`model.init_from`) were loaded; each one in the run's folder."""
    folder = config.model.init_from
    if task.loaded is not None:
        print(f"weights of {folder}: {task.loaded}", flush=True)
        values = {"folder": folder, **asdict(task.loaded)}
        (Path(config.output) / "loaded_weights.json").write_text(json.dumps(values, indent=1) + "\n")


def trained_lines(task: Task, zero: ZeroEngine, output: Path) -> list[str]:
    """Which share of the weights is trained, in a line if it isn't all of them; main rank only, writes trained.json."""
    if task.loaded is None:
        return []
    known = {*task.loaded.taken, *task.loaded.initialised, *(each.name for each in task.loaded.reshaped)}
    prefix = architecture_of(task.model_config).prefix
    parts: Counter[str] = Counter()
    base = frozen = 0
    for name, parameter in zero.model.module.named_parameters():
        size = math.prod(zero.wrapper.shape_of(parameter))
        own = plain(name) in known
        base += size if own else 0
        frozen += 0 if parameter.requires_grad else size
        if parameter.requires_grad:
            added = "projections" if PROJECTIONS in plain(name) else "adapters"
            parts[place(plain(name), prefix)[0] if own else added] += size
    told = {"base": base, "trained": parts.total(), "parts": dict(parts)}
    (output / "trained.json").write_text(json.dumps(told, indent=1) + "\n")
    if not frozen:
        return []
    share = parts.total() / (parts.total() + frozen)
    shown = ", ".join(f"{part} {_count(size)}" for part, size in parts.most_common())
    return [f"trained: {_count(parts.total())} of {_count(parts.total() + frozen)} parameters ({share:.2%}): {shown}"]


def _count(parameters: int) -> str:
    """
    >>> _count(23400000), _count(770)
    ('23.4 M', '770')
    """
    return f"{parameters / 1e6:.3g} M" if parameters >= 1e5 else f"{parameters:,}"


def record_config(output: Path, values: dict[str, Any], deepspeed: dict[str, Any]) -> None:
    """Write the run's configuration, as a recipe that runs it again, and the DeepSpeed dict to the run's folder."""
    (output / "config.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    (output / "deepspeed.json").write_text(json.dumps(deepspeed, indent=2) + "\n")


def told_over(config: RunConfig, start: Path) -> str:
    """The message for a run that is done already."""
    state = checkpoint.read_state(start)
    changed = checkpoint.changes(state, config.to_dict())
    without = f"; without effect: {changed}" if changed else ""
    early = f" at step {state.step}, early by train.patience" if _ended_early(state, config) else ""
    return f"{config.output} is finished{early}; its model is in export/ and nothing was changed{without}"


def _ended_early(state: checkpoint.RunState, config: RunConfig) -> bool:
    """Whether the run ends at this checkpoint because its evaluations got no better."""
    return best.patience_is_over(best.of_state(state), state.step, config.train)


def is_over(task: Task, config: RunConfig, start: Path | None, facts: dict[str, Any]) -> bool:
    """Whether nothing is left to do: the last step is saved, or an early end, and its export and report exist."""
    output = Path(config.output)
    if start is None or start.parent.resolve() != (output / "checkpoints").resolve():
        return False
    state = checkpoint.read_state(start)
    total = config.train.total_steps(task.train_source().epoch_size(0))
    if state.facts != facts or not (state.step == total or _ended_early(state, config)):
        return False
    if not best.holds(output / "export", best.of_state(state), step=state.step):
        return False
    return task.best_metric is None or (output / "report" / LAST_OF_REPORT).is_file()
