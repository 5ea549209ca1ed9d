"""What is left of a pruned model is fitted to the whole one, sub-layer by sub-layer, by least squares and no training.

Where R is what a sub-layer should add to its residual stream so that the stream is that of the whole model, and A what
its output matrix W is given in the pruned one, `mask` finds a factor m for each unit, min ||A diag(m) W - R||^2 (Kwon
et al. 2022, section 4.3), and `matrix` the whole matrix, min ||A W - R||^2 (as He et al. 2017, "Channel Pruning for
Accelerating Very Deep Neural Networks", did for convolutions). Both need A^T A and A^T R alone, sums over tokens.

Shape legend: T tokens of all samples, I columns of a sub-layer's output matrix, U units of D columns, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from engine.model.pruning.units import Sublayer, sublayers

Tuning = Literal["matrix", "mask", "none"]
#: of the mean of A^T A's diagonal, what holds the solution near the weights or factors that there are
DAMPING = 1e-2


@dataclass
class Replay:
    """Batches on their way through a model's layers, of which one at a time is computed."""

    states: list[tuple[Any, ...]]
    """by batch, what goes from layer to layer"""
    rest: list[list[tuple[Any, ...]]]
    """by layer and batch, the layer's other arguments"""


def record(model: nn.Module, layers: Sequence[nn.Module], run: Callable[[], Iterator[object]]) -> Replay:
    """What the layers of a model are given in each of the passes that `run` makes.

    A layer returns what it hands to the next one, a tensor or several, as the first arguments of that.
    """
    seen: list[list[tuple[Any, ...]]] = [[] for _ in layers]
    handed = [1]

    def look(index: int) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(_: nn.Module, given: tuple[Any, ...], output: Any) -> None:
            handed[0] = len(output) if isinstance(output, tuple) else 1
            seen[index].append(given if index == 0 else given[handed[0] :])

        return hook

    hooks = [layer.register_forward_hook(look(index)) for index, layer in enumerate(layers)]
    try:
        for _ in run():
            pass
    finally:
        for hook in hooks:
            hook.remove()
    states = [given[: handed[0]] for given in seen[0]]
    return Replay(states, [[given[handed[0] :] for given in seen[0]], *seen[1:]])


@dataclass
class Added:
    """What one layer's sub-layers added to the residual stream of one batch."""

    columns: list[Tensor]
    """what the output matrices were given, [T, I]"""
    outputs: list[Tensor]
    """of the output matrices with their biases, [T, H]"""
    residuals: list[Tensor]
    """what they were added to, [T, H]"""
    states: tuple[Any, ...]
    """what the layer returned"""


@torch.no_grad()
def replayed(layer: nn.Module, parts: Sequence[Sublayer], states: tuple[Any, ...], rest: tuple[Any, ...]) -> Added:
    """Compute a layer and see what attention and the feed-forward network add.

    Sums are made where a norm is given both terms; of layers that normalise first, the second one's in the next layer.
    """
    with _watched(layer, parts) as (columns, sums):
        output = layer(*states, *rest)
    returned = output if isinstance(output, tuple) else (output,)
    pairs = [sums[-1], returned] if len(returned) > 1 else sums
    return Added(columns, [pair[0] for pair in pairs], [pair[1] for pair in pairs], returned)


