"""Which runs a ladder makes: for each architecture, objective, size and seed a trunk, and branches that decay early.

The rate is constant behind the warm-up (wsd) until it decays, so the trunk of the largest token budget has passed
through the states that a run of a smaller one decays from: such a run begins with the trunk's checkpoint there, and is
what it would have been alone (Hu et al. 2024, MiniCPM, section 4; Hägele et al. 2024).

<output>/ladder.json                                     the runs
<output>/<architecture>-<objective>/<size>/seed-N/<budget>/   a run, its budget such as 20x; its log beside it
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from engine.config import RunConfig
from engine.durable import write_atomically
from engine.errors import UserError, require
from engine.model.flops import training_flops
from engine.scaling.sizes import Size, counts, geometric, size_near
from engine.train.output import checkpoint_name
from launch.api import in_yaml
from launch.configure.options import joined, parse
from launch.forecast.request import store_vocabulary
from launch.scaling.ladder.reading import LadderFile
from launch.seeds.plan import Member
from launch.suite.plan import located, whole

RECORD = "ladder.json"
#: batches from here on are multiples of it, so that ranks and micro-batches share them
EVEN_BATCH = 8
#: halvings of the range in which a ladder's largest size is looked for
HALVINGS = 30


@dataclass(frozen=True)
class Budget:
    """A token budget of a size, in optimizer steps."""

    name: str
    """such as 20x, tokens a parameter, or 5e+06"""
    steps: int
    decay: int

    @property
    def begins(self) -> int:
        """The last step before the decay."""
        return self.steps - self.decay


@dataclass(frozen=True)
class Rung:
    """An architecture, an objective and a size: what its runs share."""

    objective: str
    size: Size
    parameters: int
    """without embeddings"""
    batch: int
    learning_rate: float
    warmup: int
    budgets: tuple[Budget, ...]
    step_flops: float

    @property
    def name(self) -> str:
        return f"{self.size.architecture}-{self.objective}/{self.size.name}"

    def executed(self, budget: Budget) -> int:
        """Steps that the run of a budget makes itself."""
        return budget.steps if budget == self.budgets[-1] else budget.decay


@dataclass(frozen=True)
class Cell:
    """A run of a ladder."""

    rung: Rung
    budget: Budget
    seed: int
    member: Member

    @property
    def is_trunk(self) -> bool:
        return self.budget == self.rung.budgets[-1]

    @property
    def trunk(self) -> str:
        """The name of the run that it begins with, or is."""
        return f"{self.rung.name}/seed-{self.seed}/{self.rung.budgets[-1].name}"

    @cached_property
    def config(self) -> RunConfig:
        """Its configuration.

        Raises:
            UserError: an option is wrong.
        """
        return parse(self.member.options)


@dataclass(frozen=True)
class Ladder:
    """All runs of a file."""

    file: LadderFile
    output: Path
    rungs: tuple[Rung, ...]
    cells: tuple[Cell, ...]
    """trunks before branches, small ones first"""

    @property
    def flops(self) -> float:
        """Of all runs, as they are executed."""
        return sum(cell.rung.step_flops * cell.rung.executed(cell.budget) for cell in self.cells)


def plan_ladder(file: LadderFile, output: Path | None) -> Ladder:
    """The runs of a ladder, each validated.

    Args:
        output: replaces the file's.

    Raises:
        UserError: the first option that is wrong, or that the runs in the folder had differently.
    """
    where = whole(output or (file.path.parent / file.output if file.output else Path("runs") / file.path.stem))
    base = {name: _located(name, value, file.path.parent) for name, value in file.base.values.items()}
    require(
        bool(base.get("data.path")), "base.data.path", base.get("data.path"), f"give a prepared store ({file.path})"
    )
    vocabulary = store_vocabulary(base["data.path"])
    if vocabulary is None:
        raise UserError(
            f"data.path: {base['data.path']} is no prepared store; make it with zerobert prepare ({file.path})"
        )
    rungs = tuple(_rungs(file, base, vocabulary))
    cells = tuple(_cells(file, base, rungs, where))
    for cell in {cell.rung.name: cell for cell in cells if cell.is_trunk}.values():  # others differ in numbers of steps
        _checked(cell, file)
    ladder = Ladder(file, where, rungs, cells)
    _check_same(ladder)
    return ladder


def _located(name: str, value: Any, beside: Path) -> Any:
    inside = isinstance(value, str) and name == "data.path" and (beside / value).exists()
    return str(whole(beside / value)) if inside else located(name, value, Path(), beside)


def _rungs(file: LadderFile, base: Mapping[str, Any], vocabulary: int) -> list[Rung]:
    """The rungs, smallest first; with `flops` the largest ladder that they allow."""
    sizes = file.sizes
    if sizes.targets:
        return _with_targets(file, base, vocabulary, sizes.targets)
    if file.flops is None:
        assert sizes.end is not None
        return _with_targets(file, base, vocabulary, geometric(sizes.begin, sizes.end, sizes.count))
    return _fitting(file, base, vocabulary, file.flops)


def _fitting(file: LadderFile, base: Mapping[str, Any], vocabulary: int, flops: float) -> list[Rung]:
    """The ladder with the largest end that these FLOPs allow."""
    sizes, found = file.sizes, list[Rung]()
    low, high = sizes.begin, sizes.begin * 1e6
    for _ in range(HALVINGS):
        end = (low * high) ** 0.5
        try:
            rungs = _with_targets(file, base, vocabulary, geometric(sizes.begin, end, sizes.count))
        except UserError:  # sizes that are too near for shapes of their own
            low = end
            continue
        needed = len(file.seeds) * sum(rung.step_flops * rung.executed(each) for rung in rungs for each in rung.budgets)
        if needed <= flops:
            low, found = end, rungs
        else:
            high = end
    if not found:
        raise UserError(
            f"flops: {flops:g} are too few for {sizes.count} sizes from {sizes.begin:g} parameters on; give more, or "
            f"smaller sizes, or a smaller proportions.head_width ({file.path})"
        )
    return found


def _with_targets(file: LadderFile, base: Mapping[str, Any], vocabulary: int, targets: Sequence[float]) -> list[Rung]:
    found: dict[str, Rung] = {}
    for architecture in file.architectures:
        for objective in file.objectives:
            for target in targets:
                rung = _rung(file, base, vocabulary, objective, size_near(target, architecture, file.proportions))
                if rung.name in found:
                    raise UserError(
                        f"sizes: two of them are {rung.size.name}; give sizes that are further apart, or a smaller "
                        f"proportions.head_width than {file.proportions.head_width} ({file.path})"
                    )
                found[rung.name] = rung
    return sorted(found.values(), key=lambda rung: rung.parameters)


def _rung(file: LadderFile, base: Mapping[str, Any], vocabulary: int, objective: str, size: Size) -> Rung:
    shape = size.shape(vocabulary, pairs=objective == "mlm_nsp")
    parameters = counts(shape).no_embedding
    exact, learning_rate = file.rules["global_batch"](parameters), file.rules["learning_rate"](parameters)
    batch = max(1, round(exact)) if exact < EVEN_BATCH else EVEN_BATCH * round(exact / EVEN_BATCH)
    length = base.get("data.sequence_length", RunConfig().data.sequence_length)
    masked = base.get("data.mask_probability", RunConfig().data.mask_probability) * batch * length
    budgets = tuple(_budget(file, each, parameters, batch * length) for each in file.budgets)
    warmup = max(1, round(file.warmup * budgets[0].steps))
    distinct = len({each.steps for each in budgets}) == len(budgets)
    if not distinct or not all(warmup <= each.begins for each in budgets):
        raise UserError(
            f"tokens: {', '.join(each.name for each in budgets)} are {', '.join(str(each.steps) for each in budgets)} "
            f"steps of {size.name}, too few to warm up and to decay in; give more, or a smaller rules.global_batch "
            f"({file.path})"
        )
    flops = training_flops(shape, [length] * batch, masked)
    return Rung(objective, size, parameters, batch, learning_rate, warmup, budgets, flops)


def _budget(file: LadderFile, budget: float, parameters: int, tokens_a_step: int) -> Budget:
    tokens = budget * parameters if file.per_parameter else budget
    steps = max(1, round(tokens / tokens_a_step))
    name = f"{budget:g}x" if file.per_parameter else f"{budget:.3g}"
    return Budget(name, steps, max(1, round(file.decay * steps)))


def _cells(file: LadderFile, base: Mapping[str, Any], rungs: Sequence[Rung], output: Path) -> list[Cell]:
    cells = [
        _cell(base, rung, budget, seed, output) for rung in rungs for budget in rung.budgets for seed in file.seeds
    ]
    return [*(cell for cell in cells if cell.is_trunk), *(cell for cell in cells if not cell.is_trunk)]


def _cell(base: Mapping[str, Any], rung: Rung, budget: Budget, seed: int, output: Path) -> Cell:
    size, trunk = rung.size, rung.budgets[-1]
    of_seed = output / rung.name / f"seed-{seed}"
    folder = of_seed / budget.name
    own: dict[str, Any] = {
        "task": "pretrain",
        "output": str(folder),
        "resume": "auto",
        "seed": seed,
        "model.architecture": size.architecture,
        "model.hidden_size": size.hidden,
        "model.layers": size.layers,
        "model.heads": size.heads,
        "data.objective": rung.objective,
        "optim.learning_rate": float(f"{rung.learning_rate:.4g}"),
        "optim.schedule": "wsd",
        "optim.warmup": rung.warmup,
        "optim.decay": budget.decay,
        "train.global_batch": rung.batch,
        "train.steps": budget.steps,
    }
    if budget == trunk:
        own["train.save_at"] = ",".join(str(each.begins) for each in rung.budgets[:-1]) or None
    else:
        own["branch_from"] = str(of_seed / trunk.name / "checkpoints" / checkpoint_name(budget.begins))
    options = [f"--{name}={in_yaml(value)}" for name, value in joined(dict(base), own).items()]
    name = f"{rung.name}/seed-{seed}/{budget.name}"
    return Cell(rung, budget, seed, Member(folder, options, name, of_seed / f"{budget.name}.log"))


def _checked(cell: Cell, file: LadderFile) -> None:
    """Raises: UserError: an option of a run is wrong, with the line of the file that has it."""
    try:
        cell.config.train.check_saved_steps(cell.budget.steps)
    except UserError as error:
        name = str(error).partition(":")[0]
        where = file.base.where(name) if name in file.base.values else cell.member.name
        raise UserError(f"{error} ({where} of {file.path})") from error


def _check_same(ladder: Ladder) -> None:
    """Refuse runs under the names of earlier ones with other options.

    Raises:
        UserError: names the first option that differs.
    """
    before = read_record(ladder.output)
    for cell in ladder.cells:
        old = before.get("runs", {}).get(cell.member.name, {}).get("options", cell.member.options)
        changed = sorted(set(cell.member.options) ^ set(old))
        if changed:
            name = changed[0].lstrip("-").partition("=")[0]
            raise UserError(
                f"output: {ladder.output} has {cell.member.name} with another {name}; put it back, or give another "
                "--output"
            )


def read_record(output: Path) -> dict[str, Any]:
    """What a ladder's folder says of its runs; empty where it is none.

    Raises:
        UserError: the file isn't what was written.
    """
    path = output / RECORD
    if not path.is_file():
        return {}
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(told["runs"], dict)
    except (OSError, ValueError, KeyError, AssertionError) as error:
        raise UserError(f"{path}: it is no record of a ladder ({error!r}); remove it") from error
    return dict(told)


def write_record(ladder: Ladder) -> None:
    """Keep the runs in the ladder's folder, beside those of earlier calls."""
    runs = dict(read_record(ladder.output).get("runs", {}))
    for cell in ladder.cells:
        rung, budget = cell.rung, cell.budget
        runs[cell.member.name] = {
            "trunk": cell.trunk,
            "size": rung.size.name,
            "architecture": rung.size.architecture,
            "objective": rung.objective,
            "seed": cell.seed,
            "budget": budget.name,
            "steps": budget.steps,
            "options": cell.member.options,
        }
    ladder.output.mkdir(parents=True, exist_ok=True)
    told = {"held_out": dict(ladder.file.held_out), "abilities": dict(ladder.file.abilities), "runs": runs}
    write_atomically(ladder.output / RECORD, json.dumps(told, indent=1, ensure_ascii=False) + "\n")
