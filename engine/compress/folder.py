"""A Hugging Face folder with any head, opened to be changed as a whole and written again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from engine.config import architecture_of
from engine.errors import UserError
from engine.model.folder import TUNED, export_huggingface, read_origin, tokenizer_files
from engine.model.pretrained import load_config, load_pretrained
from engine.model.roundtrip import RoundTrip
from engine.model.sentence import read_sentence_config
from engine.predict.model import model_path


@dataclass(frozen=True)
class Source:
    """A folder that is read, and what is written again beside the weights."""

    folder: Path
    config: Any
    head: str
    """one of `Architecture.export_classes`"""
    origin: Mapping[str, Any]
    """what zerobert.json tells; nothing of another folder"""

    def load(self) -> nn.Module:
        """Our module with its weights, in evaluation mode.

        Raises:
            UserError: weights that are missing, damaged, or of another shape.
        """
        model = architecture_of(self.config).build(self.head, self.config, False)
        report = load_pretrained(model, self.folder)
        unread = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        fresh = [name for name in report.initialised if name not in unread]
        if fresh or report.reshaped:
            name = fresh[0] if fresh else report.reshaped[0].name
            raise UserError(f"model: {self.folder} has no weights of {name}; give a folder that is complete")
        return model.eval()

    def write(
        self, model: nn.Module, output: Path, told: Mapping[str, Any], tokenizer: Mapping[str, bytes] | None = None
    ) -> RoundTrip | None:
        """Write a changed model, whose `config` is its own.

        Args:
            told: what to add to zerobert.json.
            tokenizer: its files, where they change.

        Raises:
            UserError: see `export_huggingface`.
        """
        kept = {name: self.origin[name] for name in ("step", "facts", TUNED) if name in self.origin}
        config: Any = model.config
        config.architectures = list(self.config.architectures)
        weights = dict(model.named_parameters(remove_duplicate=False))
        files = tokenizer_files(self.folder) if tokenizer is None else tokenizer
        return export_huggingface(weights, config, files, output, {**kept, **told})


def open_source(given: str) -> Source:
    """The model that a user names: a run's folder, an export, any folder of our architectures, or one of the hub.

    Raises:
        UserError: nothing there, another architecture, or a head that is none of ours.
    """
    path, _ = model_path(given)
    config = load_config(path)
    sentence = read_sentence_config(path)
    if sentence is not None:
        sentence.put_into(config)
    kind = (config.architectures or [None])[0]
    heads = {name: head for head, name in architecture_of(config).export_classes.items()}
    if kind not in heads:
        known = ", ".join(heads)
        raise UserError(f"model: {path / 'config.json'} names {kind!r} in architectures; give a model of {known}")
    return Source(path, config, heads[kind], read_origin(path) or {})
