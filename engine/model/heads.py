"""BERT with the heads of fine-tuning tasks, under transformers' parameter names. A head gives logits; losses are the
tasks'.

Shape legend: B sequences, T tokens in all of them, R tokens whose states are read.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import BertConfig

from engine.model.bert import BertModel
from engine.model.packing import sequence_means
from engine.model.sentence import pooling_of


def head_dropout(config: BertConfig) -> nn.Dropout:
    """Dropout before a head: `classifier_dropout`, or where that is None the hidden states' own."""
    own = config.classifier_dropout
    return nn.Dropout(config.hidden_dropout_prob if own is None else own)


class PooledHead(nn.Module):
    """A linear layer over the pooled vector.

    Attributes:
        encoder_name, encoder_class: what the encoder is called, and its class.
        choices: whether it gives one logit a sequence, instead of one for each of `config.num_labels` classes.
    """

    encoder_name: ClassVar[str] = "bert"
    encoder_class: ClassVar[type[BertModel]] = BertModel
    choices: ClassVar[bool] = False

    def __init__(self, config: BertConfig, activation_checkpointing: bool = False) -> None:
        super().__init__()
        self.config = config
        setattr(self, self.encoder_name, self.encoder_class(config, activation_checkpointing))
        self.dropout = head_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, 1 if self.choices else config.num_labels)

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor,
        position_ids: Tensor,
        lengths: Tensor,
        max_length: int | None = None,
    ) -> Tensor:
        """Classify a packed batch.

        Args:
            input_ids, token_type_ids, position_ids, lengths, max_length: see `BertModel.forward`.

        Returns:
            Logits, fp32 [B, classes].
        """
        nothing = lengths.new_empty(0)  # of the last states the pooler reads its own, and nobody any other
        encoder = getattr(self, self.encoder_name)
        _, pooled = encoder(input_ids, token_type_ids, position_ids, lengths, max_length, read=nothing)
        logits: Tensor = self.classifier(self.dropout(pooled))
        return logits.float()


class TokenHead(nn.Module):
    """A linear layer over tokens' states.

    Attributes:
        encoder_name, encoder_class: what the encoder is called, and its class.
        output_name: what the linear layer is called.
        drops: whether there is dropout before it.
    """

    encoder_name: ClassVar[str] = "bert"
    encoder_class: ClassVar[type[BertModel]] = BertModel
    output_name: ClassVar[str] = "classifier"
    drops: ClassVar[bool] = True

    def __init__(self, config: BertConfig, activation_checkpointing: bool = False) -> None:
        super().__init__()
        self.config = config
        setattr(self, self.encoder_name, self.encoder_class(config, activation_checkpointing, pooler=False))
        self.dropout = head_dropout(config) if self.drops else nn.Identity()
        setattr(self, self.output_name, nn.Linear(config.hidden_size, config.num_labels))

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor,
        position_ids: Tensor,
        lengths: Tensor,
        max_length: int | None = None,
        read: Tensor | None = None,
    ) -> Tensor:
        """Score tokens of a packed batch.

        Args:
            input_ids, token_type_ids, position_ids, lengths, max_length: see `BertModel.forward`.
            read: [R] int64, the tokens that are scored, among the T packed ones; all if absent.

        Returns:
            Logits, fp32 [R, config.num_labels].
        """
        encoder = getattr(self, self.encoder_name)
        states, _ = encoder(input_ids, token_type_ids, position_ids, lengths, max_length, read=read)
        logits: Tensor = getattr(self, self.output_name)(self.dropout(states))
        return logits.float()


class BertForSequenceClassification(PooledHead):
    """A classifier of sequences."""


class BertForMultipleChoice(PooledHead):
    """One logit a sequence, which is a question with one of its choices."""

    choices = True


class BertForTokenClassification(TokenHead):
    """A classifier of tokens."""


class BertForQuestionAnswering(TokenHead):
    """Two logits a token: of an answer's beginning there, and of its end."""

    output_name = "qa_outputs"
    drops = False


class BertForEmbeddings(BertModel):
    """The encoder and, of each sequence, one vector.

    It has the pooler of transformers' class, whose weights nobody reads: they stay what they are.
    """

    def __init__(self, config: BertConfig, activation_checkpointing: bool = False) -> None:
        super().__init__(config, activation_checkpointing)
        assert self.pooler is not None
        self.pooler.requires_grad_(False)
        self.pooling = pooling_of(config)

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        token_type_ids: Tensor,
        position_ids: Tensor,
        lengths: Tensor,
        max_length: int | None = None,
    ) -> Tensor:
        """Embed a packed batch.

        Args:
            input_ids, token_type_ids, position_ids, lengths, max_length: see `BertModel.forward`.

        Returns:
            Vectors, fp32 [B, H], as long as they come.
        """
        read = lengths.new_empty(0) if self.pooling == "cls" else None
        inputs = (input_ids, token_type_ids, position_ids, lengths, max_length)
        states, first = super().forward(*inputs, read=read)
        assert first is not None
        return first.float() if self.pooling == "cls" else sequence_means(states, lengths)

    def _pooled(self, first: Tensor) -> Tensor:
        """The first tokens' states themselves."""
        return first

    def states(self, **inputs: Any) -> Tensor:
        """The last states [T, H] of a packed batch."""
        return super().forward(**inputs)[0]
