"""Teachers: trained models of the run's tokenizer and task, opened and checked, whose weights stay as they are."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from engine.config import architecture_of
from engine.config.methods.distil import model_in
from engine.data.tokenizer.vocabulary import Vocabulary
from engine.data.tokenizer.wordpiece import load_tokenizer
from engine.errors import UserError, require
from engine.model.pretrained import base_weights, load_config, load_pretrained
from engine.model.sentence import read_sentence_config


@dataclass(frozen=True)
class Student:
    """What a run's own model must have in common with its teachers."""

    vocabulary: Vocabulary
    config: Any
    """the transformers configuration"""
    names: Sequence[str] | None
    """of the classes; None where there are none"""
    length: int
    """tokens of the longest sequence"""


@dataclass(frozen=True)
class Teacher:
    """One of the folders of distil.teachers.

    Raises:
        UserError: from `check` and `load`, in a line that names the folder.
    """

    given: str
    head: str
    """that it is to have"""

    @property
    def folder(self) -> Path:
        """Of the weights."""
        return model_in(self.given)

    @cached_property
    def config(self) -> Any:
        """The transformers configuration.

        Raises:
            UserError: no folder of an architecture of ours.
        """
        if not self.folder.is_dir():
            raise UserError(f"distil.teachers: {self.given!r} is no folder; give that of a trained model, or of a run")
        config = load_config(self.folder)
        if self.head == "embeddings" and (sentence := read_sentence_config(self.folder)) is not None:
            sentence.put_into(config)
        return config

    def check(self, student: Student, *, predicts: bool) -> None:
        """Refuse a folder that can't teach.

        Args:
            predicts: whether its predictions are learned, so that they must be of the same things.
        """
        architecture = architecture_of(self.config)
        self._require(self.head in architecture.export_classes, f"it has no head for {self.head}")
        same = load_tokenizer(self.folder).fingerprint == student.vocabulary.fingerprint
        self._require(same, "its tokenizer is another than the run's, so that its tokens are others")
        rows, words = self.config.vocab_size, student.vocabulary.vocab_size
        self._require(rows >= words, f"it has word embeddings of {rows} tokens, and the tokenizer has {words}")
        limit, segments = architecture.positions(self.config), architecture.segments(self.config)
        self._require(limit >= student.length, f"it has {limit} positions, and sequences up to {student.length} tokens")
        wanted = architecture_of(student.config).segments(student.config) or 0
        self._require(segments is None or segments >= wanted, f"its type_vocab_size is {segments}, and {wanted} needed")
        if predicts and student.config.problem_type == "regression":
            self._require(self.config.num_labels == 1, f"it has {self.config.num_labels} labels, and a number is one")
        if predicts and student.names is not None:
            theirs = [str(self.config.id2label[index]) for index in range(self.config.num_labels)]
            told = f"its labels are {_shown(theirs)}, and the run's {_shown(student.names)}"
            self._require(theirs == list(student.names), told)
            known = (None, student.config.problem_type)
            told = f"its problem_type is {self.config.problem_type!r}, and the run's {student.config.problem_type!r}"
            self._require(self.config.problem_type in known, told)

    def _require(self, fits: bool, told: str) -> None:
        require(fits, "distil.teachers", self.given, f"{told}; give another teacher")

    def load(self, *, predicts: bool) -> nn.Module:
        """The model in evaluation mode, in fp32 on the CPU; none of its weights has a gradient.

        Args:
            predicts: whether its head must have weights.
        """
        model = architecture_of(self.config).build(self.head, self.config, False)
        unread = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        report = load_pretrained(model, self.folder)
        fresh = [name for name in (*report.initialised, *(each.name for each in report.reshaped)) if name not in unread]
        told = f"it has no weights of {', '.join(fresh[:1])}, a part of its head for {self.head}"
        self._require(not (fresh and predicts), told)
        return model.eval().requires_grad_(False)


def fingerprint(teachers: Sequence[Teacher]) -> str | None:
    """The sha256 of all teachers' weights, in order; None without any."""
    hashes = [str(base_weights(str(teacher.folder))) for teacher in teachers]
    return hashlib.sha256("".join(hashes).encode()).hexdigest() if hashes else None


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
