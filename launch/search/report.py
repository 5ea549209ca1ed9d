"""What a search found: a table of its trials, the best options as a recipe, and pictures."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import yaml

from engine.durable import write_atomically
from launch.search.study import SECONDS, Study
from launch.seeds.report import aligned

#: trials of the printed table
SHOWN = 10
#: trials that a picture of importances needs
ENOUGH = 4


def write_report(study: Study) -> str:
    """Write report/report.json, report.md, best.yaml and pictures; the text of report.md."""
    folder = study.output / "report"
    folder.mkdir(parents=True, exist_ok=True)
    trials = [_trial(study, each) for each in study.study.get_trials(deepcopy=False)]
    done = [each for each in trials if each["state"] == "complete"]
    first = study.objectives[0]
    ordered = sorted(done, key=lambda each: each["results"][first.name], reverse=first.maximise)
    best = None
    if ordered:
        chosen = ordered[0]
        told = ", ".join(f"{name} {value:.4f}" for name, value in chosen["results"].items())
        best = {"number": chosen["number"], "values": chosen["values"], "told": f"trial {chosen['number']}: {told}"}
        write_atomically(folder / "best.yaml", recipe(study.output / f"trial-{chosen['number']:04d}"))
    summary = {
        "objectives": [str(each) for each in study.objectives],
        "best": best,
        "front": _front(study),
        "trials": trials,
    }
    text = render(study, ordered, trials, best)
    write_atomically(folder / "report.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    write_atomically(folder / "report.md", text)
    _draw(study, folder, len(done))
    return text


def recipe(trial: Path) -> str:
    """The configuration of a trial's run, without its place."""
    values = yaml.safe_load((trial / "config.yaml").read_text(encoding="utf-8"))
    for name in ("output", "resume"):
        values.pop(name, None)
    return yaml.safe_dump(values, sort_keys=False)


def render(study: Study, ordered: list[dict[str, Any]], trials: list[dict[str, Any]], best: Any) -> str:
    """The report as Markdown."""
    counts = {state: sum(each["state"] == state for each in trials) for state in ("complete", "pruned", "fail")}
    names = [each.name for each in study.objectives]
    fields = [each.field for each in study.space]
    rows = [
        [str(each["number"]), *(f"{each['results'][name]:.4f}" for name in names),
         *(_shown(each["values"].get(field)) for field in fields), f"{each[SECONDS]:.0f}"]
        for each in ordered[:SHOWN]
    ]  # fmt: skip
    spent = sum(each[SECONDS] for each in trials)
    told = f"{counts['complete']} finished, {counts['pruned']} ended early, {counts['fail']} failed; {spent:.0f} s"
    lines = [f"# Search: {len(trials)} trials ({told})", "", *aligned(["trial", *names, *fields, "s"], rows), ""]
    if best:
        lines.append(f"best: {best['told']}; its options are best.yaml. That score chose it, and so flatters it:")
        lines.append("train it with other seeds (--seeds N) and report the score of the test data.")
    return "\n".join(lines) + "\n"


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _trial(study: Study, frozen: Any) -> dict[str, Any]:
    names = [each.name for each in study.objectives]
    return {
        "number": frozen.number,
        "state": frozen.state.name.lower(),
        "values": dict(frozen.params),
        "results": dict(zip(names, frozen.values or (), strict=False)),
        "evaluations": {str(step): value for step, value in frozen.intermediate_values.items()},
        SECONDS: float(frozen.user_attrs.get(SECONDS, 0.0)),
        "failed": frozen.user_attrs.get("failed"),
    }


def _front(study: Study) -> list[int] | None:
    """The trials that no other is better than in all objectives; None with a single one."""
    return [each.number for each in study.study.best_trials] if len(study.objectives) > 1 else None


def _draw(study: Study, folder: Path, done: int) -> None:
    """Write history.png, parallel.png, importance.png and, of several objectives, front.png, where trials suffice."""
    import matplotlib
    import optuna

    matplotlib.use("Agg")
    from matplotlib import pyplot

    draw = optuna.visualization.matplotlib
    pictures: dict[str, Any] = {}
    if done:
        first = study.objectives[0]
        options = {} if len(study.objectives) == 1 else {"target": _first_value, "target_name": first.name}
        pictures = {"history": (draw.plot_optimization_history, options)}
        if len(study.space) > 1:
            pictures["parallel"] = (draw.plot_parallel_coordinate, options)
        if done >= ENOUGH and len(study.space) > 1:
            pictures["importance"] = (draw.plot_param_importances, options)
        if len(study.objectives) in (2, 3):
            pictures["front"] = (draw.plot_pareto_front, {"target_names": [each.name for each in study.objectives]})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna's of its own experimental functions
        for name, (plot, options) in pictures.items():
            plot(study.study, **options)
            pyplot.gcf().savefig(folder / f"{name}.png", dpi=120, bbox_inches="tight")
            pyplot.close("all")


def _first_value(trial: Any) -> float:
    value: float = trial.values[0]
    return value