@contextmanager
def _watched(layer: nn.Module, parts: Sequence[Sublayer]) -> Iterator[tuple[list[Tensor], list[tuple[Any, ...]]]]:
    columns: list[Tensor] = []
    sums: list[tuple[Any, ...]] = []
    hooks = [part.output.register_forward_pre_hook(lambda _, given: columns.append(given[0])) for part in parts]
    norms = [module for module in layer.modules() if isinstance(module, nn.LayerNorm)]
    for norm in norms:
        hooks.append(norm.register_forward_pre_hook(lambda _, given: sums.append(given) if len(given) > 1 else None))
    try:
        yield columns, sums
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def tune(whole: nn.Module, pruned: nn.Module, how: Tuning, run: Callable[[nn.Module], Iterator[object]]) -> None:
    """Fit the output matrices of a pruned model in place; units without a column that isn't zero stay out.

    Args:
        whole: of the same layers.
        pruned: whose units that are out are zeros.
        run: makes the passes of a model over samples of the user's.
    """
    if how == "none":
        return
    teachers, students = (_pairs(model) for model in (whole, pruned))
    above, below = (_layers(model, pairs) for model, pairs in ((whole, teachers), (pruned, students)))
    teaching = record(whole, above, lambda: run(whole))
    learning = Replay(list(teaching.states), teaching.rest)
    for index, (layer, own) in enumerate(zip(below, students, strict=True)):
        wanted = []
        for number, (states, rest) in enumerate(zip(teaching.states, teaching.rest[index], strict=True)):
            added = replayed(above[index], teachers[index], states, rest)
            wanted.append([out + residual for out, residual in zip(added.outputs, added.residuals, strict=True)])
            teaching.states[number] = added.states
        for place, part in enumerate(own):
            gram = torch.zeros(part.columns, part.columns, dtype=torch.float64)
            cross = torch.zeros(part.columns, part.output.out_features, dtype=torch.float64)
            for number, (states, rest) in enumerate(zip(learning.states, learning.rest[index], strict=True)):
                added = replayed(layer, own, states, rest)
                missing = wanted[number][place] - added.residuals[place]
                columns = added.columns[place].float()
                missing = missing - part.output.bias if part.output.bias is not None else missing
                gram += (columns.T @ columns).cpu()
                cross += (columns.T @ missing.float()).cpu()
            fit(part, gram, cross, how)
        for number, (states, rest) in enumerate(zip(learning.states, learning.rest[index], strict=True)):
            learning.states[number] = replayed(layer, own, states, rest).states


def _pairs(model: nn.Module) -> list[tuple[Sublayer, Sublayer]]:
    """By layer, attention and the feed-forward network."""
    parts = sublayers(model)
    return list(zip(parts[::2], parts[1::2], strict=True))


def _layers(model: nn.Module, pairs: Sequence[Sequence[Sublayer]]) -> list[nn.Module]:
    """The encoder's layers, which hold these sub-layers."""
    found = []
    for first, _ in pairs:
        path = first.output_name.split(".")
        found.append(model.get_submodule(".".join(path[: path.index(str(first.layer)) + 1])))
    return found


@torch.no_grad()
def fit(part: Sublayer, gram: Tensor, cross: Tensor, how: Tuning) -> None:
    """Solve for a sub-layer's output matrix.

    Args:
        gram: A^T A, fp64 [I, I].
        cross: A^T R, fp64 [I, H].
    """
    kept = part.kept()
    if not bool(kept.any()):
        return
    columns = kept.repeat_interleave(part.width).cpu()
    weight = part.output.weight
    gram, cross, now = gram[columns][:, columns], cross[columns], weight.T.cpu().double()[columns]
    if how == "matrix":
        found = _solved(gram, cross, now)
    else:
        units = int(kept.sum())
        by_unit = (gram * (now @ now.T)).view(units, part.width, units, part.width).sum((1, 3))
        products = (cross * now).sum(1).view(units, part.width).sum(1)
        factors = _solved(by_unit, products[:, None], torch.ones(units, 1, dtype=torch.float64))
        found = now * factors.repeat_interleave(part.width, 0)
    weight[:, columns.to(weight.device)] = found.T.to(weight)


def _solved(gram: Tensor, cross: Tensor, near: Tensor) -> Tensor:
    """argmin ||A X - R||^2 + d ||X - near||^2."""
    damping = DAMPING * float(gram.diagonal().mean())
    eye = torch.eye(len(gram), dtype=gram.dtype)
    solution: Tensor = torch.linalg.solve(gram + damping * eye, cross + damping * near)
    return solution
