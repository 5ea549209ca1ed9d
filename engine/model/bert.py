"""BERT (Devlin et al. 2019) with its pre-training heads, on transformers' configuration and parameter names.

A state dict is interchangeable with that of transformers' class of the same name; the forward pass is our own. Batches
are packed (see `engine.model.packing`), so padding never reaches a linear layer, and the MLM head sees masked rows
only. So do the last layer's parts behind its attention, which see first tokens too where there is a pooler: nobody
reads the other states.

Shape legend: B sequences, T tokens in all of them, M masked tokens, R tokens whose last states are read, H hidden size,
V vocabulary size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig

from engine.kernels import linear_cross_entropy
from engine.kernels.decoder_loss import IGNORED
from engine.kernels.embedding import TiedGradient
from engine.model.layers import BertActivatedDense, BertEmbeddings, BertLayer, BertLayerNorm, BertPooler
from engine.model.packing import Packing, spare_rows, with_spare_rows


class BertEncoder(nn.Module):
    """The stack of Transformer layers."""

    def __init__(self, config: BertConfig, activation_checkpointing: bool) -> None:
        super().__init__()
        self.layer = nn.ModuleList([BertLayer(config) for _ in range(config.num_hidden_layers)])
        self.activation_checkpointing = activation_checkpointing

    def forward(self, hidden: Tensor, packing: Packing, read: Tensor | None = None) -> Tensor:
        """[T, H] to [T, H]; `read` is the last layer's, see `BertLayer.forward`."""
        recompute = self.activation_checkpointing and self.training
        last = len(self.layer) - 1
        for index, layer in enumerate(self.layer):
            given = (hidden, packing, read if index == last else None)
            hidden = checkpoint(layer, *given, use_reentrant=False) if recompute else layer(*given)
        return hidden


class BertModel(nn.Module):
    """Embeddings, encoder and, unless a head has no use for it, pooler."""

    embeddings_class: type[BertEmbeddings] = BertEmbeddings

    def __init__(self, config: BertConfig, activation_checkpointing: bool = False, pooler: bool = True) -> None:
        super().__init__()
        self.config = config
        self.embeddings = self.embeddings_class(config)
        self.encoder = BertEncoder(config, activation_checkpointing)
        self.pooler = BertPooler(config) if pooler else None
        #: keys and values that each layer's attention has in front of every sequence's own; they take as many positions
        self.prefix_length = 0

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor,
        position_ids: Tensor,
        lengths: Tensor,
        max_length: int | None = None,
        tied: TiedGradient | None = None,
        read: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Encode a packed batch.

        Args:
            input_ids, token_type_ids, position_ids: [T] int64.
            lengths: [B] int64, tokens of each sequence, at least 1.
            max_length: the largest of them, if the caller knows it: saves a wait for the device on a GPU.
            tied: where a decoder that shares the word embeddings' weight leaves its gradient.
            read: [R] int64, the tokens whose hidden states are wanted; all if absent.

        Returns:
            Hidden states [T, H], or [R, H], and pooled vectors [B, H]; None without a pooler.
        """
        packing = Packing.from_lengths(lengths, input_ids.numel(), max_length, self.prefix_length)
        places = position_ids + self.prefix_length if self.prefix_length else position_ids
        hidden = self.embeddings(input_ids, token_type_ids, places, tied)
        hidden = with_spare_rows(hidden)
        first = packing.starts if self.pooler is not None else packing.starts[:0]
        if read is None:
            hidden = self.encoder(hidden, packing)[: packing.tokens]
            return hidden, self._pooled(hidden.index_select(0, first))
        rows, order = torch.cat((first, read)).sort()
        states = self.encoder(hidden, packing, rows).index_select(0, order.argsort())
        return states[len(first) :], self._pooled(states[: len(first)])

    def _pooled(self, first: Tensor) -> Tensor | None:
        return None if self.pooler is None else self.pooler(first)


class MlmDecoder(nn.Linear):
    """Projection to the vocabulary and its loss in one module: one fused operator in training.

    Attributes:
        keeps_logits: whether its outputs have logits too, which the fused operator never holds.
    """

    keeps_logits = False

    def forward(  # type: ignore[override]
        self, rows: Tensor, labels: Tensor, tied: TiedGradient | None = None
    ) -> dict[str, Tensor]:
        """Decode and score masked rows.

        Args:
            rows: [M, H] transformed hidden states.
            labels: [M] token ids that were masked; in training also `IGNORED`.
            tied: what the embeddings that share the weight were given.

        Returns:
            loss_sum: fp32 scalar, the summed cross-entropies in nats; correct: int64 scalar, how many of the rows
            have their label as the most probable token; predictions, in evaluation mode only: [M] int64, those tokens;
            logits, with `keeps_logits` only: fp32 [M, V].
        """
        weight = tied.decoder(self.weight) if tied is not None and self.training else self.weight
        if self.training and not self.keeps_logits:
            loss_sum, correct = linear_cross_entropy(rows, weight, self.bias, labels, return_hits=True)
            return {"loss_sum": loss_sum, "correct": correct}
        logits = nn.functional.linear(rows, weight, self.bias).float()
        predictions = logits.detach().argmax(-1)
        return {
            "loss_sum": nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED),
            "correct": (predictions == labels).sum(),
            "predictions": predictions,
            **({"logits": logits} if self.keeps_logits else {}),
        }


class BertPredictionTransform(BertActivatedDense):
    """What a masked token's state passes through before the decoder."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config, config.hidden_size)
        self.LayerNorm = BertLayerNorm(config)

    def forward(self, hidden: Tensor) -> Tensor:
        """[M, H] to [M, H]."""
        output: Tensor = self.LayerNorm(super().forward(hidden))
        return output


