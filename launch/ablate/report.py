"""The report of an ablation: report.md, report.json and effects.png."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from engine.durable import write_atomically
from engine.tasks.significance import LEVEL
from launch.ablate.effects import HARMS, HELPS, UNKNOWN, Effect, as_json, effects
from launch.seeds.report import aligned, without_nan
from launch.suite.plan import Cell, finished_runs
from launch.suite.scores import name_of

#: inches of a row and a panel of the picture
ROW, PANEL = 0.24, 3.4
COLOURS = {HELPS: "tab:green", HARMS: "tab:red"}


def write_report(output: Path, cells: Sequence[Cell]) -> tuple[str, int]:
    """Write the report of an ablation's folder, whatever of it has finished.

    Returns:
        The text of report.md, and how many runs are missing.

    Raises:
        UserError: a run's report is damaged, or data has changed between runs.
    """
    found, told = effects(output, cells)
    for cell in cells:
        if finished_runs(output, cell):
            cell.record.write(output / cell.name)  # a SLURM job's elements make runs alone
    text = render(found, told)
    folder = output / "report"
    folder.mkdir(exist_ok=True)
    known = [effect for effect in found if effect.p is not None]
    if known:
        write_atomically(folder / "effects.png", picture(known))
    summary = {"level": LEVEL, "comparisons": len(found), "effects": [as_json(each) for each in found], "cells": told}
    write_atomically(folder / "report.json", json.dumps(without_nan(summary), indent=1, ensure_ascii=False) + "\n")
    write_atomically(folder / "report.md", text)
    return text, sum(len(cell["missing"]) for cell in told)


def render(found: Sequence[Effect], cells: Sequence[Mapping[str, Any]]) -> str:
    """The report as Markdown."""
    finished, missing = (sum(len(cell[part]) for cell in cells) for part in ("runs", "missing"))
    lines = [f"# {finished} of {finished + missing} runs", "", *table(found), ""]
    lines += [line for text in notes(found) for line in (f"note: {text}", "")]
    gone = [(f"{name_of(cell)}/{run}", why) for cell in cells for run, why in cell["missing"].items()]
    if gone:
        lines += ["## Missing", "", *(f"- {run}: {why or 'not run, or stopped'}" for run, why in gone), ""]
    return "\n".join(lines)


def table(found: Sequence[Effect]) -> list[str]:
    """A row a comparison."""
    several = len({each.model for each in found}) > 1
    header = ["task", *(["model"] if several else []), "examples", "switch", "score", "base", "effect", "95 %", "pairs"]
    rows = []
    for each in found:
        interval = each.interval_95
        rows.append(
            [each.task, *([each.model] if several else []), each.size, each.switch, f"{each.metric}, {each.scored_on}",
             _number(each.base), _number(each.effect, "+.4f"),
             "" if interval is None else f"{interval[0]:+.4f} to {interval[1]:+.4f}", str(len(each.differences)),
             _number(each.p, ".2g"), _number(each.p_holm, ".2g"), each.verdict]
        )  # fmt: skip
    return aligned([*header, "p", "p (Holm)", "verdict"], rows)


def notes(found: Sequence[Effect]) -> list[str]:
    """What to know about the figures."""
    least = min((len(each.differences) for each in found), default=0)
    told = [
        f"an effect is the mean, over pairs of runs with the same seed and the same training examples, of the score "
        f"with the switch minus that without; its interval and p are Student's for pairs, p (Holm) is corrected for "
        f"all {len(found)} comparisons, and the verdict is by that at {100 * LEVEL:.0f} %",
        "no difference shown is not the same as none: the interval tells which effects the runs leave possible",
    ]
    lower = sorted({each.metric for each in found if not each.higher_is_better})
    if lower:
        told.append(f"of {', '.join(lower)} a lower score is better")
    if any(each.scored_on == "validation" for each in found):
        told.append("validation examples chose the weights that they score; give test examples, or of GLUE dev: test")
    if any(each.scored_on == "fold" for each in found):
        told.append("folds share training examples, so their intervals are too narrow (Bengio and Grandvalet 2004)")
    if any(each.p is not None and each.interval_95 is None for each in found):
        told.append("where all pairs differ by the same there is no interval, and p is that of the sign test")
    if least < 3 and not all(each.verdict == UNKNOWN for each in found):
        told.append("of two pairs an interval holds for normal differences alone, and p is hardly ever small")
    return told


def picture(found: Sequence[Effect]) -> bytes:
    """A PNG with a panel a model and task: a row a size and switch, with the effect and its interval."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = [list(group) for _, group in groupby(found, key=lambda each: (each.model, each.task))]
    models = len({each.model for each in found})
    size = (2.0 + PANEL * len(groups), 1.3 + ROW * max(map(len, groups)))
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    for axes, group in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups, strict=True):
        for place, each in enumerate(group):
            colour = COLOURS.get(each.verdict, "0.4")
            if each.interval_95 is not None:
                axes.hlines(place, *each.interval_95, color=colour, linewidth=1.2)
            face = colour if each.verdict in COLOURS else "white"
            axes.scatter([each.effect], [place], color=colour, facecolor=face, s=22, zorder=3)
        axes.axvline(0.0, color="black", linewidth=0.8)
        axes.set_yticks(range(len(group)), [f"{each.switch}, {each.size}" for each in group], fontsize=7)
        axes.set_ylim(len(group) - 0.5, -0.5)
        title = group[0].task if models == 1 else f"{group[0].task}, {group[0].model}"
        lower = "" if group[0].higher_is_better else ", lower is better"
        axes.set_title(title, fontsize=9)
        axes.set_xlabel(f"change of {group[0].metric}{lower}", fontsize=8)
        axes.tick_params(axis="x", labelsize=7)
        axes.grid(axis="x", alpha=0.3)
    figure.supxlabel(
        f"line: 95 % of the mean over pairs; filled: different after Holm's correction ({len(found)} comparisons)",
        fontsize=7,
    )
    written = io.BytesIO()
    canvas.print_png(written)
    return written.getvalue()


def _number(value: float | None, form: str = ".4f") -> str:
    return "" if value is None else f"{value:{form}}"
