"""ModernBERT (Warner et al. 2024) with its heads, on transformers' configuration and parameter names.

Batches are packed (see `engine.model.packing`), so padding never reaches a linear layer; the last layer's parts behind
its attention, and the heads, see the tokens alone whose states are read.

Shape legend: B sequences, T tokens in all of them, M masked tokens, R tokens whose last states are read, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint
from transformers import ModernBertConfig

from engine.kernels.decoder_loss import IGNORED
from engine.kernels.embedding import TiedGradient
from engine.model.activations import activation
from engine.model.bert import MlmDecoder
from engine.model.modernbert.entry import SLIDING
from engine.model.modernbert.layers import (
    ModernBertEmbeddings,
    ModernBertLayer,
    ModernBertLinear,
    ModernBertNorm,
    ModernBertResidualNorm,
    Surroundings,
)
from engine.model.modernbert.rotary import Rotation
from engine.model.modernbert.window import Window
from engine.model.packing import Packing, sequence_means, spare_rows, with_spare_rows
from engine.model.sentence import pooling_of


class ModernBertModel(nn.Module):
    """Embeddings, layers and the last norm."""

    def __init__(self, config: ModernBertConfig, activation_checkpointing: bool = False) -> None:
        super().__init__()
        self.config = config
        self.embeddings = ModernBertEmbeddings(config)
        self.layers = nn.ModuleList([ModernBertLayer(config, index) for index in range(config.num_hidden_layers)])
        self.final_norm = ModernBertResidualNorm(config)
        self.activation_checkpointing = activation_checkpointing

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        lengths: Tensor,
        max_length: int | None = None,
        tied: TiedGradient | None = None,
        read: Tensor | None = None,
    ) -> Tensor:
        """Encode a packed batch.

        Args:
            input_ids, position_ids: [T] int64.
            lengths: [B] int64, tokens of each sequence, at least 1.
            max_length: the largest of them, if the caller knows it: saves a wait for the device on a GPU.
            tied: where a decoder that shares the word embeddings' weight leaves its gradient.
            read: [R] int64, the tokens whose hidden states are wanted, in ascending order; all if absent.

        Returns:
            Hidden states [T, H], or [R, H].
        """
        packing = Packing.from_lengths(lengths, input_ids.numel(), max_length)
        states = with_spare_rows(self.embeddings(input_ids, tied))
        states, stream = self._layers(states, self._surroundings(packing, position_ids, len(states)), read)
        _, normalised = self.final_norm(states, stream)
        rows = packing.tokens if read is None else len(read)
        hidden: Tensor = normalised[:rows]
        return hidden

    def _layers(
        self, states: Tensor, surroundings: Mapping[str, Surroundings], read: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Embeddings to what is still to be added to the residual stream, and the stream."""
        recompute = self.activation_checkpointing and self.training
        stream = None
        for index, layer in enumerate(cast("Iterable[ModernBertLayer]", self.layers)):
            last = index == len(self.layers) - 1
            given = (states, stream, surroundings[layer.attention_type], read if last else None)
            states, stream = checkpoint(layer, *given, use_reentrant=False) if recompute else layer(*given)
        assert stream is not None
        return states, stream

    def _surroundings(self, packing: Packing, positions: Tensor, rows: int) -> dict[str, Surroundings]:
        """By the type of attention of a layer; a window that holds the longest sequence is none."""
        config = self.config
        width = config.hidden_size // config.num_attention_heads
        shared = {}
        for kind in set(config.layer_types):
            rotation = Rotation.of(positions, width, config.rope_parameters[kind]["rope_theta"])
            reach = config.local_attention // 2
            cuts = kind == SLIDING and reach < packing.max_length - 1
            window = Window.of(packing, rows, reach) if cuts else None
            shared[kind] = Surroundings(packing, rotation, window)
        return shared


class ModernBertPredictionHead(nn.Module):
    """What a state passes through before a decoder or a classifier."""

    def __init__(self, config: ModernBertConfig) -> None:
        super().__init__()
        self.dense = ModernBertLinear(config.hidden_size, config.hidden_size, bias=config.classifier_bias)
        self.act = activation(config.classifier_activation)
        self.norm = ModernBertNorm(config)

    def forward(self, hidden: Tensor) -> Tensor:
        """[R, H] to [R, H]."""
        output: Tensor = self.norm(self.act(self.dense(hidden)))
        return output


