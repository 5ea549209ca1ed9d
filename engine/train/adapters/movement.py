"""Whether a run trained what it should have: how far each trained weight is from where it began.

Under ZeRO an adapter can stay as it was without any error (https://github.com/huggingface/peft/issues/1402: LoRA's B
all zeros). Each rank keeps what it steps as it was before the first step, in host memory: 4 bytes a trained parameter,
divided by the ranks. A resumed run builds the same weights again before it loads its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from engine import dist
from engine.durable import write_atomically
from engine.errors import RunError
from engine.model.adapters.places import plain
from engine.tasks.report_files import table
from engine.train.log import say
from engine.zero.engine import ZeroEngine

TABLE = "adapter_updates.tsv"
COLUMNS = ("module", "parameters", "norm", "change", "ratio")
#: modules that the message names
NAMED = 3
#: elements that are compared at a time
CHUNK = 1 << 20
#: a change of which less than this share is in another direction than the initial weights is one of their length alone
STRAIGHT = 0.05
#: elements below which such a change may well be of a gradient
FEWEST = 8


@dataclass(frozen=True)
class Moved:
    """How far a module's trained weights, fp32, are from their initial values."""

    parameters: int
    norm: float
    """L2 norm at the end"""
    change: float
    """L2 norm of the difference"""
    stuck: bool
    """whether nothing changed but by weight decay, or of an adapter a factor stays zeros, so that it does nothing"""

    @property
    def ratio(self) -> float:
        """The change over the norm at the end; 0 of zeros that were zeros."""
        return self.change / self.norm if self.norm > 0 else float(self.change > 0)

    @property
    def figures(self) -> list[str]:
        """Norm, change and ratio in the table."""
        return [f"{value:.7g}" for value in (self.norm, self.change, self.ratio)]


class Sums(NamedTuple):
    """Of one parameter's elements, in fp64."""

    elements: int
    now: float
    """sum of squares of the weights"""
    change: float
    """sum of squares of their differences from the initial ones"""
    before: float
    """sum of squares of the initial weights"""
    product: float
    """sum of products of the weights and the initial ones"""

    @property
    def idle(self) -> bool:
        """Whether nothing changed but that weight decay shrank the whole, which takes no gradient."""
        if self.change == 0.0:
            return True
        if self.before == 0.0 or self.elements < FEWEST or self.product >= self.before:
            return False
        turned = self.now - self.product**2 / self.before
        return turned < STRAIGHT**2 * self.change


class Movement:
    """The trained weights as a run begins with them, made before anything is loaded or stepped."""

    def __init__(self, zero: ZeroEngine) -> None:
        self.zero = zero
        self._initial: list[Tensor] = []
        for shard in zero.wrapper.shards():
            with shard.reading():
                self._initial.append(shard.tensor.detach().view(-1).to("cpu", copy=True))

    def measured(self) -> dict[str, Moved]:
        """By module, in the model's order, what the weights are now; collective."""
        squares = self._squares()
        model = self.zero.model.module
        grouped: dict[str, list[tuple[str, bool]]] = {}
        for name, _ in model.named_parameters():
            if name in squares:
                module, is_adapter = owner(model, name)
                grouped.setdefault(module, []).append((name, is_adapter))
        return {module: together(squares, names) for module, names in grouped.items()}

    @torch.no_grad()
    def _squares(self) -> dict[str, Sums]:
        """Of each trained parameter by name; collective."""
        found = {}
        for shard, initial in zip(self.zero.wrapper.shards(), self._initial, strict=True):
            sums = torch.zeros(len(shard.parameters), 4, dtype=torch.float64)
            with shard.reading():
                for piece in shard.fragments:
                    part = slice(piece.start, piece.start + piece.length)
                    chunks = zip(
                        shard.tensor.detach().view(-1)[part].split(CHUNK), initial[part].split(CHUNK), strict=True
                    )
                    for now, before in ((a.cpu().double(), b.double()) for a, b in chunks):
                        pairs = ((now, now), (now - before, now - before), (before, before), (now, before))
                        sums[piece.parameter] += torch.stack([torch.dot(*pair) for pair in pairs])
            if shard.process_group is not None:
                sums = dist.sum_over_ranks(sums, shard.process_group)
            for info, row in zip(shard.parameters, sums.tolist(), strict=True):
                found[info.name] = Sums(info.numel, *row)
        return found


def owner(model: nn.Module, name: str) -> tuple[str, bool]:
    """The module that a trained parameter counts to, and whether it is of an adapter around that module.

    All that is in a wrapper of a layer counts to that layer.
    """
    path = name.rpartition(".")[0]
    above = path
    while above:
        if hasattr(model.get_submodule(above), "base_layer"):
            return plain(above), True
        above = above.rpartition(".")[0]
    return plain(path), False


def together(squares: Mapping[str, Sums], names: Iterable[tuple[str, bool]]) -> Moved:
    """Parameters of one module, by name and whether they are of its adapter."""
    parts = [(squares[name], is_adapter) for name, is_adapter in names]
    idle = all(part.idle for part, _ in parts)
    useless = any(is_adapter and part.idle and part.before == 0.0 for part, is_adapter in parts)
    norm, change = sum(part.now for part, _ in parts) ** 0.5, sum(part.change for part, _ in parts) ** 0.5
    return Moved(sum(part.elements for part, _ in parts), norm, change, idle or useless)


def prove(movement: Movement, output: Path, emptied: frozenset[str] = frozenset()) -> None:
    """Write how far each module moved to <output>/report and tell the range; collective.

    Args:
        output: the run's folder.
        emptied: modules whose adapter AdaLoRA has left no rank.

    Raises:
        RunError: one did not move at all; the same on every rank.
    """
    moved = movement.measured()
    path = output / "report" / TABLE
    if dist.place()[0] == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, table(COLUMNS, [(name, m.parameters, *m.figures) for name, m in moved.items()]))
    stuck = [name for name, m in moved.items() if m.stuck and name not in emptied]
    if stuck:
        more = f" and {len(stuck) - NAMED} more" if len(stuck) > NAMED else ""
        raise RunError(
            f"not trained: {', '.join(stuck[:NAMED])}{more} of {len(moved)} modules did not move from their initial "
            f"values, as {path} shows; raise optim.learning_rate or train.steps if they are tiny, else please report it"
        )
    ratios = [m.ratio for m in moved.values()]
    say(f"adapters moved: {len(moved)} modules, change {min(ratios):.2g} to {max(ratios):.2g} of their norm ({path})")
