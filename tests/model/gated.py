"""An architecture that the package doesn't know: BERT without the layers' biases, with a gated feed-forward network.

As a script it is launch/train.py with one architecture more.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import BertConfig, PreTrainedModel
from transformers.utils import ModelOutput

from engine.config import ARCHITECTURES
from engine.model.bert_entry import BertEntry
from engine.model.layers import BertLinear
from launch.cli import run_command
from launch.train import main


class GatedConfig(BertConfig):
    model_type = "gated"


class GatedDense(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, config: GatedConfig) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(config.hidden_size, config.intermediate_size, bias=False) for _ in range(2))

    def forward(self, hidden: Tensor) -> Tensor:
        gated: Tensor = nn.functional.silu(self.gate(hidden)) * self.up(hidden)
        return gated


class GatedEntry(BertEntry):
    feed_forward_matrices = 3
    biases = False
    export_classes: ClassVar = {"pretraining": "GatedForPreTraining"}

    def config_class(self) -> type[Any]:
        return GatedConfig

    def build(self, head: str, config: GatedConfig, activation_checkpointing: bool) -> nn.Module:
        model = super().build(head, config, activation_checkpointing)
        for layer in model.get_submodule("bert.encoder.layer").children():
            layer.intermediate = GatedDense(config)
            for name, module in list(layer.named_modules()):
                if isinstance(module, BertLinear):
                    layer.set_submodule(name, nn.Linear(module.in_features, module.out_features, bias=False))
        return model

    def export_class(self, name: str) -> type[Any]:
        return GatedForPreTraining if name == "GatedForPreTraining" else super().export_class(name)


class GatedForPreTraining(PreTrainedModel):
    """What a package of its own would have for transformers' users."""

    config_class = GatedConfig
    _tied_weights_keys = GatedEntry.tied

    def __init__(self, config: GatedConfig) -> None:
        super().__init__(config)
        built = GatedEntry().build("pretraining", config, False)
        self.bert, self.cls = built.bert, built.cls
        self.post_init()

    def forward(self, input_ids: Tensor, token_type_ids: Tensor) -> ModelOutput:
        """Logits of a sequence [1, T], under the names of transformers' `BertForPreTraining`."""
        positions, lengths = torch.arange(input_ids.numel()), torch.tensor([input_ids.numel()])
        hidden, pooled = self.bert(input_ids[0], token_type_ids[0], positions, lengths)
        head = self.cls.predictions
        logits = nn.functional.linear(head.transform(hidden), head.decoder.weight, head.decoder.bias)
        return ModelOutput(prediction_logits=logits[None], seq_relationship_logits=self.cls.seq_relationship(pooled))


if __name__ == "__main__":
    ARCHITECTURES.register("gated", GatedEntry())
    run_command(main)
