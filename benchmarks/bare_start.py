"""The least that a script under DeepSpeed does before its first step is done; `benchmarks.startup` times it.

A Transformer encoder of torch's own layers, as large as the run's BERT, steps once on random token ids.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import deepspeed
import torch
from torch import Tensor, nn


class Encoder(nn.Module):
    """Embeddings, layers, and a linear layer over the vocabulary."""

    def __init__(self, vocabulary: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.decoder = nn.Linear(width, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        """[B, S] token ids to the mean cross-entropy of giving them back."""
        logits = self.decoder(self.encoder(self.embedding(ids)))
        return nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--deepspeed_config", type=Path, required=True)
    parser.add_argument("--local_rank", type=int)
    for name in ("vocabulary", "width", "layers", "heads", "length"):
        parser.add_argument(f"--{name}", type=int, required=True)
    given = parser.parse_args()
    config = json.loads(given.deepspeed_config.read_text())
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # as in zerobert; it would compile C++ first
    deepspeed.init_distributed()
    model = Encoder(given.vocabulary, given.width, given.layers, given.heads)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for _ in range(config["gradient_accumulation_steps"]):
        ids = torch.randint(given.vocabulary, (config["train_micro_batch_size_per_gpu"], given.length))
        engine.backward(engine(ids.to(engine.device)))
        engine.step()
    if torch.distributed.get_rank() == 0:
        print("step 1 done", flush=True)
    torch.distributed.barrier()


if __name__ == "__main__":
    main()
