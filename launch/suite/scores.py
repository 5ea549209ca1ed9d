"""What the runs of a suite scored, and what is chosen and compared of it, as plain values."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.config import TASKS
from engine.errors import UserError
from engine.model.folder import read_origin
from engine.tasks.significance import paired_t
from launch.compare.command import as_json, compared_score
from launch.compare.loading import Compared, check_pair
from launch.compare.loading import read_run as read_compared
from launch.seeds.plan import is_finished
from launch.seeds.report import check_alike, read_scores, spread
from launch.slurm.sbatch import STARTED
from launch.suite.glue import GLUE
from launch.suite.plan import Cell

ERROR = re.compile(r"^(?:\d+: )?error: (.*)$")
#: tasks whose scores GLUE's average is of
AVERAGED = tuple(name for name, task in GLUE.items() if task.in_average)


@dataclass(frozen=True)
class Scored:
    """A finished run: the score that it reports, of its test examples or else of the validation examples."""

    metric: str
    score: float
    validation: float
    """the same score of the validation examples, by which its weights were chosen"""
    scores: Mapping[str, float]
    """all that it reports"""

    def __str__(self) -> str:
        same = math.isclose(self.validation, self.score, rel_tol=1e-4)
        chosen = "" if same or math.isnan(self.validation) else f" (validation {self.validation:.4f})"
        return f"{self.metric} {self.score:.4f}{chosen}"


def read_run(cell: Cell, run: Path) -> Scored:
    """What a finished run scored.

    Raises:
        UserError: its report tells no such score.
    """
    scores, metric = read_scores(run), cell.record.metric
    if metric not in scores:
        raise UserError(f"{run / 'report'}: it tells no {metric}; remove that folder and run again")
    best = (read_origin(run / "export") or {}).get("best") or {}
    value = best.get("value")
    validation = float(value) if isinstance(value, (int, float)) else scores[metric] if not tested(cell) else math.nan
    return Scored(metric, scores[metric], validation, scores)


def tested(cell: Cell) -> bool:
    """Whether the runs of a cell report on test examples, which chose nothing."""
    return cell.record.options.get("labelled.test") is not None


def log_of(run: Path) -> Path:
    """The file that has what a run of a suite printed."""
    return run.with_name(f"{run.name}.log")


def told_reason(run: Path, code: int) -> str:
    """Why a run has failed, for which its log is made to tell something."""
    reason = reason_of(run)
    if reason is None:
        reason = f"ended with exit code {code}"
        with log_of(run).open("a", encoding="utf-8") as file:
            file.write(f"error: {reason}\n")
    return reason


def reason_of(run: Path) -> str | None:
    """The last error that the log of a run's newest start tells; None where it tells none."""
    log = log_of(run)
    if not log.is_file():
        return None
    lines = log.read_text(encoding="utf-8", errors="replace").rpartition(STARTED)[2].splitlines()
    return next((found[1] for line in reversed(lines) if (found := ERROR.match(line))), None)


def summarise(output: Path, cells: Sequence[Cell]) -> dict[str, Any]:
    """The report as plain values.

    Raises:
        UserError: a run's report is damaged, or data has changed between runs.
    """
    told = [cell_summary(output, cell) for cell in cells]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for each in told:
        groups.setdefault((each["task"], each["model"]), []).append(each)
    by_name = {cell.name: cell for cell in cells}
    results = [group_summary(output, by_name, group) for group in groups.values()]
    models = list(dict.fromkeys(cell.model for cell in cells))
    return {
        "cells": told,
        "results": results,
        "models": model_differences(output, by_name, results),
        "glue_average": {model: average for model in models if (average := glue_average(model, results, told))},
    }


def cell_summary(output: Path, cell: Cell) -> dict[str, Any]:
    """A cell: the scores of its finished runs, their mean, spread and interval, and what became of the others."""
    folder = output / cell.name
    finished = [name for name in cell.record.names if is_finished(folder / name)]
    runs = {name: read_run(cell, folder / name) for name in finished}
    if finished:
        check_alike(folder, cell.record, finished)
    missing = {name: reason_of(folder / name) for name in cell.record.names if name not in runs}
    return {
        "model": cell.model,
        "task": cell.task,
        "setting": cell.setting,
        "glue": cell.glue,
        "metric": cell.record.metric,
        "scored_on": "test" if tested(cell) else "fold" if cell.record.folds else "validation",
        "runs": {
            name: {"score": run.score, "validation": run.validation, "scores": dict(run.scores)}
            for name, run in runs.items()
        },
        "score": spread([run.score for run in runs.values()]) if runs else None,
        "validation": spread([run.validation for run in runs.values()]) if runs else None,
        "missing": missing,
    }


