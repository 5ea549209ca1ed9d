"""What can be trained, by name: all that a command line, a resume and a page of curves need to know of a task.

Nothing here imports torch; the class that does the work is named and imported when a run begins. Another module adds
a task of its own with `TASKS.register` before it calls `launch.train.main`; no part of the package then knows its name.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from engine.config.check import require
from engine.config.data import DataConfig, LabelledConfig
from engine.config.shape import Shape
from engine.registry import Registry

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
    decodes: bool = False
    """whether the head maps those states to the vocabulary, by the tied word embeddings"""
    pools: Callable[[RunConfig], bool] = _always
    """whether there is a head on the pooled vector"""
    fixed: tuple[str, ...] = ()
    """fields that a resume must not change, because weights, data order or the best score depend on them"""
    grouping: str | None = None
    """a field that, where set, orders samples by global batches, whose size a resume must then not change either"""
    compared: tuple[str, ...] = ()
    """fields that runs are compared by on TensorBoard's page of hyper-parameters"""
    results: tuple[str, ...] = ()
    """curves whose last values are a run's results, such as eval/accuracy"""
    scores: Mapping[str, Title] = field(default_factory=dict)
    """titles of its curves; the same name has the same title in every task"""
    validate: Callable[[RunConfig, bool], None] = _nothing_more
    """checks across sections; the second argument says whether data and model must be given, which a plan needs not"""

    def sequence_length(self, config: RunConfig) -> int:
        """Tokens of a run's longest sequence."""
        length: int = getattr(config.part(self.section), self.length)
        return length

    def with_sequence_length(self, config: RunConfig, length: int) -> RunConfig:
        """The same run with sequences of so many tokens."""
        part = replace(config.part(self.section), **{self.length: length})
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


def _validate_pretraining(config: RunConfig, complete: bool) -> None:
    length, limit = config.data.sequence_length, config.model.positions
    fits = bool(config.model.init_from) or length <= limit
    require(fits, "data.sequence_length", length, f"it exceeds model.max_positions ({limit}); lower it or raise that")


def _validate_classification(config: RunConfig, complete: bool) -> None:
    train, start = config.labelled.train, config.model.init_from
    require(bool(train) or not complete, "labelled.train", train, "give a file of labelled examples")
    require(bool(start) or not complete, "model.init_from", start, "give the folder of a model")


_MASKING = (
    "objective", "sequence_length", "short_sequence_probability", "mask_probability", "mask_probability_end",
    "eval_mask_probability", "mask_replace_probability", "random_replace_probability", "mean_span_length",
    "whole_word_masking",
)  # fmt: skip


def _largest_masked_share(config: RunConfig) -> float:
    """That at the beginning or at the end of the run."""
    return max(config.data.mask_probability, config.data.mask_probability_end or 0.0)


_SCORES = ("accuracy", "macro_f1", "matthews", "loss")

TASKS: Registry[TaskEntry] = Registry(
    "task",
    {
        "pretrain": TaskEntry(
            about="MLM + NSP, or MLM alone",
            section="data",
            options=DataConfig,
            implementation="engine.tasks.pretrain:Pretraining",
            length="sequence_length",
            inputs=("path",),
            read_share=_largest_masked_share,
            decodes=True,
            pools=lambda config: config.data.objective == "mlm_nsp",
            fixed=_MASKING,
            compared=_MASKING,
            results=tuple(f"eval/{name}" for name in ("mlm_loss", "perplexity", "mlm_accuracy", "nsp_accuracy")),
            scores={
                "mlm_loss": Title(
                    "masked-language-model loss [nats]",
                    "Cross-entropy of a masked token; its exponential is the perplexity.",
                ),
                "nsp_loss": Title("next-sentence loss [nats]", "Cross-entropy of a pair; ln 2 = 0.693 is guessing."),
                "mlm_accuracy": Title("masked-language-model accuracy [share]", "Masked tokens guessed right."),
                "nsp_accuracy": Title("next-sentence accuracy [share]", "Pairs told right; 0.5 is guessing."),
                "perplexity": Title("perplexity", "The exponential of the masked-language-model loss; no unit."),
            },
            validate=_validate_pretraining,
        ),
        "sequence_classification": TaskEntry(
            about="one label a text or pair of texts",
            section="labelled",
            options=LabelledConfig,
            implementation="engine.tasks.sequence:SequenceClassification",
            length="max_length",
            inputs=("train", "validation", "test"),
            required=("train",),
            starts_fresh=False,
            fixed=("text", "text_pair", "label", "max_length", "metric", "group_by_length"),
            grouping="group_by_length",
            compared=("max_length", "group_by_length"),
            results=tuple(f"{part}/{name}" for part in ("test", "eval") for name in _SCORES),
            scores={
                "accuracy": Title("accuracy [share]", "Examples classified right."),
                "macro_f1": Title(
                    "macro F1", "Mean of the classes' F1 scores, 0 to 1; rare classes count as frequent ones."
                ),
                "matthews": Title(
                    "Matthews correlation", "-1 to 1; 0 is guessing, whatever the shares of the classes."
                ),
            },
            validate=_validate_classification,
        ),
    },
)


def task_entries() -> list[TaskEntry]:
    """The tasks in the order in which they were registered."""
    return [TASKS.get(name) for name in TASKS.names]


def task_choices() -> str:
    """The names that the option takes and what each is, in words."""
    return " or ".join(f"{name} ({TASKS.get(name).about})" for name in TASKS.names)


def tasks_with_field() -> dict[str, tuple[str, ...]]:
    """The dotted fields that name data or decide what is learned from it, and the tasks that read them."""
    readers: dict[str, tuple[str, ...]] = {}
    for name, entry in zip(TASKS.names, task_entries(), strict=True):
        for own in dict.fromkeys((*entry.inputs, *entry.fixed)):
            option = f"{entry.section}.{own}"
            readers[option] = (*readers.get(option, ()), name)
    return readers
