"""ModernBERT's entry in the table of architectures (Warner et al. 2024). Loads torch when a model is built."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from engine.config.architecture import DIMENSIONS, Architecture, is_rate
from engine.errors import UserError, require

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import ModernBertConfig

    from engine.config.model import ModelConfig
    from engine.config.shape import Shape

SLIDING, FULL = "sliding_attention", "full_attention"
#: in a fresh configuration, tokens of a window, and how often a layer has none
WINDOW, FULL_EVERY = 128, 3
#: special tokens that transformers' class has in ModernBERT's own vocabulary
NO_TOKENS = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"))


class ModernBertEntry(Architecture):
    """ModernBERT under transformers' names."""

    dimensions: ClassVar = {
        "hidden_size": "hidden_size",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "intermediate_size": "intermediate_size",
        "max_positions": "max_position_embeddings",
    }
    sizes = (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "max_position_embeddings",
        "local_attention",
    )
    inherited = (
        *sizes,
        "hidden_activation",
        "initializer_range",
        "initializer_cutoff_factor",
        "norm_eps",
        "norm_bias",
        "attention_bias",
        "mlp_bias",
        "decoder_bias",
        "layer_types",
        "rope_parameters",
        "classifier_pooling",
        "classifier_bias",
        "classifier_activation",
    )
    export_classes: ClassVar = {
        "masked_lm": "ModernBertForMaskedLM",
        "sequence_classification": "ModernBertForSequenceClassification",
        "token_classification": "ModernBertForTokenClassification",
        "question_answering": "ModernBertForQuestionAnswering",
        "multiple_choice": "ModernBertForMultipleChoice",
        "embeddings": "ModernBertModel",
    }
    tied: ClassVar = {"decoder.weight": "model.embeddings.tok_embeddings.weight"}
    prefix = "model."
    essential = ("embeddings.", "layers.", "final_norm.")
    growing = ("tok_embeddings.weight", "decoder.weight", "decoder.bias")
    linear: ClassVar = {
        **dict.fromkeys(("query", "key", "value"), "attn.Wqkv"),
        "attention-output": "attn.Wo",
        "feed-forward-input": "mlp.Wi",
        "feed-forward-output": "mlp.Wo",
    }
    options = ("window", "global_every", "rope_theta", "local_rope_theta")
    extensible = ("max_positions",)
    takes_prefix = False
    rates = ("initializer_range", "norm_eps", "initializer_cutoff_factor")
    dropout = 0.0
    feed_forward_matrices = 3
    biases = False

    def config_class(self) -> type[Any]:
        from transformers import ModernBertConfig

        kind: type[Any] = ModernBertConfig
        return kind

    def check(self, path: Path, config: ModernBertConfig) -> None:
        from engine.model.activations import ACTIVATIONS

        for name in self.sizes:
            size, least = getattr(config, name), 2 if name == "local_attention" else 1
            if size < least:
                raise UserError(f"{path}: {name} {size!r} is not allowed; give a model where it is above {least - 1}")
        heads, activations = config.num_attention_heads, f"one of {', '.join(ACTIVATIONS)}"
        kinds = {*config.layer_types}
        rotary = [config.rope_parameters[kind] for kind in kinds & config.rope_parameters.keys()]
        checks = (
            (config.hidden_activation in ACTIVATIONS, "hidden_activation", config.hidden_activation, activations),
            (
                config.classifier_activation in ACTIVATIONS,
                "classifier_activation",
                config.classifier_activation,
                activations,
            ),
            (config.hidden_size % heads == 0, "num_attention_heads", heads, f"a divisor of {config.hidden_size}"),
            (
                (config.hidden_size // heads) % 2 == 0,
                "num_attention_heads",
                heads,
                "one that gives heads of even width",
            ),
            (
                kinds <= {SLIDING, FULL},
                "layer_types",
                config.layer_types,
                "sliding_attention and full_attention",
            ),
            (
                all(is_default(one) for one in rotary),
                "rope_parameters",
                config.rope_parameters,
                "of rope_type 'default' with a rope_theta above 0",
            ),
            (config.tie_word_embeddings, "tie_word_embeddings", config.tie_word_embeddings, "true"),
            (
                getattr(config, "quantization_config", None) is None,
                "quantization_config",
                getattr(config, "quantization_config", None),
                "absent, with weights as plain numbers",
            ),
        )
        for supported, name, value, wanted in checks:
            if not supported:
                raise UserError(f"{path}: {name} {value!r} is not supported; give a model where it is {wanted}")

    def build(self, head: str, config: ModernBertConfig, activation_checkpointing: bool) -> nn.Module:
        from engine.model.modernbert import models

        heads: dict[str, Callable[[ModernBertConfig, bool], nn.Module]] = {
            "masked_lm": models.ModernBertForMaskedLM,
            "sequence_classification": models.ModernBertForSequenceClassification,
            "token_classification": models.ModernBertForTokenClassification,
            "question_answering": models.ModernBertForQuestionAnswering,
            "multiple_choice": models.ModernBertForMultipleChoice,
            "embeddings": models.ModernBertForEmbeddings,
        }
        return heads[head](config, activation_checkpointing)

    def check_dimensions(self, model: ModelConfig) -> None:
        hidden, _, heads, _ = model.dimensions()
        even = hidden // heads % 2 == 0
        require(even, "model.heads", heads, f"model.hidden_size {hidden} / model.heads must be even")

    def fresh_config(self, model: ModelConfig, vocabulary: int, pad_token_id: int) -> Any:
        """Of the special tokens only the padding's is told: the vocabulary is the run's own."""
        sizes = dict(zip(DIMENSIONS, (*model.dimensions(), model.positions), strict=True))
        named = {self.dimensions[option]: size for option, size in sizes.items()}
        return self.config_class()(**named, vocab_size=vocabulary, pad_token_id=pad_token_id, **NO_TOKENS)

    def inherited_config(self, config: Any, pad_token_id: int) -> Any:
        values = {name: getattr(config, name) for name in self.inherited}
        return self.config_class()(**values, pad_token_id=pad_token_id, **NO_TOKENS)

    def keep_layers(self, config: ModernBertConfig, layers: Sequence[int]) -> None:
        """Each with its own kind of attention; the first layer is the only one without a norm of its input."""
        remedy = "the first layer of a modernbert takes normalised embeddings, and no other does; begin with 0"
        require(layers[0] == 0, "model.init_layers", ",".join(map(str, layers)), remedy)
        kinds = config.layer_types
        super().keep_layers(config, layers)
        config.layer_types = [kinds[layer] for layer in layers]

    def set_options(self, config: ModernBertConfig, model: ModelConfig) -> None:
        super().set_options(config, model)
        if model.max_positions is not None:
            config.max_position_embeddings = model.max_positions
        if model.window is not None:
            config.local_attention = model.window
        if model.global_every is not None:
            config.layer_types = _layer_types(config.num_hidden_layers, model.global_every)
        for kind, theta in ((FULL, model.rope_theta), (SLIDING, model.local_rope_theta)):
            if theta is not None:
                config.rope_parameters[kind] = {"rope_type": "default", "rope_theta": theta}

    def options_in(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The window, and every how many layers there is none, as far as that tells the layers' types."""
        found = {"window": values.get("local_attention"), "global_every": values.get("global_attn_every_n_layers")}
        kinds = values.get("layer_types")
        if isinstance(kinds, list):
            periods = (every for every in range(1, len(kinds) + 1) if _layer_types(len(kinds), every) == kinds)
            found["global_every"] = next(periods, None)
        return {name: value for name, value in found.items() if isinstance(value, int) and value > 0}

    def set_dropout(self, config: ModernBertConfig, model: ModelConfig) -> None:
        hidden, attention, classifier = self.dropouts(model)
        config.embedding_dropout = config.mlp_dropout = hidden
        config.attention_dropout = attention
        config.classifier_dropout = hidden if classifier is None else classifier

    def draw(self, weight: Tensor, name: str, config: ModernBertConfig, generator: torch.Generator) -> None:
        """A truncated normal distribution, narrower for what writes to the residual stream (Shoeybi et al. 2019).

        As `ModernBertPreTrainedModel` of transformers draws them.
        """
        from torch import nn

        deviation = config.initializer_range
        if name.endswith(("Wo", "head.dense")):
            deviation /= (2.0 * config.num_hidden_layers) ** 0.5
        elif name.endswith("classifier"):
            deviation = config.hidden_size**-0.5
        cut = (3.0 if config.initializer_cutoff_factor is None else config.initializer_cutoff_factor) * deviation
        nn.init.trunc_normal_(weight, 0.0, deviation, -cut, cut, generator=generator)

    def segments(self, config: ModernBertConfig) -> None:
        return None

    def shape_of(self, config: ModernBertConfig) -> Shape:
        windows = config.layer_types[:-1].count(SLIDING)
        shape = super().shape_of(config)
        biases = {"biases": config.mlp_bias, "norm_biases": config.norm_bias}
        return replace(shape, windows=windows, reach=config.local_attention // 2, **biases)

    def shape(self, model: ModelConfig, vocabulary: int) -> Shape:
        shape = super().shape(model, vocabulary)
        kinds = _layer_types(shape.layers, model.global_every or FULL_EVERY)
        return replace(shape, windows=kinds[:-1].count(SLIDING), reach=(model.window or WINDOW) // 2)

    def _shape(self, sizes: Sequence[int], vocabulary: int) -> Shape:
        shape = super()._shape(sizes, vocabulary)
        norms = {"norm_biases": False, "head_norm": True, "pre_norm": True, "pools_in_head": True}
        return replace(shape, learned_positions=False, segments=0, **norms)

    def layer_of(self, name: str) -> str:
        """Layers by number, all else by its module.

        >>> MODERNBERT.layer_of("model.layers.3.attn.Wqkv.weight")
        'layers.3'
        >>> MODERNBERT.layer_of("model.embeddings.tok_embeddings.weight")
        'embeddings'
        """
        numbered = re.search(r"\blayers\.\d+", name)
        return numbered[0] if numbered else name.removeprefix(self.prefix).split(".")[0]


def _layer_types(layers: int, every: int) -> list[str]:
    """By layer what it attends to."""
    return [SLIDING if index % every else FULL for index in range(layers)]


def is_default(rope: dict[str, Any]) -> bool:
    """Whether rotary positions are those of Su et al. 2021, by their parameters in config.json."""
    theta = rope.get("rope_theta")
    return rope.get("rope_type") == "default" and theta != 0 and is_rate(theta)


MODERNBERT = ModernBertEntry()
