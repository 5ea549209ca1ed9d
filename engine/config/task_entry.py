"""What a command line, a resume and a page of curves need to know of a task."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from engine.config.shape import Shape
from engine.errors import require

if TYPE_CHECKING:
    from engine.config.run import RunConfig


class Section(Protocol):
    """A part of the configuration: a dataclass whose fields all have defaults and a docstring each."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def validate(self) -> None:
        """Raise `UserError` for the first field that is wrong."""


@dataclass(frozen=True)
class Title:
    """How a curve is presented."""

    name: str
    """with its unit in brackets"""
    description: str
    """a sentence of Markdown"""


def _nothing_more(config: RunConfig, complete: bool) -> None:
    """The checks of a task that has none beside those of its section."""


def _always(config: RunConfig) -> bool:
    return True


def _one(config: RunConfig) -> int:
    return 1


def _first_alone(config: RunConfig) -> float:
    """The share of a head on the pooled vector, which reads each sequence's first token only."""
    return 0.0


@dataclass(frozen=True)
class TaskEntry:
    """A task as the table knows it. Names of fields are those of its section, without the section."""

    about: str
    """what it is, in a few words"""
    section: str
    """name of its part of the configuration; tasks may share one"""
    options: type[Section]
    """the dataclass of that part"""
    implementation: str | Callable[[RunConfig], Any]
    """the class, an `engine.tasks.task.Task`, or "module:attribute" of it"""
    length: str
    """the field that bounds the tokens of a sequence"""
    inputs: tuple[str, ...] = ()
    """fields that name its data; a command line that gives one, or one of `fixed`, to another task is refused"""
    required: tuple[str, ...] = ()
    """those of them that a run can't do without"""
    starts_fresh: bool = True
    """whether it trains fresh weights too; else a run needs model.init_from"""
    read_share: Callable[[RunConfig], float] = _first_alone
    """share of a sequence's tokens, beside the first, whose states the head reads: for FLOPs and memory"""
    sequences_per_sample: Callable[[RunConfig], int] = _one
    """as far as the configuration tells, for a plan"""
    decodes: bool = False
    """whether the head maps those states to the vocabulary, by the tied word embeddings"""
    pools: Callable[[RunConfig], bool] = _always
    """whether there is a head on the pooled vector"""
    fixed: tuple[str, ...] = ()
    """fields that a resume must not change, because weights, data order or the best score depend on them"""
    freezes: bool = False
    """whether a run may train a part of the weights alone: adapters, or what train.freeze leaves"""
    regularisers: tuple[str, ...] = ()
    """fields of `engine.config.methods.regularise.OF_LOSS` that its loss is defined with"""
    distils: tuple[str, ...] = ()
    """what of `DistilConfig` it can learn from: teachers, and further texts"""
    grouping: str | None = None
    """a field that, where set, orders samples by global batches, whose size a resume must then not change either"""
    metrics: Mapping[str, bool] = field(default_factory=dict)
    """scores that can choose the best checkpoint, the default first, and whether a higher one is better"""
    metric_of_data: bool = False
    """whether the default among them depends on the validation examples, and so stays open until these are read"""
    compared: tuple[str, ...] = ()
    """fields that runs are compared by on TensorBoard's page of hyper-parameters"""
    results: tuple[str, ...] = ()
    """curves whose last values are a run's results, such as eval/accuracy"""
    scores: Mapping[str, Title] = field(default_factory=dict)
    """titles of its curves; the same name has the same title in every task"""
    validate: Callable[[RunConfig, bool], None] = _nothing_more
    """checks across sections; the second argument says whether data and model must be given, which a plan needs not"""

    def check_metric(self, config: RunConfig) -> None:
        """Refuse a metric that the task doesn't score, and patience with one that has none.

        Raises:
            UserError: names the field, its value and the choices.
        """
        metric = getattr(config.part(self.section), "metric", None)
        fits = metric is None or metric in self.metrics
        require(fits, f"{self.section}.metric", metric, f"choose one of {', '.join(self.metrics)}")
        patience = config.train.patience
        remedy = f"task {config.task} has no score that chooses the best weights; leave it out"
        require(patience is None or bool(self.metrics), "train.patience", patience, remedy)

    def with_metric(self, config: RunConfig) -> RunConfig:
        """The same run, with the score that chooses its best checkpoint named, where data don't decide it."""
        if not self.metrics or self.metric_of_data or config.part(self.section).metric is not None:
            return config
        return self._with(config, metric=next(iter(self.metrics)))

    def sequence_length(self, config: RunConfig) -> int:
        """Tokens of a run's longest sequence."""
        length: int = getattr(config.part(self.section), self.length)
        return length

    def with_sequence_length(self, config: RunConfig, length: int) -> RunConfig:
        """The same run with sequences of so many tokens."""
        return self._with(config, **{self.length: length})

    def _with(self, config: RunConfig, **values: Any) -> RunConfig:
        """The same run with other values of fields of the task's section."""
        part = replace(config.part(self.section), **values)
        if self.section in config.extra:
            return replace(config, extra={**config.extra, self.section: part})
        return replace(config, **{self.section: part})

    def with_heads(self, shape: Shape, config: RunConfig) -> Shape:
        """The shape of an encoder, with the heads that a run of this task trains."""
        return replace(shape, decoder=self.decodes, pooler=self.pools(config))

    def load(self) -> Any:
        """The class that does the work; imports torch."""
        implementation = self.implementation
        return pkgutil.resolve_name(implementation) if isinstance(implementation, str) else implementation
