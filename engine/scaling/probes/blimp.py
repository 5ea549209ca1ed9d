"""Minimal pairs from files of BLiMP's format (Warstadt et al. 2020): JSON lines with sentence_good and sentence_bad."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.data.labelled.files import damage_as_user_error, format_of, text_of
from engine.data.labelled.tables import Columns, json_records, place
from engine.errors import UserError
from engine.lfs import refuse_pointer
from engine.scaling.probes.templates import Pair

log = logging.getLogger(__name__)

SENTENCES = ("sentence_good", "sentence_bad")
#: what a pair is about, the first that it has; its file's name otherwise
GROUPS = ("linguistics_term", "UID")
FORMATS = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class _PairColumns(Columns):
    """The columns of a file of pairs; its other ones may be anything."""

    def fields(self) -> dict[str, str]:
        return {name: name for name in SENTENCES}

    def require(self, available: Sequence[str], place: str) -> None:
        for column in SENTENCES:
            if column not in available:
                have = ", ".join(available) or "none"
                raise UserError(f"{place}: no {column!r}; it has {have}; give JSON lines of BLiMP's format")
        super().require(available, place)

    def kept(self, available: Sequence[str]) -> Sequence[str]:
        return available


def read_pairs(paths: Sequence[Path], items: int, seed: int) -> dict[str, list[Pair]]:
    """The pairs of files, or of all such files in folders, by the name of an ability: `blimp_` and what they are about.

    Args:
        items: pairs of an ability, at most; drawn by the seed, and left in their order.

    Raises:
        UserError: nothing there, a damaged file or line, a missing sentence, or a file without pairs that differ.
    """
    found: dict[str, list[Pair]] = {}
    for path in paths:
        for file in _files(path):
            for name, pair in _read(file):
                found.setdefault(name, []).append(pair)
    return {name: _drawn(pairs, items, seed) for name, pairs in found.items()}


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise UserError(f"pairs: {path}: no such file or folder; check the path")
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    chosen = [file for file in files if file.is_file() and format_of(str(file)) in FORMATS]
    if not chosen:
        what = "no .jsonl file in it" if path.is_dir() else "not a .jsonl file"
        raise UserError(f"pairs: {path}: {what}; give JSON lines of BLiMP's format")
    return chosen


def _read(file: Path) -> list[tuple[str, Pair]]:
    refuse_pointer(file, "pairs")
    with damage_as_user_error(str(file)):
        records = list(json_records(str(file), _PairColumns("", None, "")))
    if not records:
        raise UserError(f"pairs: {file} is empty; give JSON lines of BLiMP's format")
    pairs = [_pair(record, file, place(str(file), number)) for number, record in records]
    telling = [(name, pair) for name, pair in pairs if pair.good != pair.bad]
    if not telling:
        raise UserError(f"pairs: {file}: the sentences of each pair are the same; give pairs that differ")
    if left_out := len(pairs) - len(telling):  # BLiMP itself has seven
        log.warning("%s: %d pair(s) of two equal sentences are left out", file, left_out)
    return telling


def _pair(record: Mapping[str, Any], file: Path, where: str) -> tuple[str, Pair]:
    good, bad = (text_of(record[column], column, where) for column in SENTENCES)
    group = next((record[column] for column in GROUPS if record.get(column)), file.name.partition(".")[0])
    return f"blimp_{re.sub(r'[^A-Za-z0-9]+', '_', str(group)).strip('_').lower()}", Pair(good, bad)


def _drawn(pairs: list[Pair], items: int, seed: int) -> list[Pair]:
    chosen = np.random.default_rng(seed).permutation(len(pairs))[:items]
    return [pairs[index] for index in sorted(chosen.tolist())]
