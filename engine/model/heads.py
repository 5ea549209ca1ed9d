"""BERT with the heads of fine-tuning tasks, under transformers' parameter names."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import BertConfig

from engine.model.bert import BertModel


class BertForSequenceClassification(nn.Module):
    """A linear classifier over the pooled vector; its number of classes is `config.num_labels`."""

    def __init__(self, config: BertConfig, activation_checkpointing: bool = False) -> None:
        super().__init__()
        self.config = config
        self.bert = BertModel(config, activation_checkpointing)
        probability = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
        self.dropout = nn.Dropout(probability)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor,
        position_ids: Tensor,
        lengths: Tensor,
        labels: Tensor | None = None,
        max_length: int | None = None,
    ) -> dict[str, Tensor]:
        """Classify a packed batch.

        Args:
            input_ids, token_type_ids, position_ids, lengths, max_length: see `BertModel.forward`.
            labels: [B] int64 class ids.

        Returns:
            logits: fp32 [B, classes]; with labels also loss_sum, the summed cross-entropies in nats (fp32 scalar).
        """
        nothing = lengths.new_empty(0)  # of the last states the pooler reads its own, and nobody any other
        _, pooled = self.bert(input_ids, token_type_ids, position_ids, lengths, max_length, read=nothing)
        logits = self.classifier(self.dropout(pooled)).float()
        if labels is None:
            return {"logits": logits}
        return {"logits": logits, "loss_sum": nn.functional.cross_entropy(logits, labels, reduction="sum")}
