"""From a loaded model to one of which a part is trained: adapters put in, the rest frozen.

What the start model's folder doesn't have is always trained: the head, a new pooler, embeddings with rows of new
tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from engine.config import AdapterConfig, architecture_of, require
from engine.config.methods.adapter import IN_FOLDER, VIRTUAL, Frozen, frozen_parts
from engine.model.adapters import budget, houlsby, virtual
from engine.model.adapters.places import check_layers, place, plain, prefix_of, targets
from engine.model.pretrained import LoadReport


@dataclass(frozen=True)
class Adaptation:
    """Which parts of a model are trained."""

    adapter: AdapterConfig
    freeze: str | None
    """as train.freeze"""
    seed: int
    """of the adapters' initial values"""
    steps: int
    """optimizer steps of the run"""
    base: str
    """model.init_from of the run"""

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> Adaptation:
        """What `asdict` made plain values of."""
        return cls(**{**told, "adapter": AdapterConfig(**told["adapter"])})

    @property
    def is_partial(self) -> bool:
        """Whether anything isn't trained."""
        return self.adapter.method != "none" or self.freeze is not None

    @property
    def is_beside_base(self) -> bool:
        """Whether what is trained is exported as a folder beside the base."""
        return self.adapter.method in IN_FOLDER

    def apply(self, model: nn.Module, loaded: LoadReport) -> None:
        """Put adapters into the model and freeze what isn't trained, in place.

        The adapters' initial values are a function of the seed; torch's global generator isn't moved.

        Args:
            loaded: what the model has from the folder that it starts from.

        Raises:
            UserError: targets, biases or frozen parts that the model lacks; a prompt before new word embeddings.
        """
        if not self.is_partial:
            return
        self._check_vocabulary(loaded)
        frozen, config = frozen_parts(self.freeze), _config(model)
        prefix = prefix_of((name for name, _ in model.named_parameters()), architecture_of(config))
        check_layers(frozen, config.num_hidden_layers, self.freeze)
        own = {id(parameter): parameter.requires_grad for parameter in model.parameters()}  # some are never read
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self._insert(model, frozen)
        new = {*loaded.initialised, *(each.name for each in loaded.reshaped)}
        self._check_pooler(frozen, {name for name, _ in model.named_parameters()} - new, prefix)
        changed = 0
        for wrapped, parameter in model.named_parameters():
            name = plain(wrapped)
            part, layer = place(name, prefix)
            if id(parameter) not in own:  # of an adapter, which may keep counters beside its weights
                continue
            fresh = name in new or part == "head"
            changes = self._changes(name) and not frozen.holds(part, layer)
            changed += changes and not fresh
            parameter.requires_grad_(own[id(parameter)] and (fresh or changes))
        remedy = "the model has no bias that it may train; choose another method, or freeze less"
        require(changed > 0 or self.adapter.method != "bitfit", "adapter.method", self.adapter.method, remedy)

    def _check_pooler(self, frozen: Frozen, given: Collection[str], prefix: str) -> None:
        """Refuse to freeze what isn't there, or has nothing but initial values."""
        has = any(place(plain(name), prefix)[0] == "pooler" for name in given)
        remedy = f"the model has no pooler with weights from {self.base}; leave pooler out"
        require(has or "pooler" not in frozen.parts, "train.freeze", self.freeze, remedy)

    def _changes(self, name: str) -> bool:
        """Whether the method trains a parameter of the base."""
        return self.adapter.method == "none" or (self.adapter.method == "bitfit" and name.endswith(".bias"))

    def _check_vocabulary(self, loaded: LoadReport) -> None:
        """Refuse a prompt beside new embeddings: peft takes those of the base, without a word."""
        grown = any(place(each.name, loaded.prefix)[0] == "embeddings" for each in loaded.reshaped)
        remedy = (
            f"{self.base} lacks tokens of the tokenizer, and peft would not see the new ones; choose another method"
        )
        require(self.adapter.method != "prompt" or not grown, "adapter.method", "prompt", remedy)

    def _insert(self, model: nn.Module, frozen: Frozen) -> None:
        method, architecture = self.adapter.method, architecture_of(_config(model))
        if method in VIRTUAL:
            put = virtual.insert_prompt if method == "prompt" else virtual.insert_prefix
            put(model, self.adapter.virtual_tokens)
        if not self.adapter.layers():
            return
        names = targets(self.adapter, architecture, frozen, [name for name, _ in model.named_modules()])
        require(bool(names), "train.freeze", self.freeze, "it leaves no layer to adapt; freeze less")
        if method == "houlsby":
            houlsby.insert(model, names, self.adapter.bottleneck, self.adapter.dropout)
            return
        import peft

        from engine.model.adapters.lora import take_over
        from engine.model.adapters.methods import peft_config

        peft.inject_adapter_in_model(peft_config(self.adapter, architecture, names, self.steps), model)
        if method == "adalora":
            budget.mark(model)
        take_over(model)


def in_base(model: nn.Module, loaded: LoadReport | None) -> frozenset[str]:
    """The frozen parameters whose values are those of the start model's folder, so that no checkpoint needs them."""
    if loaded is None:
        return frozenset()
    held = set(loaded.taken) - {each.name for each in loaded.reshaped}
    return frozenset(n for n, p in model.named_parameters() if not p.requires_grad and plain(n) in held)


def _config(model: nn.Module) -> Any:
    return model.config