def group_summary(output: Path, cells: Mapping[str, Cell], group: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A model on a task: the setting with the best mean validation score, what it scores, and the others beside it."""
    scored = [each for each in group if each["score"] is not None]
    first = group[0]
    result: dict[str, Any] = {name: first[name] for name in ("model", "task", "glue", "metric", "scored_on")}
    result |= {"settings": len(group), "finished_settings": len(scored), "chosen": None}
    if not scored:
        return result
    higher = is_higher_better(cells[name_of(first)])
    chosen = max(scored, key=lambda each: _worth(each["validation"]["mean"], higher))
    means = [each["score"]["mean"] for each in scored]
    values = [run["score"] for each in scored for run in each["runs"].values()]
    others = [each for each in scored if each is not chosen]
    return result | {
        "chosen": chosen["setting"],
        "score": chosen["score"],
        "validation": chosen["validation"],
        "complete": not any(each["missing"] for each in group),
        "of_settings": {"lowest_mean": min(means), "highest_mean": max(means)},
        "of_runs": {"count": len(values), "lowest": min(values), "highest": max(values)},
        "against_chosen": {
            each["setting"]: difference(output, cells[name_of(chosen)], cells[name_of(each)]) for each in others
        },
    }


def name_of(each: Mapping[str, Any]) -> str:
    """The name of a summary's cell."""
    return f"{each['model']}/{each['task']}/{each['setting']}"


def is_higher_better(cell: Cell) -> bool:
    """Whether a higher score of a cell's metric is better."""
    return TASKS.get(cell.record.task).metrics.get(cell.record.metric, True)


def _worth(value: float, higher: bool) -> float:
    return -math.inf if math.isnan(value) else value if higher else -value


def difference(output: Path, first: Cell, second: Cell) -> dict[str, Any] | None:
    """How far the runs of the second cell are above those of the first with the same seeds; None below two pairs.

    Tested over seeds, and over examples where the runs tell the score of each; "real" if all tests say so, as
    `zerobert compare` does.

    Raises:
        UserError: the two are scored on other examples.
    """
    names = [name for name in first.record.names if name in second.record.names]
    folders = [(output / first.name / name, output / second.name / name) for name in names]
    folders = [pair for pair in folders if is_finished(pair[0]) and is_finished(pair[1])]
    if len(folders) < 2:
        return None
    metric = first.record.metric
    pairs = [(read_compared(one), read_compared(other)) for one, other in folders]
    for pair in pairs:
        check_pair(*pair)
    compared = Compared(pairs, seeds=True)
    if metric in compared.measures:
        found = compared_score(metric, compared)
        tests = found["tests"]
        value, real = found["second"] - found["first"], found["real"]
    else:
        values = [[read_scores(run)[metric] for run in side] for side in zip(*folders, strict=True)]
        over_seeds = paired_t(*values)
        value, real, tests = over_seeds.value, over_seeds.real, {"paired_t": as_json(over_seeds)}
    return {"difference": value, "pairs": len(pairs), "tests": tests, "real": real}


def model_differences(
    output: Path, cells: Mapping[str, Cell], results: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Of each task with several models, how far each one's chosen setting is from that of the best model."""
    told = []
    for task in dict.fromkeys(result["task"] for result in results):
        scored = [result for result in results if result["task"] == task and result["chosen"] is not None]
        if len(scored) < 2:
            continue
        own = [cells[f"{each['model']}/{task}/{each['chosen']}"] for each in scored]
        worth = [_worth(each["score"]["mean"], is_higher_better(cell)) for each, cell in zip(scored, own, strict=True)]
        best = own[int(np.argmax(worth))]
        told += [
            {"task": task, "best": best.model, "other": cell.model, "difference": difference(output, best, cell)}
            for cell in own
            if cell is not best
        ]
    return told


def glue_average(
    model: str, results: Sequence[Mapping[str, Any]], cells: Sequence[Mapping[str, Any]]
) -> dict[str, Any] | None:
    """The mean of a model's scores on the eight tasks of GLUE, one score each; None unless all runs of them are there.

    Its spread is over seeds that all tasks have.
    """
    own = {each["glue"]: each for each in results if each["model"] == model and each["glue"] and each["chosen"]}
    if any(name not in own or not own[name]["complete"] for name in AVERAGED):
        return None
    by_name = {name_of(cell): cell for cell in cells}
    chosen = [by_name[f"{model}/{own[name]['task']}/{own[name]['chosen']}"] for name in AVERAGED]
    shared = [run for run in chosen[0]["runs"] if all(run in cell["runs"] for cell in chosen)]
    seeds = [float(np.mean([cell["runs"][run]["score"] for cell in chosen])) for run in shared]
    mean = float(np.mean([cell["score"]["mean"] for cell in chosen]))
    return {"tasks": list(AVERAGED)} | (spread(seeds) if seeds else {}) | {"mean": mean}
