"""The report of a suite: report.md, report.json and scores.png."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine.durable import write_atomically
from launch.seeds.report import FEW, aligned, note, without_nan
from launch.suite.plan import Cell, finished_runs
from launch.suite.scores import name_of, summarise

PANEL_HEIGHT = 3.6
#: inches of a setting in a picture
STEP = 0.5


def write_report(output: Path, cells: Sequence[Cell]) -> tuple[str, int]:
    """Write the report of the cells of a suite's folder, whatever of them has finished.

    Returns:
        The text of report.md, and how many runs are missing.

    Raises:
        UserError: a run's report is damaged, or data has changed between runs.
    """
    summary = summarise(output, cells)
    for cell in cells:
        if finished_runs(output, cell):
            cell.record.write(output / cell.name)  # a SLURM job's elements make runs alone
    text = render(summary)
    folder = output / "report"
    folder.mkdir(exist_ok=True)
    if any(result["chosen"] for result in summary["results"]):
        write_atomically(folder / "scores.png", picture(summary))
    write_atomically(folder / "report.json", json.dumps(without_nan(summary), indent=1, ensure_ascii=False) + "\n")
    write_atomically(folder / "report.md", text)
    return text, sum(len(cell["missing"]) for cell in summary["cells"])


def render(summary: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    cells = summary["cells"]
    finished, total = (
        sum(len(cell["runs"]) for cell in cells),
        sum(len(cell["runs"]) + len(cell["missing"]) for cell in cells),
    )
    lines = [f"# {finished} of {total} runs", "", *overview(summary["results"]), ""]
    for model, average in summary["glue_average"].items():
        lines += [f"GLUE average of {model}: {_told(average)}, the mean of one score of each of its eight tasks.", ""]
    for each in summary["models"]:
        lines += [f"{each['task']}: {each['other']} against {each['best']}: {_against(each['difference'])}.", ""]
    lines += [line for text in notes(summary) for line in (f"note: {text}", "")]
    for task in dict.fromkeys(cell["task"] for cell in cells):
        lines += [f"## {task}", "", *details(summary, task), ""]
    missing = [(f"{name_of(cell)}/{run}", why) for cell in cells for run, why in cell["missing"].items()]
    if missing:
        lines += ["## Missing", "", *(f"- {run}: {why or 'not run, or stopped'}" for run, why in missing), ""]
    return "\n".join(lines)


def overview(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """A row a task and model: the setting that validation chooses, its score, and how far settings and runs spread."""
    rows = []
    for each in results:
        row = [each["task"], each["model"], f"{each['metric']}, {each['scored_on']}"]
        if each["chosen"] is None:
            rows.append([*row, "no finished run", *[""] * 6])
            continue
        settings, runs = each["of_settings"], each["of_runs"]
        rows.append(
            [
                *row, each["chosen"], *_spread(each["score"]), _number(each["validation"]["mean"]),
                f"{_number(settings['lowest_mean'])} to {_number(settings['highest_mean'])} "
                f"({each['finished_settings']})",
                f"{_number(runs['lowest'])} to {_number(runs['highest'])} ({runs['count']})",
            ]
        )  # fmt: skip
    header = ["task", "model", "score", "chosen setting", "mean", "sd", "95 % of mean", "validation"]
    return aligned([*header, "means of settings", "single runs"], rows)


def details(summary: Mapping[str, Any], task: str) -> list[str]:
    """A row a setting of a task."""
    of_model = {result["model"]: result for result in summary["results"] if result["task"] == task}
    rows = []
    for cell in (cell for cell in summary["cells"] if cell["task"] == task):
        result = of_model[cell["model"]]
        count = f"{len(cell['runs'])} of {len(cell['runs']) + len(cell['missing'])}"
        if cell["score"] is None:
            rows.append([cell["model"], cell["setting"], count, *[""] * 6])
            continue
        values = [run["score"] for run in cell["runs"].values()]
        chosen = cell["setting"] == result["chosen"]
        against = "chosen" if chosen else _against(result["against_chosen"].get(cell["setting"]))
        ends = [_number(min(values)), _number(max(values))]
        rows.append(
            [cell["model"], cell["setting"], count, *_spread(cell["score"]), " to ".join(ends),
             _number(cell["validation"]["mean"]), against]
        )  # fmt: skip
    header = ["model", "setting", "runs", "mean", "sd", "95 % of mean", "lowest to highest", "validation"]
    return aligned([*header, "against the chosen"], rows)


def _number(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.4f}"


def _spread(each: Mapping[str, Any]) -> list[str]:
    """Mean, standard deviation and interval as cells."""
    interval = each["interval_95"]
    return [
        _number(each["mean"]),
        _number(each["standard_deviation"]),
        "" if interval is None else f"{_number(interval[0])} to {_number(interval[1])}",
    ]


def _told(average: Mapping[str, Any]) -> str:
    deviation = average.get("standard_deviation")
    return _number(average["mean"]) + (f" (sd over seeds {_number(deviation)})" if deviation is not None else "")


def _against(found: Mapping[str, Any] | None) -> str:
    """A difference in words; its largest p is that of the test which doubts it most."""
    if found is None:
        return "too few runs to tell"
    p = max(test["p"] for test in found["tests"].values())
    return f"{found['difference']:+.4f}, {'different' if found['real'] else 'not different'} (p {p:.2g})"


def notes(summary: Mapping[str, Any]) -> list[str]:
    """What to know about the figures."""
    results = [result for result in summary["results"] if result["chosen"] is not None]
    found = []
    twice = [each for each in results if each["scored_on"] != "test" and each["settings"] > 1]
    if twice:
        names = ", ".join(dict.fromkeys(each["task"] for each in twice))
        found.append(
            f"of {names} the setting is chosen by the examples that its score is of, so the chosen score is too good: "
            "give test examples, or of GLUE dev: test"
        )
    counts = {len(cell["runs"]) for cell in summary["cells"] if cell["runs"]}
    if counts and min(counts) < FEW and (told := note(min(counts), None)):
        found.append(told)
    if any(each["finished_settings"] > 1 for each in results):
        found.append(
            "each setting is compared for itself: of twenty that don't differ from the chosen one is called different "
            "by chance"
        )
    return found


def picture(summary: Mapping[str, Any]) -> bytes:
    """A PNG with a panel a task: for each model and setting a dot a run, the mean and its interval."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(result["task"] for result in summary["results"] if result["chosen"]))
    models = list(dict.fromkeys(cell["model"] for cell in summary["cells"]))
    cells = {task: [cell for cell in summary["cells"] if cell["task"] == task and cell["runs"]] for task in tasks}
    widest = max(len(of_task) for of_task in cells.values())
    figure = Figure(figsize=(max(4.5, 1.5 + STEP * widest), PANEL_HEIGHT * len(tasks)), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    chosen = {(result["model"], result["task"]): result["chosen"] for result in summary["results"]}
    for axes, task in zip(figure.subplots(len(tasks), 1, squeeze=False)[:, 0], tasks, strict=True):
        for place, cell in enumerate(cells[task]):
            colour = f"C{models.index(cell['model']) % 10}"
            _strip(axes, place, cell, colour, filled=cell["setting"] == chosen[cell["model"], task])
        names = [cell["setting"] if len(models) == 1 else f"{cell['model']}, {cell['setting']}" for cell in cells[task]]
        axes.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=7)
        first = cells[task][0]
        axes.set(title=task, ylabel=f"{first['metric']} ({first['scored_on']})", xlim=(-0.6, len(names) - 0.4))
        axes.grid(axis="y", alpha=0.3)
    figure.supxlabel(
        "dots: runs; diamond: their mean, filled: chosen by validation; line: 95 % of the mean", fontsize=7
    )
    written = io.BytesIO()
    canvas.print_png(written)
    return written.getvalue()


def _strip(axes: Any, place: int, cell: Mapping[str, Any], colour: str, *, filled: bool) -> None:
    """The runs of a setting, above its place on the axis."""
    values = [run["score"] for run in cell["runs"].values()]
    spots = np.linspace(-0.2, 0.0, len(values)) if len(values) > 1 else [-0.1]
    axes.scatter(place + np.asarray(spots), values, color=colour, alpha=0.7, s=18)
    interval = cell["score"]["interval_95"]
    if interval is not None:
        axes.vlines(place + 0.2, *interval, color="black", linewidth=1)
    face = "black" if filled else "white"
    axes.scatter([place + 0.2], [cell["score"]["mean"]], marker="D", edgecolor="black", facecolor=face, s=24, zorder=3)
