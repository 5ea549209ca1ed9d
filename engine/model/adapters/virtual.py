"""Trained vectors in front of each sequence: of its word embeddings (prompt tuning, Lester et al. 2021) or of the keys
and values of every layer (prefix tuning, Li and Liang 2021; of encoders, Liu et al. 2022, P-tuning v2).

What is computed is what peft computes of a prompt, and transformers of a prefix that peft hands over as a cache: the
text's positions begin behind the vectors'; the vectors of a prompt are of the first segment, and a head that reads a
sequence's first token reads the first of them.

Shape legend: B sequences, T tokens in all of them, R tokens whose states are read, V vectors, H hidden size, L layers.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from engine.kernels.embedding import TiedGradient
from engine.model.bert import BertModel
from engine.model.layers import BertSelfAttention, BertWordEmbeddings
from engine.model.packing import places_behind

#: what the parameters' names end with
VECTORS = (".prompt.weight", ".prefix.weight")


class PromptedEmbeddings(nn.Module):
    """Word embeddings with a prompt's vectors behind the vocabulary."""

    def __init__(self, base_layer: BertWordEmbeddings, tokens: Tensor) -> None:
        """
        Args:
            tokens: [V] int64, whose embeddings the vectors are at the start (Lester et al. 2021, section 3.2).
        """
        super().__init__()
        self.base_layer = base_layer
        self.words = base_layer.num_embeddings
        self.prompt = nn.Embedding.from_pretrained(base_layer.weight.detach()[tokens], freeze=False)

    def forward(self, input_ids: Tensor, tied: TiedGradient | None = None) -> Tensor:
        """[T] to [T, H]; the ids behind the vocabulary's are the prompt's."""
        virtual = input_ids >= self.words
        words: Tensor = self.base_layer(input_ids.masked_fill(virtual, 0), tied)
        vectors: Tensor = self.prompt((input_ids - self.words).clamp(min=0))
        return torch.where(virtual[:, None], vectors, words)


class Prefix(nn.Embedding):
    """Keys and values of a layer's attention that are of no token."""

    def forward(self) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Keys and values, [V, H] each; not the parameter itself, which ZeRO-3 takes away behind this."""
        both = super().forward(torch.arange(self.num_embeddings, device=self.weight.device))
        key, value = both.chunk(2, 1)
        return key, value


@dataclass(frozen=True)
class Prompting:
    """A forward pre-hook that puts a prompt's ids in front of each packed sequence of a model's arguments."""

    vectors: int
    first: int
    """id of the first vector"""
    reads: bool
    """whether the model gives a row for each token that is read, which a prompt's are not"""

    def __call__(self, _: nn.Module, given: tuple[Any, ...], arguments: dict[str, Any]) -> tuple[tuple[()], Any]:
        """The arguments of a packed batch, all by name, with the prompt's tokens."""
        assert not given, "a model is called with arguments by name"
        return (), self.prompted(arguments)

    def prompted(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of [T] tokens as those of [T + B V]."""
        lengths, ids = arguments["lengths"], arguments["input_ids"]
        tokens, virtual = places_behind(lengths, ids.numel(), self.vectors)
        places = torch.arange(self.vectors, device=ids.device)
        before = {"input_ids": self.first + places, "position_ids": places, "token_type_ids": torch.zeros_like(places)}
        shifted = {**arguments, "position_ids": arguments["position_ids"] + self.vectors}
        found = {**arguments, "lengths": lengths + self.vectors}
        for name in before.keys() & arguments.keys():
            of_all = ids.new_empty(ids.numel() + len(virtual)).index_copy_(0, tokens, shifted[name])
            found[name] = of_all.index_copy_(0, virtual, before[name].repeat(len(lengths)))
        if arguments.get("max_length") is not None:
            found["max_length"] = arguments["max_length"] + self.vectors
        if self.reads:
            read = arguments.get("read")
            found["read"] = tokens if read is None else tokens[read]
        return found


def insert_prompt(model: nn.Module, vectors: int) -> None:
    """Put a prompt's vectors into a model, in place: at the start embeddings of words drawn from torch's generator."""
    name, words = next((name, each) for name, each in model.named_modules() if isinstance(each, BertWordEmbeddings))
    parent, _, own = name.rpartition(".")
    drawn = torch.randint(words.num_embeddings, (vectors,))
    setattr(model.get_submodule(parent), own, PromptedEmbeddings(words, drawn))
    reads = "read" in inspect.signature(model.forward).parameters
    model.register_forward_pre_hook(Prompting(vectors, words.num_embeddings, reads), with_kwargs=True)


def insert_prefix(model: nn.Module, vectors: int) -> None:
    """Put a prefix into every layer of a model, in place.

    At the start it is what the model makes of words drawn from torch's generator (Li and Liang 2021, section 7.4).
    """
    encoder = next(module for module in model.modules() if isinstance(module, BertModel))
    words = torch.randint(encoder.config.vocab_size, (vectors,))
    for attention, states in _activations(encoder, words).items():
        attention.prefix = Prefix.from_pretrained(states, freeze=False)
    encoder.prefix_length = vectors


@torch.no_grad()
def _activations(encoder: BertModel, words: Tensor) -> dict[BertSelfAttention, Tensor]:
    """Keys and values [V, 2 H] of a sequence of words [V], by layer."""
    layers = [module for module in encoder.modules() if isinstance(module, BertSelfAttention)]
    seen: dict[nn.Module, Tensor] = {}
    parts = [part for layer in layers for part in (layer.key, layer.value)]
    hooks = [part.register_forward_hook(lambda module, _, states: seen.update({module: states})) for part in parts]
    training = encoder.training
    count = len(words)
    encoder.eval()
    encoder(words, torch.zeros_like(words), torch.arange(count), torch.tensor([count]), count)
    encoder.train(training)
    for hook in hooks:
        hook.remove()
    return {layer: torch.cat((seen[layer.key], seen[layer.value]), 1) for layer in layers}


def joined(parameters: Mapping[str, Tensor]) -> Tensor | None:
    """The vectors among a model's parameters as peft keeps them; None of a model with none.

    They are a prompt [V, H], or a prefix [V, 2 L H], of layer after layer its keys and then its values.
    """
    parts = [tensor for name, tensor in parameters.items() if name.endswith(VECTORS)]
    return torch.cat(parts, 1) if parts else None


def split(vectors: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The vectors [V, ...] by the names of the model's parameters, which are in their order."""
    names = [name for name in parameters if name.endswith(VECTORS)]
    return dict(zip(names, vectors.chunk(len(names), 1), strict=False))
