"""A run's teachers, and what they add to the loss of a micro-batch.

The teachers are plain modules beside the model: neither the optimizer nor ZeRO knows of them, and each rank has them
whole. All losses are shares of the global batch.

Shapes: R rows of logits, C columns, B sequences, T tokens in all of them, H width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from engine.config import RunConfig, architecture_of, require
from engine.config.methods.adapter import VIRTUAL
from engine.model.flops import forward_flops
from engine.model.folder import PROJECTIONS
from engine.model.packing import Packing
from engine.precision import DTYPES
from engine.tasks.distilled.losses import relations_apart, states_apart
from engine.tasks.distilled.states import PROJECTED, Seen, Watch
from engine.tasks.distilled.teachers import Student, Teacher, fingerprint
from engine.tasks.identity import Fact

#: seed of the projections beside the run's own
PROJECTION_STREAM = 5


@dataclass(frozen=True)
class Lesson:
    """What the teachers make of a micro-batch."""

    logits: Tensor | None
    """the mean of theirs, [R, C]; None where predictions aren't learned"""
    seen: Sequence[Seen]
    """of each teacher"""


class Distillation:
    """The section `distil` of a run at work.

    Raises:
        UserError: a teacher that doesn't fit the run.
    """

    def __init__(self, config: RunConfig, head: str, student: Student) -> None:
        """
        Args:
            head: of the teachers, by the architectures' names.
        """
        self.config, self.options = student.config, config.distil
        self.teachers = [Teacher(folder, head) for folder in self.options.folders]
        self._of_vectors = head == "embeddings"
        self._dtype, self._seed = DTYPES[config.train.precision], config.seed
        for teacher in self.teachers:
            teacher.check(student, predicts=self.options.soft > 0)
        self._pairs = [layer_pairs(student.config.num_hidden_layers, each.config.num_hidden_layers) for each in self]
        if not self.options.hidden:
            self._pairs = [{} for _ in self]
        self._check_vectors()
        self._check_relations()
        self._check_adapters(config)
        self._models: list[tuple[nn.Module, Watch]] = []
        self._own: Watch | None = None
        self._projections: list[nn.Module | None] = []

    def __iter__(self) -> Iterator[Teacher]:
        return iter(self.teachers)

    def _check_vectors(self) -> None:
        """Refuse to compare vectors of two widths."""
        for teacher in self if self._of_vectors and self.options.soft else ():
            own, theirs = self.config.hidden_size, teacher.config.hidden_size
            remedy = f"{teacher.given} gives vectors of {theirs} numbers and the run of {own}; give 0, and hidden"
            require(own == theirs, "distil.soft", self.options.soft, remedy)

    def _check_relations(self) -> None:
        """Refuse heads that divide no width, and a layer that isn't there."""
        options, width = self.options, self.config.hidden_size
        for teacher in self if options.relations else ():
            heads, theirs = self._heads(teacher), teacher.config.hidden_size
            remedy = f"it must divide the widths of both models, {width} and {theirs}; give another number"
            require(width % heads == 0 and theirs % heads == 0, "distil.relation_heads", heads, remedy)
            layer, layers = options.relation_layer or 0, teacher.config.num_hidden_layers
            remedy = f"{teacher.given} has layers 0 to {layers - 1}"
            require(layer < layers, "distil.relation_layer", layer, remedy)

    def _check_adapters(self, config: RunConfig) -> None:
        """Refuse projections beside adapters, whose folder has no place for them, and states of trained vectors."""
        method, options = config.adapter.method, self.options
        remedy = f"adapter.method {method} puts vectors beside the texts' own, which no teacher has; leave it out"
        field = "hidden" if options.hidden else "relations"
        fits = method not in VIRTUAL or not options.compares_states
        require(fits, f"distil.{field}", getattr(options, field), remedy)
        remedy = f"adapter.method {method} or train.freeze leaves projections to other widths no place; leave it out"
        partial = method != "none" or config.train.freeze is not None
        projects = any(width is not None for width in self._projected_widths())
        require(not (partial and projects), "distil.hidden", options.hidden, remedy)

    def _heads(self, teacher: Teacher) -> int:
        heads: int = self.options.relation_heads or teacher.config.num_attention_heads
        return heads

    def _projected_widths(self) -> list[int | None]:
        """Of each teacher the width that the student's hidden states are projected to; None where they aren't."""
        own, needed = self.config.hidden_size, self.options.hidden > 0
        widths = [each.config.hidden_size for each in self]
        return [width if needed and width != own else None for width in widths]

    def fact(self) -> Fact:
        """The weights of the teachers, for the run's identity."""
        return Fact("teachers' weights", "distil.teachers", fingerprint(self.teachers))

    def describe(self) -> list[str]:
        """A line a teacher for the start of a run."""
        lines = []
        for teacher, pairs, (model, _) in zip(self, self._pairs, self._models, strict=True):
            size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
            layers, width = teacher.config.num_hidden_layers, teacher.config.hidden_size
            learned = ", ".join(f"{own} from {theirs}" for own, theirs in pairs.items())
            told = f"teacher {teacher.given}: {layers} layers, {width} wide, {size:.3g} M parameters"
            lines.append(told + (f"; hidden states of layer {learned}" if learned else ""))
        return lines

    def attach(self, model: nn.Module) -> None:
        """Load the teachers, and let a new student keep what they are compared by; gives it projections in place.

        Raises:
            UserError: weights that are missing or damaged.
        """
        options, predicts = self.options, self.options.soft > 0
        if not self.teachers:
            return
        self._models = []
        for teacher, pairs in zip(self, self._pairs, strict=True):
            loaded, last = teacher.load(predicts=predicts), teacher.config.num_hidden_layers - 1
            layer = last if options.relation_layer is None else options.relation_layer
            watch = self._watch(loaded, teacher.config, sorted({*pairs.values()}), layer)
            self._models.append((loaded, watch))
        own = sorted({layer for pairs in self._pairs for layer in pairs})
        self._own = self._watch(model, self.config, own, self.config.num_hidden_layers - 1)
        self._project(model)

    def _watch(self, model: nn.Module, config: Any, hidden: Sequence[int], relations: int) -> Watch:
        options = self.options
        layer = relations if options.relations else None
        return Watch(model, architecture_of(config), hidden, layer, logits=options.soft > 0)

    def _project(self, model: nn.Module) -> None:
        """Give the model a linear map to each width that differs: parts of what is trained, and of no export."""
        generator = torch.Generator().manual_seed(self._seed + PROJECTION_STREAM)
        self._projections = []
        made = nn.ModuleList()
        for width in self._projected_widths():
            self._projections.append(None)
            if width is not None:
                layer = nn.Linear(self.config.hidden_size, width)
                nn.init.normal_(layer.weight, 0.0, self.config.hidden_size**-0.5, generator=generator)
                nn.init.zeros_(layer.bias)
                made.append(layer)
                self._projections[-1] = layer
        if len(made):
            model.add_module(PROJECTIONS, made)

    @torch.no_grad()
    def teach(self, inputs: Mapping[str, Any]) -> Lesson:
        """What the teachers make of a batch, given as the arguments of their models."""
        device, seen, predicted = inputs["input_ids"].device, [], []
        for model, watch in self._models:
            model.to(device=device, dtype=self._dtype)
            with watch.on() as kept:
                made = model(**inputs)
            seen.append(kept)
            predicted.append(made if isinstance(made, Tensor) else kept.logits)
        if not self.options.soft:
            return Lesson(None, seen)
        logits = [each.float() for each in predicted if each is not None]
        if self._of_vectors:
            logits = [torch.nn.functional.normalize(each, dim=1) for each in logits]
        return Lesson(torch.stack(logits).mean(0), seen)

    @contextmanager
    def watching(self) -> Iterator[Seen]:
        """Inside, what the student computes is kept."""
        assert self._own is not None, "the model was not built by the task"
        with self._own.on() as seen:
            yield seen

    def state_losses(self, lesson: Lesson, seen: Seen, inputs: Mapping[str, Any], total: float) -> dict[str, Tensor]:
        """Shares of the losses of hidden states and of relations, by name and without their weights.

        Args:
            inputs: the model's arguments: `lengths` and `max_length` are read.
            total: sequences of the global batch.
        """
        if not self.options.compares_states:
            return {}
        lengths, tokens = inputs["lengths"], inputs["input_ids"].numel()
        packing = Packing.from_lengths(lengths, tokens, inputs["max_length"])
        found = {}
        if self.options.hidden:
            each = [self._hidden(number, lesson.seen[number], seen, packing) for number in range(len(self.teachers))]
            found["hidden_loss"] = torch.stack(each).mean() / total
        if self.options.relations:
            each = [
                self._relations(teacher, taught, seen, packing)
                for teacher, taught in zip(self, lesson.seen, strict=True)
            ]
            found["relation_loss"] = torch.stack(each).mean() / total
        return found

    def _hidden(self, number: int, taught: Seen, seen: Seen, packing: Packing) -> Tensor:
        """Of one teacher, the mean over the student's layers, summed over sequences."""
        project = self._projections[number]
        apart = []
        for own, theirs in self._pairs[number].items():
            states = seen.hidden[own][: packing.tokens]
            states = states if project is None else project(states)
            apart.append(states_apart(states, taught.hidden[theirs][: packing.tokens], packing.sequences.lengths))
        return torch.stack(apart).mean()

    def _relations(self, teacher: Teacher, taught: Seen, seen: Seen, packing: Packing) -> Tensor:
        """Of one teacher, the sum over queries, keys and values, and over sequences."""
        heads = self._heads(teacher)
        return sum(
            (relations_apart(seen.projected[name], taught.projected[name], heads, packing) for name in PROJECTED),
            torch.zeros((), device=packing.starts.device),
        )

    def weighted(self, losses: Mapping[str, Tensor]) -> Tensor | float:
        """The sum of `state_losses` by their weights."""
        weights = {"hidden_loss": self.options.hidden, "relation_loss": self.options.relations}
        return sum((weights[name] * share for name, share in losses.items()), 0.0)

    def flops(self, lengths: Sequence[int], rows: float, *, pooler: bool, decoder: bool = False) -> float:
        """Of the teachers' forward passes over these sequences.

        Args:
            rows: states that their heads read beside first tokens.
            pooler, decoder: which heads they have, see `engine.config.Shape`.
        """
        shapes = (architecture_of(teacher.config).shape_of(teacher.config) for teacher in self)
        return sum(forward_flops(replace(one, decoder=decoder, pooler=pooler), lengths, rows) for one in shapes)


def layer_pairs(own: int, theirs: int) -> dict[int, int]:
    """Of each of the student's layers the one of the teacher's that it learns from, spread evenly; from 0.

    >>> layer_pairs(4, 6)
    {0: 1, 1: 2, 2: 4, 3: 5}
    """
    return {layer: max(1, -(-(layer + 1) * theirs // own)) - 1 for layer in range(own)}
