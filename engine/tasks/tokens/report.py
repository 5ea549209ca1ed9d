"""The final report of a token classifier: scores of entities by type, predictions as CoNLL columns and as spans."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.data.labelled.tagged.files import TaggedTexts
from engine.data.labelled.tagged.schemes import type_of
from engine.durable import write_atomically
from engine.tasks.outcomes import Numbers, interval, write_outcomes
from engine.tasks.task import Evaluation
from engine.tasks.tokens.entities import Entities, EntityCounts, Tags, count_entities, entities

#: a token that is not to be written
HIDDEN = "_"


@dataclass(frozen=True)
class TaggedPredictions:
    """What a token classifier said of texts, in the order of their file. Shapes: W words of all texts."""

    names: tuple[str, ...]
    """tags in the order of their ids"""
    texts: TaggedTexts
    truth: Tags
    """ids of tags [W]"""
    predicted: Tags
    """[W]"""

    @property
    def types(self) -> list[str]:
        """Of entities, in the order of their ids."""
        return [type_of(name) for name in self.names[1::2]]

    def entities(self) -> tuple[Entities, Entities]:
        """The true and the predicted ones."""
        counts = [len(words) for words in self.texts.words]
        begins = np.zeros(len(self.truth), dtype=np.bool_)
        begins[np.cumsum([0, *counts[:-1]])[np.array(counts) > 0]] = True
        return entities(self.truth, begins), entities(self.predicted, begins)

    def counts(self) -> EntityCounts:
        """Of entities by type."""
        return count_entities(*self.entities(), len(self.types))

    def outcomes(self) -> tuple[list[str], dict[str, Numbers]]:
        """The true tags of each text, and its counts of entities, for micro F1; see `engine.tasks.outcomes`."""
        stops = np.cumsum([len(words) for words in self.texts.words])
        tags = np.array(self.names)[self.truth]
        truth = [" ".join(own) for own in np.split(tags, stops[:-1])]
        sides = self.entities()
        found = {tuple(row) for row in sides[0].tolist()}
        right = np.array([row for row in sides[1].tolist() if tuple(row) in found], dtype=np.int64).reshape(-1, 3)
        counts = [np.searchsorted(stops, rows[:, 0], "right") for rows in (right, *sides)]
        tp, true, predicted = (np.bincount(each, minlength=len(stops)).astype(np.float64) for each in counts)
        return truth, {"f1": np.stack([tp, predicted - tp, true - tp], axis=1)}


def report(evaluation: Evaluation, folder: Path, texts: bool) -> str:
    """Write predictions.conll, predictions.jsonl, outcomes.tsv, report.json and report.txt into `folder`.

    Args:
        evaluation: of `TokenClassification.evaluate`; its record "predictions" is what the report is made of.
        folder: made where it is missing.
        texts: whether to write what the texts say, too; else each token of predictions.conll is `HIDDEN`.

    Returns:
        The text of report.txt.
    """
    predictions: TaggedPredictions = evaluation.records["predictions"]
    summary = summarise(predictions) | {"scores": evaluation.scalars}
    text = render(summary)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "predictions.conll", "\n".join(_columns(predictions, texts)))
    write_atomically(folder / "predictions.jsonl", "".join(f"{line}\n" for line in _spans(predictions, texts)))
    write_outcomes(folder, *predictions.outcomes())
    write_atomically(folder / "report.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    write_atomically(folder / "report.txt", text)
    return text


def summarise(predictions: TaggedPredictions) -> dict[str, Any]:
    """The report as plain values, ready for JSON."""
    counts = predictions.counts()
    return {
        "texts": len(predictions.texts),
        "tokens": len(predictions.truth),
        "accuracy": float((predictions.truth == predictions.predicted).mean()),
        "outside_baseline": float((predictions.truth == 0).mean()),
        "entities": counts.scores() | {"predicted": int(counts.predicted.sum())},
        "f1_interval_95": list(interval("f1", predictions.outcomes()[1]["f1"])),
        "types": {name: counts.scores(kind) for kind, name in enumerate(predictions.types)},
        "labels": list(predictions.names),
    }


def render(summary: dict[str, Any]) -> str:
    """The report as text: scores of all entities, the share of right tags, a table by type."""
    found, (low, high) = summary["entities"], summary["f1_interval_95"]
    width = max(len("micro average"), *map(len, summary["types"]))
    lines = [
        f"f1 {found['f1']:.4f} (95 % interval {low:.4f} to {high:.4f}) precision {found['precision']:.4f} "
        f"recall {found['recall']:.4f} of {found['support']} entities in {summary['texts']} texts, "
        f"{found['predicted']} predicted (exact spans of BIO tags, strict)",
        f"accuracy {summary['accuracy']:.4f} on {summary['tokens']} tokens "
        f"(always O: {summary['outside_baseline']:.4f})",
        "",
        f"{'':{width}}  precision     recall         f1    support",
    ]
    for name, row in (*summary["types"].items(), ("micro average", found)):
        scores = "".join(f"{row[score]:11.4f}" for score in ("precision", "recall", "f1"))
        lines.append(f"{name:{width}}{scores}{row['support']:11d}")
    return "\n".join(lines) + "\n"


def _columns(predictions: TaggedPredictions, shown: bool) -> Iterator[str]:
    """Token, true and predicted tag a line, an empty line behind each text; tabs and line ends as JSON escapes them."""
    texts = predictions.texts
    tags = [[predictions.names[tag] for tag in side.tolist()] for side in (predictions.truth, predictions.predicted)]
    pairs = zip(*tags, strict=True)
    for index, words in enumerate(texts.words):
        for start, stop in words:
            word = texts.texts[index][start:stop]
            token = json.dumps(word, ensure_ascii=False)[1:-1] if set(word) & set("\t\n\r") else word
            yield "\t".join((token if shown else HIDDEN, *next(pairs)))
        yield ""
    yield ""


def _spans(predictions: TaggedPredictions, shown: bool) -> Iterator[str]:
    """JSON of each text with its true and its predicted entities: [start, end, type], in characters of a raw text, else
    in tokens."""
    texts, types = predictions.texts, predictions.types
    stops = np.cumsum([len(words) for words in texts.words])
    sides = dict(zip(("true", "predicted"), predictions.entities(), strict=True))
    edges = {name: np.searchsorted(found[:, 0], [0, *stops]) for name, found in sides.items()}
    for index, words in enumerate(texts.words):
        before = stops[index] - len(words)
        record: dict[str, Any] = {"line": texts.lines[index][0]}
        if shown and texts.raw:
            record["text"] = texts.texts[index]
        elif shown:
            record["tokens"] = [texts.texts[index][start:stop] for start, stop in words]
        for name, found in sides.items():
            own = found[edges[name][index] : edges[name][index + 1]]
            record[name] = [_placed(row, before, words, texts.raw, types) for row in own]
        yield json.dumps(record, ensure_ascii=False)


def _placed(row: Entities, before: int, words: Entities, raw: bool, types: list[str]) -> list[Any]:
    first, behind = int(row[0] - before), int(row[1] - before)
    if raw:
        first, behind = int(words[first, 0]), int(words[behind - 1, 1])
    return [first, behind, types[row[2]]]
