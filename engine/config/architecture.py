"""What an architecture says of itself, and the table of architectures; without torch, so that a command line can ask.

`engine.model` has the modules. Whoever adds an architecture derives from `Architecture` and registers an instance under
the `model_type` of its transformers configuration. A run takes the architecture of the folder that it starts from.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from engine.config.model import DEFAULT_ARCHITECTURE, MODEL_SIZES, ModelConfig
from engine.config.shape import Shape
from engine.errors import UserError, require
from engine.registry import Registry

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

#: the dimensions that a run's options give
DIMENSIONS = ("hidden_size", "layers", "heads", "intermediate_size", "max_positions")


class Architecture(ABC):
    """An encoder with its heads. A `config` is an instance of `config_class`.

    Attributes:
        dimensions: the options `DIMENSIONS` of the section model, and what config.json calls each.
        inherited: names in config.json of all that a run takes from a folder that it starts from.
        sizes: those of them that are whole numbers above 0.
        rates: those of them that are numbers of at least 0, or null.
        export_classes: by head the transformers class that opens an export: "pretraining" (MLM and NSP), "masked_lm"
            (MLM alone), "sequence_classification", "token_classification", "question_answering", "multiple_choice",
            "embeddings" (the encoder alone).
        tied: parameters that an export leaves out, and those that they share their tensor with.
        prefix: what the names of the encoder's parameters begin with in a model with a head.
        essential: beginnings of names behind the prefix: an encoder without these is useless.
        growing: ends of the names of parameters that have a row for each token of the vocabulary.
        linear: by name of `engine.config.methods.adapter.SINGLE` a linear layer's place in an encoder layer, which
            names of one matrix share.
        options: of the section model, beside the dimensions, that the architecture has; no weight depends on them, so
            they also change the model of a folder.
        extensible: dimensions that no weight depends on either.
        takes_prefix: whether its attention, here and in transformers, takes keys and values that are of no token.
        dropout: of a run that names none.
        feed_forward_matrices, biases: see `Shape`.
    """

    dimensions: ClassVar[Mapping[str, str]]
    inherited: tuple[str, ...]
    sizes: tuple[str, ...]
    rates: tuple[str, ...] = ("initializer_range",)
    export_classes: ClassVar[Mapping[str, str]]
    tied: ClassVar[Mapping[str, str]]
    prefix: str
    essential: tuple[str, ...]
    growing: tuple[str, ...]
    linear: ClassVar[Mapping[str, str]]
    options: tuple[str, ...] = ()
    extensible: tuple[str, ...] = ()
    takes_prefix: bool = True
    dropout: float = 0.1
    feed_forward_matrices: int = 2
    biases: bool = True

    @abstractmethod
    def config_class(self) -> type[Any]:
        """The class of its transformers configuration."""

    @abstractmethod
    def check(self, path: Path, config: Any) -> None:
        """Refuse a configuration that the modules don't compute.

        Args:
            path: of the config.json, to be named.

        Raises:
            UserError: names the file, the field and what would be supported.
        """

    def check_dimensions(self, model: ModelConfig) -> None:  # noqa: B027  (most have nothing to refuse)
        """Refuse dimensions of fresh weights that the modules don't compute.

        Raises:
            UserError: names the field, its value and the remedy.
        """

    @abstractmethod
    def build(self, head: str, config: Any, activation_checkpointing: bool) -> nn.Module:
        """The encoder under a head of `export_classes`; its parameters are not initialised yet."""

    def class_for(self, head: str) -> str:
        """The name of the transformers class that opens an export with this head.

        Raises:
            UserError: the architecture has no such head.
        """
        if head not in self.export_classes:
            raise UserError(
                f"model.init_from: a model of type {self.config_class().model_type!r} has no head for {head}; "
                f"it has {' and '.join(self.export_classes)}: give another model or task"
            )
        return self.export_classes[head]

    @abstractmethod
    def layer_of(self, name: str) -> str:
        """The layer that a parameter counts to in the curves of norms."""

    def has_export_class(self, name: str) -> bool:
        """Whether there is a class of this name; transformers' are not imported, which takes seconds."""
        import transformers

        is_model = "For" in name or name.endswith("Model")
        return name in self.export_classes.values() or (is_model and name in transformers.__all__)

    def export_class(self, name: str) -> type[Any]:
        """The class that opens an export, from its name."""
        import transformers

        kind: type[Any] = getattr(transformers, name)
        return kind

    def fresh_config(self, model: ModelConfig, vocabulary: int, pad_token_id: int) -> Any:
        """The configuration of a run's own dimensions, with two segments."""
        sizes = dict(zip(DIMENSIONS, (*model.dimensions(), model.positions), strict=True))
        named = {self.dimensions[option]: size for option, size in sizes.items()}
        return self.config_class()(**named, vocab_size=vocabulary, type_vocab_size=2, pad_token_id=pad_token_id)

    def dropouts(self, model: ModelConfig) -> tuple[float, float, float | None]:
        """Dropout of hidden states, of attention's probabilities, and before a task's head (None: as the first)."""
        given = (model.hidden_dropout, model.attention_dropout)
        hidden, attention = (self.dropout if value is None else value for value in given)
        return hidden, attention, model.classifier_dropout

    def set_dropout(self, config: Any, model: ModelConfig) -> None:
        """Write a run's dropout into a configuration, under the names of BERT's."""
        dropouts = self.dropouts(model)
        config.hidden_dropout_prob, config.attention_probs_dropout_prob, config.classifier_dropout = dropouts

    def set_options(self, config: Any, model: ModelConfig) -> None:
        """Write those of `options` and `extensible` that a run gives into a configuration.

        Raises:
            UserError: the run gives an option that only another architecture has.
        """
        check_options(config.model_type, model)

    def options_in(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Those of `options` on which the `Shape` depends, as a config.json tells them."""
        return {}

    def draw(self, weight: Tensor, name: str, config: Any, generator: torch.Generator) -> None:
        """Draw the initial values of a matrix or an embedding in place: here N(0, initializer_range).

        Args:
            name: of its module.
        """
        weight.normal_(0.0, config.initializer_range, generator=generator)

    def segments(self, config: Any) -> int | None:
        """How many kinds of segments the model tells apart; None where its kind of model never does."""
        kinds: int = config.type_vocab_size
        return kinds

    def first_position(self, pad_token_id: int | None) -> int:
        """The row of the position embeddings that a sequence's first token has.

        Args:
            pad_token_id: of the vocabulary; None where it isn't known.
        """
        return 0

    def positions(self, config: Any) -> int:
        """Tokens of the longest sequence."""
        rows: int = config.max_position_embeddings
        return rows - self.first_position(config.pad_token_id)

    def inherited_config(self, config: Any, pad_token_id: int) -> Any:
        """The configuration of a run that starts from the weights of another."""
        values = {name: getattr(config, name) for name in self.inherited}
        return self.config_class()(**values, pad_token_id=pad_token_id)

    def keep_layers(self, config: Any, layers: Sequence[int]) -> None:
        """Let a configuration have only these of its layers, in rising order.

        Raises:
            UserError: layers that it doesn't have, or that can't be without others.
        """
        count = config.num_hidden_layers
        given = ",".join(map(str, layers))
        require(layers[-1] < count, "model.init_layers", given, f"model.init_from has layers 0 to {count - 1}")
        config.num_hidden_layers = len(layers)

    def shape(self, model: ModelConfig, vocabulary: int) -> Shape:
        """The shape of a run's own dimensions."""
        return self._shape((*model.dimensions(), model.positions), vocabulary)

    def shape_of(self, config: Any) -> Shape:
        """The shape of a configuration."""
        sizes = [getattr(config, self.dimensions[name]) for name in DIMENSIONS]
        shape = self._shape(sizes, config.vocab_size)
        return replace(shape, segments=self.segments(config) or 0, classes=config.num_labels)

    def _shape(self, sizes: Sequence[int], vocabulary: int) -> Shape:
        """The shape whose `DIMENSIONS` have these sizes."""
        hidden, layers, heads, intermediate, positions = sizes
        shape = Shape(hidden, layers, heads, intermediate, vocabulary, positions)
        return replace(shape, feed_forward_matrices=self.feed_forward_matrices, biases=self.biases)


def is_rate(value: Any) -> bool:
    """Whether it is a finite number of at least 0."""
    return isinstance(value, (int, float)) and 0.0 <= value < math.inf


#: the architectures by `model_type`
ARCHITECTURES: Registry[Architecture] = Registry(
    "model.architecture",
    {
        DEFAULT_ARCHITECTURE: "engine.model.bert_entry:BERT",
        "modernbert": "engine.model.modernbert.entry:MODERNBERT",
        "roberta": "engine.model.roberta.entry:ROBERTA",
        "xlm-roberta": "engine.model.roberta.entry:XLM_ROBERTA",
    },
)


def check_options(architecture: str, model: ModelConfig) -> None:
    """Refuse options that an architecture doesn't have.

    Raises:
        UserError: names the option, its value, and the architectures that have it.
    """
    having = {name: other for other in MODEL_SIZES for name in ARCHITECTURES.get(other).options}
    known = ARCHITECTURES.get(architecture).options
    for name, other in having.items():
        value = getattr(model, name)
        if value is not None and name not in known:
            raise UserError(
                f"model.{name}: {value!r} has no effect: a model of type {architecture!r} has no such thing; leave it "
                f"out, or take one of type {other!r}"
            )


def architecture_of(config: Any) -> Architecture:
    """The architecture of a transformers configuration."""
    return ARCHITECTURES.get(config.model_type)
