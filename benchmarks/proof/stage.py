"""What a stage of the proof is: its name, its share of the time, what it is given and what it leaves behind.

A stage runs in a process of its own (`benchmarks.proof.worker`) and writes its rows to a file after each of them, so
that those of a stage that is ended are kept.
"""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.durable import write_atomically

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Setting:
    """Where and how a stage runs."""

    device: str
    """cuda, or cpu at toy sizes"""
    materials: str
    """folder of `benchmarks.proof.materials`"""
    scratch: str
    """folder of its own for what needs not be kept"""
    output: str
    """folder of the results; what a stage leaves there is kept"""
    seconds: float
    """that it may take"""
    ends: float
    """when it will be ended, as `time.time` counts"""

    @property
    def toy(self) -> bool:
        """Whether sizes are to be such that a CPU does them in seconds."""
        return self.device == "cpu"

    @property
    def left(self) -> float:
        """Seconds until the stage is ended."""
        return self.ends - time.time()


class Report:
    """The rows of a stage, as other benchmarks have them: a title, rivals with figures, and goals."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: dict[str, Row] = {}

    def put(self, row: Row) -> None:
        """Add a row, or replace the one with its title."""
        self._rows[row["title"]] = row
        write_atomically(self._path, json.dumps(list(self._rows.values()), indent=1))


class SkippedError(Exception):
    """A stage that can't run here, and why."""


Function = Callable[[Setting, Report], None]


@dataclass(frozen=True)
class Stage:
    """One entry of `STAGES`."""

    what: str
    """in words, for a list"""
    weight: float
    """of its time among those that are still to come"""
    function: str
    """module:attribute, imported in the stage's process"""

    def load(self) -> Function:
        module, _, name = self.function.partition(":")
        function: Function = getattr(importlib.import_module(module), name)
        return function


def _stage(what: str, weight: float, module: str, name: str = "run") -> Stage:
    return Stage(what, weight, f"benchmarks.proof.{module}:{name}")


#: in the order of their worth, for the budget may end before the last
STAGES: dict[str, Stage] = {
    "environment": _stage("versions, bandwidth, matrix products and launches", 30, "environment"),
    "kernels": _stage("every kernel family against plain torch, and the tests that need a GPU", 60, "kernels"),
    "losses": _stage("ZeRO 0 to 3, bf16 and fp16, AdamW and LAMB against the losses of a CPU", 100, "losses"),
    "resume": _stage("a resumed run bit for bit, in deterministic mode", 45, "resume"),
    "speed": _stage("base and large at 128 and 512 tokens: sequences/s, MFU, memory", 110, "speed"),
    "operators": _stage("loss, optimizer, normalisation and GELU against torch and Liger", 55, "operators"),
    "attention": _stage("attention and a whole layer, full and uneven sequences", 25, "attention"),
    "trainer": _stage("transformers' Trainer at the same batch", 60, "trainer"),
    "sanitizer": _stage("the kernels under compute-sanitizer", 40, "sanitizer"),
    "trace": _stage("a trace of training steps", 25, "trace"),
}
