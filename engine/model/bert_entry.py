"""BERT's entry in the table of architectures (Devlin et al. 2019). Loads torch when a model is built."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from engine.config.architecture import Architecture
from engine.errors import UserError

if TYPE_CHECKING:
    from torch import nn
    from transformers import BertConfig


class BertEntry(Architecture):
    """BERT under transformers' names."""

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
        "type_vocab_size",
    )
    # labels, problem type, custom code and the rest tell of what that model was used for
    inherited = (*sizes, "hidden_act", "initializer_range", "layer_norm_eps")
    export_classes: ClassVar = {
        "pretraining": "BertForPreTraining",
        "masked_lm": "BertForMaskedLM",
        "sequence_classification": "BertForSequenceClassification",
        "token_classification": "BertForTokenClassification",
        "question_answering": "BertForQuestionAnswering",
        "multiple_choice": "BertForMultipleChoice",
        "embeddings": "BertModel",
    }
    tied: ClassVar = {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }
    prefix = "bert."
    # a missing pooler or head is common and starts fresh
    essential = ("embeddings.", "encoder.")
    rates = ("initializer_range", "layer_norm_eps")
    growing = ("word_embeddings.weight", "predictions.decoder.weight", "predictions.decoder.bias", "predictions.bias")

    linear: ClassVar = {
        "query": "attention.self.query",
        "key": "attention.self.key",
        "value": "attention.self.value",
        "attention-output": "attention.output.dense",
        "feed-forward-input": "intermediate.dense",
        "feed-forward-output": "output.dense",
    }

    def config_class(self) -> type[Any]:
        from transformers import BertConfig

        kind: type[Any] = BertConfig
        return kind

    def check(self, path: Path, config: BertConfig) -> None:
        from engine.model.activations import ACTIVATIONS

        heads = config.num_attention_heads
        positions = getattr(config, "position_embedding_type", "absolute")
        quantised, pruned = getattr(config, "quantization_config", None), getattr(config, "pruned_heads", None)
        for name in self.sizes:
            size = getattr(config, name)
            if size < 1:
                raise UserError(f"{path}: {name} {size!r} is not allowed; give a model where it is above 0")
        checks = (
            (config.hidden_act in ACTIVATIONS, "hidden_act", config.hidden_act, f"one of {', '.join(ACTIVATIONS)}"),
            (config.hidden_size % heads == 0, "num_attention_heads", heads, f"a divisor of {config.hidden_size}"),
            (positions == "absolute", "position_embedding_type", positions, "'absolute'"),
            (not config.is_decoder, "is_decoder", config.is_decoder, "false"),
            (not config.add_cross_attention, "add_cross_attention", config.add_cross_attention, "false"),
            (config.tie_word_embeddings, "tie_word_embeddings", config.tie_word_embeddings, "true"),
            (quantised is None, "quantization_config", quantised, "absent, with weights as plain numbers"),
            (not pruned, "pruned_heads", pruned, "empty, with whole layers"),
        )
        for supported, name, value, wanted in checks:
            if not supported:
                raise UserError(f"{path}: {name} {value!r} is not supported; give a model where it is {wanted}")

    def build(self, head: str, config: BertConfig, activation_checkpointing: bool) -> nn.Module:
        from engine.model import bert, heads

        built: dict[str, Callable[[BertConfig, bool], nn.Module]] = {
            "pretraining": bert.BertForPreTraining,
            "masked_lm": bert.BertForMaskedLM,
            "sequence_classification": heads.BertForSequenceClassification,
            "token_classification": heads.BertForTokenClassification,
            "question_answering": heads.BertForQuestionAnswering,
            "multiple_choice": heads.BertForMultipleChoice,
            "embeddings": heads.BertForEmbeddings,
        }
        return built[head](config, activation_checkpointing)

    def layer_of(self, name: str) -> str:
        """Encoder layers by number, all else by its module.

        >>> BERT.layer_of("bert.encoder.layer.3.attention.self.query.weight")
        'layer.3'
        >>> BERT.layer_of("bert.embeddings.word_embeddings.weight")
        'embeddings'
        >>> BERT.layer_of("cls.predictions.transform.dense.bias")
        'predictions'
        """
        numbered = re.search(r"\blayer\.\d+", name)
        if numbered:
            return numbered[0]
        parts = [part for part in name.split(".") if part not in (self.prefix.removesuffix("."), "cls", "encoder")]
        return parts[0]


BERT = BertEntry()