class BertLMPredictionHead(nn.Module):
    """The MLM head; its decoder's bias is registered here too, as in transformers."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.transform = BertPredictionTransform(config)
        self.decoder = MlmDecoder(config.hidden_size, config.vocab_size)
        self.bias = self.decoder.bias

    def forward(self, rows: Tensor, labels: Tensor, tied: TiedGradient | None = None) -> dict[str, Tensor]:
        """See `MlmDecoder.forward`."""
        output: dict[str, Tensor] = self.decoder(self.transform(rows), labels, tied)
        return output


class BertOnlyMlmHead(nn.Module):
    """The MLM head alone."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.predictions = BertLMPredictionHead(config)

    def forward(self, rows: Tensor, mlm_labels: Tensor, tied: TiedGradient | None = None) -> dict[str, Tensor]:
        """Masked rows [M, H] to the outputs of `BertForMaskedLM.forward`."""
        mlm = self.predictions(rows, mlm_labels, tied)
        output = {"mlm_loss_sum": mlm["loss_sum"], "mlm_correct": mlm["correct"]}
        return output if self.training else {**output, "predictions": mlm["predictions"]}


class BertPreTrainingHeads(nn.Module):
    """The MLM and NSP heads."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.predictions = BertLMPredictionHead(config)
        self.seq_relationship = nn.Linear(config.hidden_size, 2)

    def forward(
        self, rows: Tensor, pooled: Tensor, mlm_labels: Tensor, nsp_labels: Tensor, tied: TiedGradient | None = None
    ) -> dict[str, Tensor]:
        """Masked rows [M, H] and pooled vectors [B, H] to the outputs of `BertForPreTraining.forward`."""
        mlm = self.predictions(rows, mlm_labels, tied)
        nsp_logits = self.seq_relationship(pooled).float()
        output = {
            "mlm_loss_sum": mlm["loss_sum"],
            "nsp_loss_sum": nn.functional.cross_entropy(nsp_logits, nsp_labels, reduction="sum"),
            "mlm_correct": mlm["correct"],
            "nsp_correct": (nsp_logits.detach().argmax(-1) == nsp_labels).sum(),
        }
        return output if self.training else {**output, "predictions": mlm["predictions"]}


class BertForPreTraining(nn.Module):
    """BERT with MLM and NSP; the decoder's weight is the word embeddings'."""

    def __init__(self, config: BertConfig, activation_checkpointing: bool = False) -> None:
        super().__init__()
        self.config = config
        self.bert = BertModel(config, activation_checkpointing)
        self.cls = BertPreTrainingHeads(config)
        self.cls.predictions.decoder.weight = self.bert.embeddings.word_embeddings.weight

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor,
        position_ids: Tensor,
        lengths: Tensor,
        mlm_positions: Tensor,
        mlm_labels: Tensor,
        nsp_labels: Tensor,
        max_length: int | None = None,
    ) -> dict[str, Tensor]:
        """Summed losses of a packed batch, to be divided by the totals of the global batch.

        Args:
            input_ids, token_type_ids, position_ids, lengths, max_length: see `BertModel.forward`.
            mlm_positions: [M] int64, indices of the masked tokens among the T packed ones.
            mlm_labels: [M] int64, their original ids.
            nsp_labels: [B] int64, 0 where the second segment follows the first, 1 where it is random.

        Returns:
            mlm_loss_sum, nsp_loss_sum: fp32 scalars in nats; mlm_correct, nsp_correct: int64 scalars;
            predictions, in evaluation mode only: [M] int64, the most probable token of each masked row.
        """
        tied = TiedGradient()
        rows, pooled = self.bert(input_ids, token_type_ids, position_ids, lengths, max_length, tied, mlm_positions)
        if self.training:
            rows, mlm_labels = with_ignored_rows(rows, mlm_labels)
        output: dict[str, Tensor] = self.cls(rows, pooled, mlm_labels, nsp_labels, tied)
        return output


class BertForMaskedLM(nn.Module):
    """BERT with MLM alone, so without a pooler; the decoder's weight is the word embeddings'."""

    def __init__(self, config: BertConfig, activation_checkpointing: bool = False) -> None:
        super().__init__()
        self.config = config
        self.bert = BertModel(config, activation_checkpointing, pooler=False)
        self.cls = BertOnlyMlmHead(config)
        self.cls.predictions.decoder.weight = self.bert.embeddings.word_embeddings.weight

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor,
        position_ids: Tensor,
        lengths: Tensor,
        mlm_positions: Tensor,
        mlm_labels: Tensor,
        max_length: int | None = None,
    ) -> dict[str, Tensor]:
        """Summed losses of a packed batch: arguments and outputs of `BertForPreTraining.forward` but those of NSP."""
        tied = TiedGradient()
        rows, _ = self.bert(input_ids, token_type_ids, position_ids, lengths, max_length, tied, mlm_positions)
        if self.training:
            rows, mlm_labels = with_ignored_rows(rows, mlm_labels)
        output: dict[str, Tensor] = self.cls(rows, mlm_labels, tied)
        return output


def with_ignored_rows(rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Masked rows [M, H] and labels [M] with `spare_rows` more, which the loss ignores."""
    spare = spare_rows(len(labels), rows)
    return (F.pad(rows, (0, 0, 0, spare)), F.pad(labels, (0, spare), value=IGNORED)) if spare else (rows, labels)
