"""A run's model: its transformers configuration and its initial weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from engine.config import ARCHITECTURES, ModelConfig, architecture_of
from engine.errors import UserError
from engine.hub import local_folder
from engine.model.pretrained import load_config

#: published checkpoints round their vocabulary up, to a multiple of 1,024 at most, so that the decoder's matrix tiles
MAX_SPARE_ROWS = 1023


def build_config(
    model: ModelConfig,
    vocab_size: int,
    pad_token_id: int = 0,
    labels: Sequence[str] | None = None,
    listed: int | None = None,
) -> Any:
    """The transformers configuration of a run: the dimensions of `model`, or of the folder `model.init_from`.

    Dropout always comes from `model`, the padding token from the tokenizer. The vocabulary is not rounded.

    Args:
        vocab_size: number of token ids that the data uses.
        labels: names of a classifier's classes in the order of their ids.
        listed: those of them that the weights of `init_from` must have; the model grows by the others. None: all.

    Raises:
        UserError: `init_from` is of no architecture of ours, or has another vocabulary than the data; or an option that
            its architecture lacks.
    """
    if model.init_from is None:
        config = ARCHITECTURES.get(model.fresh_architecture).fresh_config(model, vocab_size, pad_token_id)
    else:
        found = load_config(local_folder(model.init_from))
        _check_architecture(found, model)
        _check_vocabulary(found, vocab_size if listed is None else listed, model.init_from)
        config = architecture_of(found).inherited_config(found, pad_token_id)
        config.vocab_size = max(found.vocab_size, vocab_size)
        if model.kept_layers is not None:
            architecture_of(found).keep_layers(config, model.kept_layers)
    architecture_of(config).set_options(config, model)
    architecture_of(config).set_dropout(config, model)
    if labels is not None:
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: index for index, label in enumerate(labels)}
        config.problem_type = "single_label_classification"
    return config


def _check_architecture(config: Any, model: ModelConfig) -> None:
    """Refuse a folder of another architecture than the one that was asked for."""
    if model.architecture not in (None, config.model_type):
        raise UserError(
            f"model.architecture: {model.architecture!r} has no effect: model.init_from {model.init_from!r} is of type "
            f"{config.model_type!r}; leave one of the two out"
        )


def _check_vocabulary(config: Any, tokens: int, folder: str) -> None:
    """Refuse weights that are not those of a vocabulary of so many tokens."""
    if not 0 <= config.vocab_size - tokens <= MAX_SPARE_ROWS:
        raise UserError(
            f"model.init_from: {folder!r} has word embeddings of {config.vocab_size} tokens and a vocabulary of "
            f"{tokens}; copy the tokenizer's files that came with the weights there (tokens that you add yourself "
            "belong in added_tokens.json, not in vocab.txt)"
        )


@torch.no_grad()
def initialise(model: nn.Module, seed: int) -> None:
    """Draw the initial weights in place: matrices and embeddings as the architecture says, zero biases and padding row,
    LayerNorm at identity.

    A pure function of the architecture and the seed; torch's global generator is neither read nor moved.
    """
    config: Any = model.config
    generator = torch.Generator().manual_seed(seed)
    drawn: set[torch.Tensor] = set()
    architecture = architecture_of(config)
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            module.reset_parameters()
        # A tied weight is drawn once, as an embedding: a second draw would refill the padding row.
        elif isinstance(module, (nn.Linear, nn.Embedding)) and module.weight not in drawn:
            architecture.draw(module.weight, name, config, generator)
            drawn.add(module.weight)
        if isinstance(module, nn.Linear) and module.bias is not None:
            module.bias.zero_()
        elif isinstance(module, nn.Embedding) and module.padding_idx is not None:
            module.weight[module.padding_idx].zero_()
