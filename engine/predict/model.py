"""The model of a prediction: where it is, which head it has, and what the run that trained it read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from engine.config import architecture_of
from engine.config.methods.adapter import MERGEABLE
from engine.data.tokenizer.vocabulary import Vocabulary
from engine.data.tokenizer.wordpiece import load_tokenizer
from engine.durable import sha256_of
from engine.errors import UserError
from engine.hub import fetch, hub_model
from engine.model.adapters.folder import adaptation_of, is_adapter, merged, open_adapted, taken_positions
from engine.model.folder import TUNED, read_origin, weights_of
from engine.model.pretrained import is_onnx, load_config, load_pretrained, weight_files
from engine.model.sentence import FIELD, read_sentence_config
from engine.onnx.module import OnnxModule
from engine.precision import DTYPES

#: heads that predict nothing that a task asks for; an encoder alone does with the files of sentence-transformers
NO_TASK = ("pretraining", "masked_lm", "embeddings")
REMEDY = "give the folder of a fine-tuned model"


@dataclass(frozen=True)
class ModelFolder:
    """A Hugging Face folder with a task's head, or an ONNX folder."""

    folder: Path
    config: Any
    """the transformers configuration"""
    head: str
    """one of `Architecture.export_classes`"""
    run: Mapping[str, Any]
    """the section labelled of the run that the folder is of; empty where it is of none"""
    base: str | None = None
    """of adapters, where their base is, if not where it was"""

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The tokenizer.

        Raises:
            UserError: there is none, or it has more tokens than the model.
        """
        vocabulary, rows = load_tokenizer(self.folder), self.config.vocab_size
        if vocabulary.vocab_size > rows:
            raise UserError(
                f"model: {self.folder} has a tokenizer of {vocabulary.vocab_size} tokens and word embeddings of {rows}"
                "; copy the tokenizer's files that came with the weights there"
            )
        return vocabulary

    @property
    def names(self) -> tuple[str, ...]:
        """Of the classes, in the order of their ids."""
        return tuple(str(self.config.id2label[index]) for index in range(self.config.num_labels))

    @cached_property
    def tuned(self) -> Mapping[str, Any]:
        """What a run chose on its validation examples for predictions, such as a threshold; empty of other folders."""
        chosen = (read_origin(self.folder) or {}).get(TUNED)
        return chosen if isinstance(chosen, dict) else {}

    @property
    def is_onnx(self) -> bool:
        """Whether its weights are in a graph."""
        return is_onnx(self.folder)

    def length(self, wanted: int | None) -> int:
        """The longest sequence in tokens: what is wanted, else the run's own, else all that the model takes.

        Raises:
            UserError: more is wanted than the model has positions for.
        """
        taken = taken_positions(self.folder)
        limit = architecture_of(self.config).positions(self.config) - taken
        if wanted is not None and wanted > limit:
            beside = f" beside {taken} of its adapters" if taken else ""
            raise UserError(
                f"max_length: {wanted} is not allowed; {self.folder} has {limit} positions{beside}: give at most that"
            )
        own = (getattr(self.config, FIELD, None) or {}).get("max_length")
        most = min(limit, own or self.vocabulary.max_length or limit)
        return wanted or self.run.get("max_length") or most

    def fingerprint(self) -> str:
        """sha256 of weights, configuration, tokenizer and what was tuned."""
        single = is_adapter(self.folder) or self.is_onnx
        files = [weights_of(self.folder)] if single else weight_files(self.folder)
        parts = [sha256_of(path) for path in files]
        parts += [sha256_of(self.folder / "config.json"), self.vocabulary.fingerprint]
        parts += [json.dumps([self.tuned, getattr(self.config, FIELD, None)], sort_keys=True)]
        return hashlib.sha256("".join(parts).encode()).hexdigest()

    def load(self, device: torch.device, precision: str) -> nn.Module:
        """The model in evaluation mode; of an ONNX folder an `OnnxModule`, with as many threads as torch has.

        Raises:
            UserError: weights that are missing, damaged, or of another shape; a head without weights; another precision
                than fp32 of a graph, which has its own.
        """
        if self.is_onnx:
            if precision != "fp32":
                told = f"{self.folder} is a graph with a precision of its own"
                raise UserError(f"precision: {precision!r} has no effect: {told}; leave it out")
            return OnnxModule.opened(self.folder, self.head, self.config, device).eval()
        if is_adapter(self.folder):
            return self._load_adapted().to(device, DTYPES[precision]).eval()  # type: ignore[index]
        model = architecture_of(self.config).build(self.head, self.config, False)
        report = load_pretrained(model, self.folder)
        unread = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        fresh = [name for name in report.initialised if name not in unread]
        fresh += [each.name for each in report.reshaped]
        if fresh:
            raise UserError(f"model: {self.folder} has no weights of {fresh[0]}, a part of its head; {REMEDY}")
        return model.to(device, DTYPES[precision]).eval()  # type: ignore[index]

    def _load_adapted(self) -> nn.Module:
        """Adapters over their base; computed into it where they can be, which takes no more time than the base."""
        model = open_adapted(self.folder, self.config, self.head, self.base)
        adaptation, _ = adaptation_of(self.folder, self.base)
        if adaptation.adapter.method not in MERGEABLE:
            return model
        weights = merged(model, adaptation.adapter, self.head)
        plain = architecture_of(self.config).build(self.head, self.config, False)
        plain.load_state_dict(weights)
        return plain


def open_folder(given: str, base: str | None = None) -> ModelFolder:
    """The model that a user names: a run's folder, an export, any folder of our architectures, or one of the hub.

    Args:
        base: of adapters, where their base is, if not where it was.

    Raises:
        UserError: nothing there, another architecture, no head of a task, or adapters that aren't a run's.
    """
    path, recipe = model_path(given)
    run = {} if recipe is None else _labelled(recipe)
    if is_adapter(path):
        adaptation_of(path, base)
    elif base is not None:
        raise UserError(f"base: {given!r} is a whole model, which has no base; leave it out")
    config = load_config(path)
    sentence = read_sentence_config(path)
    if sentence is not None:
        sentence.put_into(config)
    return ModelFolder(path, config, _head(path, config) if sentence is None else "embeddings", run, base)


def model_path(given: str) -> tuple[Path, Path | None]:
    """The folder of the model that a user names, which is fetched from the hub where it is one of its names, and of a
    run, whose export that is, its configuration.

    Raises:
        UserError: a run without an export, or a model that can't be had.
    """
    named = hub_model(given, "model")
    path = Path(given) if named is None else fetch(named, "model")
    recipe = path / "config.yaml"
    if not recipe.is_file():
        return path, None
    if not (path / "export" / "config.json").is_file():
        raise UserError(f"model: {given!r} is a run without an export; zerobert export {given} makes one")
    return path / "export", recipe


def _labelled(path: Path) -> Mapping[str, Any]:
    """The section labelled of a run's configuration."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"model: {path} cannot be read ({error}); give the run's export") from error
    section = values.get("labelled") if isinstance(values, dict) else None
    return section if isinstance(section, dict) else {}


def _head(path: Path, config: Any) -> str:
    """The head that config.json names in `architectures`."""
    kind = (config.architectures or [None])[0]
    heads = {name: head for head, name in architecture_of(config).export_classes.items() if head not in NO_TASK}
    if kind not in heads:
        raise UserError(
            f"model: {path / 'config.json'} names {kind!r} in architectures, which has no head of a task "
            f"({', '.join(heads)}; or, with the modules.json of sentence-transformers, embeddings); {REMEDY}"
        )
    return heads[kind]
