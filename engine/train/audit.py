"""The audit: which samples every optimizer step was really computed from, by hashes of the token ids.

    <output>/audit/rank-NNNNN.jsonl    one line per step of that rank

A hook on the model takes the hashes of the inputs of its forward pass, so nothing that a loader, a prefetch or a
resume may get wrong escapes it. A line is handed to the operating system before the step can be saved: whatever a
checkpoint counts as done is in the audit, also after a `kill -9` (not after a power failure: lines are not fsynced).
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import RunError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from engine.data.loading.source import Cursor

#: bytes of a sample's hash
HASH_BYTES = 12


@dataclass(frozen=True)
class Entry:
    """What one rank recorded of one optimizer step."""

    start: str
    """identifier of the start of the run, the same on all of its ranks"""
    ranks: int
    """number of ranks of that start"""
    resumed: int
    """step of the checkpoint that this start resumed from, 0 without one"""
    step: int
    consumed: int
    """samples that the run counts as consumed after the step, on all ranks"""
    samples: tuple[str, ...]
    """hash of each sample that went into the model on this rank, in order"""


@dataclass(frozen=True)
class Step:
    """An optimizer step that counts: it wasn't undone by a resume from before it."""

    start: str
    consumed: int
    samples: tuple[str, ...]
    """hashes of the samples of all ranks"""
    silent: tuple[int, ...]
    """ranks that recorded nothing, as in a step that a kill cut short"""


@dataclass
class Ledger:
    """The steps of a run over all of its starts."""

    steps: dict[int, Step] = field(default_factory=dict)
    resumed: dict[str, int] = field(default_factory=dict)
    """start -> the step that it resumed from, for each start that did a step, in order"""


def sample_hashes(input_ids: Tensor, lengths: Tensor) -> list[str]:
    """A hash for each of B sequences.

    Args:
        input_ids: [T] token ids of the packed sequences.
        lengths: [B] tokens of each sequence; their sum is T.
    """
    ids, bounds = input_ids.cpu().long().numpy(), [0, *lengths.cpu().cumsum(0).tolist()]
    assert bounds[-1] == len(ids)
    return [hashlib.blake2b(ids[i:j].tobytes(), digest_size=HASH_BYTES).hexdigest() for i, j in pairwise(bounds)]


class Audit:
    """Writes the audit of this rank, if it is asked for; on a GPU each forward pass then waits for the device."""

    def __init__(self, model: nn.Module, output: Path, resumed: int, *, enabled: bool) -> None:
        """Collective, if enabled.

        Args:
            model: called with `input_ids` and `lengths`, see `sample_hashes`.
            output: folder of the run.
            resumed: step that this start goes on from.
            enabled: whether to write anything.
        """
        self._file: int | None = None
        self._samples: list[str] = []
        self._counted = 0
        if not enabled:
            return
        from engine import dist

        rank, self._ranks = dist.place()
        self._start, self._resumed = dist.gather_objects(secrets.token_hex(6))[0], resumed
        self._path = output / "audit" / f"rank-{rank:05d}.jsonl"
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise self._failure(error) from error
        self._write(b"\n")  # ends a line that a kill may have cut
        model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, model: nn.Module, _positional: Any, inputs: Mapping[str, Any]) -> None:
        import torch

        if model.training and torch.is_grad_enabled():  # a task may look at the samples before it learns from them
            self._samples += sample_hashes(inputs["input_ids"], inputs["lengths"])

    def begin_step(self) -> None:
        """Forget the samples of a step that was abandoned."""
        self._samples, self._counted = [], 0

    def count(self, sequences: int) -> None:
        """Keep so many of the samples since the last call: those behind them went through the model once more."""
        del self._samples[self._counted + sequences :]
        self._counted = len(self._samples)

    def end_step(self, step: int, cursor: Cursor) -> None:
        """Write the samples of the step that ended.

        Args:
            step: its number, from 1.
            cursor: position after its global batch.

        Raises:
            RunError: the file can't be written.
        """
        if self._file is not None:
            entry = Entry(self._start, self._ranks, self._resumed, step, cursor.consumed, tuple(self._samples))
            self._write(json.dumps(asdict(entry)).encode() + b"\n")

    def _write(self, line: bytes) -> None:
        assert self._file is not None
        try:
            while line:
                line = line[os.write(self._file, line) :]
        except OSError as error:
            raise self._failure(error) from error

    def _failure(self, error: OSError) -> RunError:
        return RunError(f"train.audit: {self._path} can't be written ({error.strerror}); the run's audit has a gap")


def entries(text: str) -> list[Entry]:
    """The whole lines of a rank's file; one that a kill cut short is left out."""
    noted = []
    for line in text.splitlines():
        try:
            values = json.loads(line)
            noted.append(Entry(**{**values, "samples": tuple(values["samples"])}))
        except (ValueError, TypeError, KeyError):
            continue
    return noted


def read_audit(output: Path) -> Ledger:
    """The ledger of a run; empty where there is no audit."""
    files = sorted((output / "audit").glob("rank-*.jsonl"))
    return merge({int(path.stem.rsplit("-", 1)[1]): entries(path.read_text()) for path in files})


def merge(noted: Mapping[int, Sequence[Entry]]) -> Ledger:
    """Join the ranks' records: a start undoes the earlier steps that come after the checkpoint that it resumed from.

    Args:
        noted: the entries of each rank, in the order of its file. The order of the starts is that of rank 0.
    """
    ledger = Ledger()
    for start in dict.fromkeys(entry.start for entry in noted.get(0, ())):
        own = {
            rank: _last_of_each_step(noted_step for noted_step in of_rank if noted_step.start == start)
            for rank, of_rank in noted.items()
        }
        first = next(iter(own[0].values()))
        ledger.resumed[start] = first.resumed
        for step in [step for step in ledger.steps if step > first.resumed]:
            del ledger.steps[step]
        for step in sorted({step for of_rank in own.values() for step in of_rank}):
            ledger.steps[step] = _joined(step, first, own)
    return ledger


def _last_of_each_step(noted: Iterable[Entry]) -> dict[int, Entry]:
    """A rank's entries of one start by step; an entry of an earlier step, after a rollback, undoes the later ones."""
    kept: dict[int, Entry] = {}
    for entry in noted:
        while kept and next(reversed(kept)) >= entry.step:
            kept.popitem()
        kept[entry.step] = entry
    return kept


def _joined(step: int, first: Entry, own: Mapping[int, Mapping[int, Entry]]) -> Step:
    """A step of the start of `first`, joined from the records of its ranks."""
    parts = [own.get(rank, {}).get(step) for rank in range(first.ranks)]
    present = [part for part in parts if part is not None]
    samples = tuple(sample for part in present for sample in part.samples)
    consumed = present[0].consumed if present else 0
    return Step(first.start, consumed, samples, tuple(rank for rank, part in enumerate(parts) if part is None))