class ModernBertForMaskedLM(nn.Module):
    """ModernBERT with MLM; the decoder's weight is the word embeddings'."""

    def __init__(self, config: ModernBertConfig, activation_checkpointing: bool = False) -> None:
        super().__init__()
        self.config = config
        self.model = ModernBertModel(config, activation_checkpointing)
        self.head = ModernBertPredictionHead(config)
        self.decoder = MlmDecoder(config.hidden_size, config.vocab_size, bias=config.decoder_bias)
        self.decoder.weight = self.model.embeddings.tok_embeddings.weight

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        lengths: Tensor,
        mlm_positions: Tensor,
        mlm_labels: Tensor,
        max_length: int | None = None,
        token_type_ids: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Summed loss of a packed batch, to be divided by the total of the global batch.

        Args:
            input_ids, position_ids, lengths, max_length: see `ModernBertModel.forward`.
            mlm_positions: [M] int64, indices of the masked tokens among the T packed ones, ascending.
            mlm_labels: [M] int64, their original ids.
            token_type_ids: not read: ModernBERT has no segments.

        Returns:
            mlm_loss_sum: fp32 scalar in nats; mlm_correct: int64 scalar; predictions, in evaluation mode only: [M]
            int64, the most probable token of each masked row.
        """
        tied = TiedGradient()
        rows = self.model(input_ids, position_ids, lengths, max_length, tied, mlm_positions)
        if self.training and (spare := spare_rows(len(mlm_labels), rows)):
            rows, mlm_labels = F.pad(rows, (0, 0, 0, spare)), F.pad(mlm_labels, (0, spare), value=IGNORED)
        mlm = self.decoder(self.head(rows), mlm_labels, tied)
        output = {"mlm_loss_sum": mlm["loss_sum"], "mlm_correct": mlm["correct"]}
        return output if self.training else {**output, "predictions": mlm["predictions"]}


class ModernBertHead(nn.Module):
    """A linear layer over what the prediction head makes of states.

    Attributes:
        choices: whether it gives one logit, instead of one for each of `config.num_labels` classes.
    """

    choices: ClassVar[bool] = False

    def __init__(self, config: ModernBertConfig, activation_checkpointing: bool = False) -> None:
        super().__init__()
        self.config = config
        self.model = ModernBertModel(config, activation_checkpointing)
        self.head = ModernBertPredictionHead(config)
        self.drop = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.hidden_size, 1 if self.choices else config.num_labels)

    def logits(self, states: Tensor) -> Tensor:
        """Of states [R, H]; fp32 [R, classes]."""
        logits: Tensor = self.classifier(self.drop(self.head(states)))
        return logits.float()


class ModernBertForSequenceClassification(ModernBertHead):
    """A classifier of sequences by their first token, or by the mean of all tokens."""

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        lengths: Tensor,
        max_length: int | None = None,
        token_type_ids: Tensor | None = None,
    ) -> Tensor:
        """Classify a packed batch.

        Args:
            input_ids, position_ids, lengths, max_length: see `ModernBertModel.forward`.
            token_type_ids: not read: ModernBERT has no segments.

        Returns:
            Logits, fp32 [B, classes].
        """
        if self.config.classifier_pooling == "cls":
            pooled = self.model(input_ids, position_ids, lengths, max_length, read=lengths.cumsum(0) - lengths)
        else:
            hidden = self.model(input_ids, position_ids, lengths, max_length)
            pooled = torch.segment_reduce(hidden, "mean", lengths=lengths)
        return self.logits(pooled)


class ModernBertForMultipleChoice(ModernBertForSequenceClassification):
    """One logit a sequence, which is a question with one of its choices."""

    choices = True


class ModernBertForTokenClassification(ModernBertHead):
    """A classifier of tokens."""

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        lengths: Tensor,
        max_length: int | None = None,
        token_type_ids: Tensor | None = None,
        read: Tensor | None = None,
    ) -> Tensor:
        """Score tokens of a packed batch.

        Args:
            input_ids, position_ids, lengths, max_length, token_type_ids: as of `ModernBertForSequenceClassification`.
            read: [R] int64, the tokens that are scored, ascending; all if absent.

        Returns:
            Logits, fp32 [R, classes].
        """
        return self.logits(self.model(input_ids, position_ids, lengths, max_length, read=read))


class ModernBertForQuestionAnswering(ModernBertForTokenClassification):
    """Two logits a token: of an answer's beginning there, and of its end."""


class ModernBertForEmbeddings(ModernBertModel):
    """The encoder and, of each sequence, one vector."""

    def __init__(self, config: ModernBertConfig, activation_checkpointing: bool = False) -> None:
        super().__init__(config, activation_checkpointing)
        self.pooling = pooling_of(config)

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        lengths: Tensor,
        max_length: int | None = None,
        token_type_ids: Tensor | None = None,
    ) -> Tensor:
        """Embed a packed batch.

        Args:
            input_ids, position_ids, lengths, max_length, token_type_ids: as of `ModernBertForSequenceClassification`.

        Returns:
            Vectors, fp32 [B, H], as long as they come.
        """
        if self.pooling == "cls":
            first = lengths.cumsum(0) - lengths
            return super().forward(input_ids, position_ids, lengths, max_length, read=first).float()
        return sequence_means(super().forward(input_ids, position_ids, lengths, max_length), lengths)

    def states(self, input_ids: Tensor, position_ids: Tensor, lengths: Tensor, **_: Tensor) -> Tensor:
        """The last states [T, H] of a packed batch."""
        return super().forward(input_ids, position_ids, lengths)
