"""One report of several runs: every score of each, mean, spread and interval, as text, JSON and a picture."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine.config import TASKS
from engine.durable import write_atomically
from engine.errors import UserError
from engine.tasks.outcomes import read_outcomes, score_of
from engine.tasks.significance import mean_interval
from launch.seeds.plan import Record

#: with fewer runs the interval is told to say little
FEW = 4
#: facts of a run that differ from seed to seed where validation examples are held out, or training examples drawn
LEARNED, VALIDATION = "training examples", "validation examples"
PANEL_WIDTH, HEIGHT = 2.4, 3.2


def write_report(output: Path, record: Record) -> str:
    """Write report/report.json, report.md and scores.png of the runs in a folder, all of them finished.

    Returns:
        The text of report.md.

    Raises:
        UserError: a run's report is damaged, or its data is not that of the others.
    """
    runs = {name: read_scores(output / name) for name in record.names}
    check_alike(output, record, record.names)
    summary = summarise(record, runs)
    if record.folds is not None:
        summary["pooled"] = pooled([output / name for name in record.names])
    text = render(summary)
    folder = output / "report"
    folder.mkdir(exist_ok=True)
    write_atomically(folder / "scores.png", picture(summary))
    write_atomically(folder / "report.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    write_atomically(folder / "report.md", text)
    return text


def read_scores(run: Path) -> dict[str, float]:
    """The scores of a finished run.

    Raises:
        UserError: its report has none.
    """
    path = run / "report" / "report.json"
    try:
        scores = json.loads(path.read_text(encoding="utf-8"))["scores"]
        return {name: float("nan" if value is None else value) for name, value in scores.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: it tells no scores ({error!r}); remove {run / 'report'} and run again") from error


def check_alike(output: Path, record: Record, names: Sequence[str]) -> None:
    """Refuse finished runs whose data or base weights have changed between them, though their options are the same.

    Raises:
        UserError: names the run and the fact.
    """
    from engine.model.folder import read_origin

    drawn = {LEARNED} if record.options.get("labelled.limit") is not None else set()
    drawn |= {LEARNED, VALIDATION} if record.options.get("labelled.validation") is None else set()
    facts = {name: (read_origin(output / name / "export") or {}).get("facts") or {} for name in names}
    first = names[0]
    for name, own in facts.items():
        for fact in own.keys() & facts[first].keys() - drawn:
            if own[fact] != facts[first][fact]:
                raise UserError(
                    f"{output / name}: its {fact} are not those of {first}; a file has changed since, so move the run "
                    "away and run it again"
                )


def summarise(record: Record, runs: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """The report as plain values: the scores of each run, and of each score the mean, spread and interval."""
    names = list(next(iter(runs.values())))
    scores = {name: spread([scores[name] for scores in runs.values()]) for name in names if _in_all(name, runs)}
    higher = TASKS.get(record.task).metrics.get(record.metric, True)
    ordered = sorted(runs, key=lambda run: runs[run].get(record.metric, float("nan")), reverse=higher)
    return {
        "task": record.task,
        "metric": record.metric,
        "folds": record.folds,
        "runs": {name: dict(scores) for name, scores in runs.items()},
        "scores": scores,
        "best": ordered[0],
        "worst": ordered[-1],
        "note": note(len(runs), record.folds),
    }


def _in_all(name: str, runs: Mapping[str, Mapping[str, float]]) -> bool:
    return all(name in scores for scores in runs.values())


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation (with n - 1) and bootstrap interval of values; null where there is one value only."""
    several = len(values) > 1
    return {
        "mean": float(np.mean(values)),
        "standard_deviation": float(np.std(values, ddof=1)) if several else None,
        "interval_95": list(mean_interval(values)) if several else None,
    }


def note(runs: int, folds: int | None) -> str | None:
    """What to know about the interval; None where there is nothing."""
    if runs == 1:
        return "one run tells nothing of the spread: give more seeds"
    if folds is not None:
        return "folds share training examples, so the interval of their mean is too narrow (Bengio and Grandvalet 2004)"
    if runs < FEW:
        return (
            f"of {runs} runs an interval says little: it is the range of their scores, and holds the true mean in "
            f"{50 if runs == 2 else 75} % of all cases, not in 95 %"
        )
    return None


def pooled(runs: Sequence[Path]) -> dict[str, float]:
    """The scores of all out-of-fold examples together, of those that examples tell."""
    outcomes = [read_outcomes(run / "report") for run in runs]
    shares = {name: np.concatenate([each.scores[name] for each in outcomes]) for name in outcomes[0].scores}
    return {name: float(score_of(name, values)) for name, values in shares.items()}


def render(summary: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    names, metric = list(summary["scores"]), summary["metric"]
    rows = [[run, *(f"{scores[name]:.4f}" for name in names)] for run, scores in summary["runs"].items()]
    spreads = [summary["scores"][name] for name in names]
    rows.append(["mean", *(f"{each['mean']:.4f}" for each in spreads)])
    if len(summary["runs"]) > 1:
        rows.append(["standard deviation", *(f"{each['standard_deviation']:.4f}" for each in spreads)])
        intervals = (each["interval_95"] for each in spreads)
        rows.append(["95 % interval of the mean", *(f"{low:.4f} to {high:.4f}" for low, high in intervals)])
    if summary.get("pooled"):
        rows.append(["all folds together", *(_cell(summary["pooled"].get(name)) for name in names)])
    lines = [f"# {summary['task']}: {len(summary['runs'])} run(s)", "", *aligned(["run", *names], rows), ""]
    best, worst = summary["best"], summary["worst"]
    shown = {run: summary["runs"][run].get(metric, float("nan")) for run in (best, worst)}
    lines.append(f"best {best} ({metric} {shown[best]:.4f}), worst {worst} ({shown[worst]:.4f})")
    if summary["note"]:
        lines += ["", f"note: {summary['note']}"]
    return "\n".join(lines) + "\n"


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def without_nan(value: Any) -> Any:
    """The same values with null for what is no number."""
    if isinstance(value, dict):
        return {name: without_nan(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table whose columns are aligned as text too."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return "| " + " | ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]) + " |"

    rule = (
        "|"
        + "|".join("-" * (width + 2) if not place else "-" * (width + 1) + ":" for place, width in enumerate(widths))
        + "|"
    )
    return [line(header), rule, *map(line, rows)]


def picture(summary: Mapping[str, Any]) -> bytes:
    """A PNG with a panel a score: a dot a run, the mean and its interval."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(summary["scores"])
    figure = Figure(figsize=(max(4.0, PANEL_WIDTH * len(names)), HEIGHT), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        values = [scores[name] for scores in summary["runs"].values()]
        places = np.linspace(-0.25, 0.25, len(values)) if len(values) > 1 else [0.0]
        axes.scatter(places, values, color="tab:blue", alpha=0.7, label="run")
        each = summary["scores"][name]
        if each["interval_95"] is not None:
            low, high = each["interval_95"]
            axes.vlines(0.5, low, high, color="black", label="95 % of the mean")
        axes.scatter([0.5], [each["mean"]], color="black", marker="D", label="mean")
        axes.set(title=name, xlim=(-0.5, 0.8), xticks=[])
        axes.grid(axis="y", alpha=0.3)
    panels[0].legend(fontsize=7)
    written = io.BytesIO()
    canvas.print_png(written)
    return written.getvalue()
