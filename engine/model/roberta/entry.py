"""The entries of RoBERTa and XLM-RoBERTa in the table of architectures. Loads torch when a model is built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from engine.config.architecture import DIMENSIONS
from engine.errors import UserError
from engine.model.bert_entry import BertEntry

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn
    from transformers import RobertaConfig

    from engine.config.model import ModelConfig
    from engine.config.shape import Shape

#: id of the padding token in the published vocabularies
PADDING = 1
#: special tokens that transformers' class has in RoBERTa's own vocabulary
NO_TOKENS = dict.fromkeys(("bos_token_id", "eos_token_id"))


class RobertaEntry(BertEntry):
    """RoBERTa (Liu et al. 2019) under transformers' names: BERT's sizes, MLM alone."""

    export_classes: ClassVar = {
        "masked_lm": "RobertaForMaskedLM",
        "sequence_classification": "RobertaForSequenceClassification",
        "token_classification": "RobertaForTokenClassification",
        "question_answering": "RobertaForQuestionAnswering",
        "multiple_choice": "RobertaForMultipleChoice",
        "embeddings": "RobertaModel",
    }
    tied: ClassVar = {
        "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
    }
    prefix = "roberta."
    growing = ("word_embeddings.weight", "lm_head.decoder.weight", "lm_head.decoder.bias", "lm_head.bias")

    def config_class(self) -> type[Any]:
        from transformers import RobertaConfig

        kind: type[Any] = RobertaConfig
        return kind

    def check(self, path: Path, config: RobertaConfig) -> None:
        super().check(path, config)
        padding, rows = config.pad_token_id, config.max_position_embeddings
        if padding is None or not 0 <= padding < config.vocab_size:
            remedy = f"give the token's id in the vocabulary, which published models have at {PADDING}"
            raise UserError(f"{path}: pad_token_id {padding!r} is not allowed; {remedy}")
        if self.positions(config) < 1:
            remedy = f"give more than {rows - self.positions(config)}: positions begin behind pad_token_id {padding}"
            raise UserError(f"{path}: max_position_embeddings {rows} is not allowed; {remedy}")

    def build(self, head: str, config: RobertaConfig, activation_checkpointing: bool) -> nn.Module:
        from engine.model.roberta import models

        heads: dict[str, Callable[[RobertaConfig, bool], nn.Module]] = {
            "masked_lm": models.RobertaForMaskedLM,
            "sequence_classification": models.RobertaForSequenceClassification,
            "token_classification": models.RobertaForTokenClassification,
            "question_answering": models.RobertaForQuestionAnswering,
            "multiple_choice": models.RobertaForMultipleChoice,
            "embeddings": models.RobertaForEmbeddings,
        }
        return heads[head](config, activation_checkpointing)

    def first_position(self, pad_token_id: int | None) -> int:
        """Behind the padding token's id, as in fairseq."""
        return (PADDING if pad_token_id is None else pad_token_id) + 1

    def fresh_config(self, model: ModelConfig, vocabulary: int, pad_token_id: int) -> Any:
        """The configuration of a run's own dimensions, with one kind of segment."""
        sizes = dict(zip(DIMENSIONS, (*model.dimensions(), model.positions), strict=True))
        sizes["max_positions"] += self.first_position(pad_token_id)
        named = {self.dimensions[option]: size for option, size in sizes.items()}
        tokens = {"vocab_size": vocabulary, "pad_token_id": pad_token_id, **NO_TOKENS}
        return self.config_class()(**named, **tokens, type_vocab_size=1)

    def inherited_config(self, config: Any, pad_token_id: int) -> Any:
        """That of the folder; the padding token's id is part of it, since positions are counted from there.

        Raises:
            UserError: the tokenizer's padding token has another id.
        """
        if config.pad_token_id != pad_token_id:
            raise UserError(
                f"model.init_from: pad_token_id is {config.pad_token_id} in its config.json and {pad_token_id} in the "
                "tokenizer, and the model counts positions from there; give the tokenizer that came with the weights"
            )
        values = {name: getattr(config, name) for name in self.inherited}
        return self.config_class()(**values, pad_token_id=pad_token_id, **NO_TOKENS)

    def segments(self, config: Any) -> None:
        """Never told apart, whatever the folder's type_vocab_size: its tokenizers mark none."""

    def shape_of(self, config: Any) -> Shape:
        rows = {"positions": config.max_position_embeddings, "segments": config.type_vocab_size}
        return replace(super().shape_of(config), **rows)

    def _shape(self, sizes: Sequence[int], vocabulary: int) -> Shape:
        """With the padding token's id of the published vocabularies."""
        shape = super()._shape(sizes, vocabulary)
        return replace(shape, positions=shape.positions + self.first_position(None), segments=1, pools_in_head=True)


class XlmRobertaEntry(RobertaEntry):
    """XLM-RoBERTa (Conneau et al. 2020): RoBERTa's modules under another configuration."""

    export_classes: ClassVar = {
        "masked_lm": "XLMRobertaForMaskedLM",
        "sequence_classification": "XLMRobertaForSequenceClassification",
        "token_classification": "XLMRobertaForTokenClassification",
        "question_answering": "XLMRobertaForQuestionAnswering",
        "multiple_choice": "XLMRobertaForMultipleChoice",
        "embeddings": "XLMRobertaModel",
    }

    def config_class(self) -> type[Any]:
        from transformers import XLMRobertaConfig

        kind: type[Any] = XLMRobertaConfig
        return kind


ROBERTA, XLM_ROBERTA = RobertaEntry(), XlmRobertaEntry()
