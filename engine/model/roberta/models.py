"""RoBERTa (Liu et al. 2019) with its heads: BERT's encoder under transformers' names, see `engine.model.bert`.

XLM-RoBERTa (Conneau et al. 2020) has the same modules. Shape legend: as in `engine.model.bert`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import RobertaConfig

from engine.kernels.embedding import TiedGradient
from engine.model.activations import activation
from engine.model.bert import BertModel, MlmDecoder, with_ignored_rows
from engine.model.heads import BertForEmbeddings, PooledHead, TokenHead, head_dropout
from engine.model.layers import BertActivatedDense, BertEmbeddings, BertLayerNorm


class RobertaEmbeddings(BertEmbeddings):
    """BERT's, of one kind of segment; the first token has the position behind the padding token's id."""

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__(config)
        self.first_position = config.pad_token_id + 1

    def forward(
        self, input_ids: Tensor, token_type_ids: Tensor, position_ids: Tensor, tied: TiedGradient | None = None
    ) -> Tensor:
        """Three [T] index tensors to [T, H]; positions count from 0, and segments are not told apart."""
        return super().forward(input_ids, torch.zeros_like(input_ids), position_ids + self.first_position, tied)


class RobertaModel(BertModel):
    """Embeddings and encoder."""

    embeddings_class = RobertaEmbeddings


class RobertaLMHead(BertActivatedDense):
    """The MLM head; its activation is GELU whatever the encoder's. The decoder's bias is registered here too."""

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__(config, config.hidden_size)
        self.activation = activation("gelu")
        self.layer_norm = BertLayerNorm(config)
        self.decoder = MlmDecoder(config.hidden_size, config.vocab_size)
        self.bias = self.decoder.bias

    def forward(  # type: ignore[override]
        self, rows: Tensor, mlm_labels: Tensor, tied: TiedGradient | None = None
    ) -> dict[str, Tensor]:
        """Masked rows [M, H] to the outputs of `RobertaForMaskedLM.forward`."""
        mlm = self.decoder(self.layer_norm(super().forward(rows)), mlm_labels, tied)
        output = {"mlm_loss_sum": mlm["loss_sum"], "mlm_correct": mlm["correct"]}
        return output if self.training else {**output, "predictions": mlm["predictions"]}


class RobertaForMaskedLM(nn.Module):
    """RoBERTa with MLM; the decoder's weight is the word embeddings'."""

    def __init__(self, config: RobertaConfig, activation_checkpointing: bool = False) -> None:
        super().__init__()
        self.config = config
        self.roberta = RobertaModel(config, activation_checkpointing, pooler=False)
        self.lm_head = RobertaLMHead(config)
        self.lm_head.decoder.weight = self.roberta.embeddings.word_embeddings.weight

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
        """Summed loss of a packed batch: arguments and outputs of `engine.model.bert.BertForMaskedLM.forward`."""
        tied = TiedGradient()
        rows, _ = self.roberta(input_ids, token_type_ids, position_ids, lengths, max_length, tied, mlm_positions)
        if self.training:
            rows, mlm_labels = with_ignored_rows(rows, mlm_labels)
        output: dict[str, Tensor] = self.lm_head(rows, mlm_labels, tied)
        return output


class RobertaClassificationHead(nn.Module):
    """A layer with tanh and a linear classifier over first tokens."""

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = head_dropout(config)
        self.out_proj = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, first: Tensor) -> Tensor:
        """[B, H] to [B, classes]."""
        logits: Tensor = self.out_proj(self.dropout(torch.tanh(self.dense(self.dropout(first)))))
        return logits


class RobertaForSequenceClassification(nn.Module):
    """RoBERTa with a classifier of `config.num_labels` classes."""

    def __init__(self, config: RobertaConfig, activation_checkpointing: bool = False) -> None:
        super().__init__()
        self.config = config
        self.roberta = RobertaModel(config, activation_checkpointing, pooler=False)
        self.classifier = RobertaClassificationHead(config)

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor,
        position_ids: Tensor,
        lengths: Tensor,
        max_length: int | None = None,
    ) -> Tensor:
        """Classify a packed batch: as `engine.model.heads.PooledHead.forward`."""
        starts = lengths.cumsum(0) - lengths
        first, _ = self.roberta(input_ids, token_type_ids, position_ids, lengths, max_length, read=starts)
        logits: Tensor = self.classifier(first)
        return logits.float()


class RobertaForMultipleChoice(PooledHead):
    """One logit a sequence, which is a question with one of its choices."""

    encoder_name, encoder_class, choices = "roberta", RobertaModel, True


class RobertaForTokenClassification(TokenHead):
    """A classifier of tokens."""

    encoder_name, encoder_class = "roberta", RobertaModel


class RobertaForQuestionAnswering(TokenHead):
    """Two logits a token: of an answer's beginning there, and of its end."""

    encoder_name, encoder_class = "roberta", RobertaModel
    output_name, drops = "qa_outputs", False


class RobertaForEmbeddings(BertForEmbeddings):
    """RoBERTa's encoder and, of each sequence, one vector."""

    embeddings_class = RobertaEmbeddings
