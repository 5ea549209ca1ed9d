"""What was tried and what it cost: a table, JSON, and a picture of score against time."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.compress.quantise.latency import Latency
from engine.compress.road import BATCHES, Candidate, Wish, front
from engine.durable import write_atomically
from launch.seeds.report import aligned


def write_report(
    room: Path,
    candidates: Sequence[Candidate],
    whole: Mapping[int, Latency],
    best: Candidate,
    wish: Wish,
    told: Mapping[str, Any],
) -> str:
    """Write report.md, report.json and front.png to the folder of candidates; the text of report.md.

    Args:
        whole: times of the fp32 model in torch, by batch.
        told: what else to tell: metric, score of the model, threads, tokens, processor, what was left out.
    """
    on_front = {each.name for each in front(candidates)}
    rows = [
        [
            each.name, f"{each.score:.4f}", f"{100 * each.change.value:+.2f} [{100 * each.change.low:+.2f}, "
            f"{100 * each.change.high:+.2f}]", *(_time(each.times[batch], whole[batch]) for batch in BATCHES),
            f"{each.bytes / 1e6:.1f}", "yes" if each.name in on_front else "", "chosen" if each is best else "",
        ]
        for each in candidates
    ]  # fmt: skip
    head = [
        "model",
        told["metric"],
        "points [95 %]",
        *(f"ms at batch {batch} (p95)" for batch in BATCHES),
        "MB",
        "front",
        "",
    ]
    torch_row = [
        "fp32 in torch",
        f"{told['score']:.4f}",
        "",
        *(_time(whole[batch], None) for batch in BATCHES),
        "",
        "",
        "",
    ]
    met = wish.kept(best, whole[BATCHES[0]].median)
    lines = [
        *aligned(head, [torch_row, *rows]), "",
        f"{told['threads']} thread(s), {told['tokens']} tokens a sequence, {told['processor']}; all models in turn.",
        *(f"left out: {each}" for each in told["left_out"]),
        f"chosen: {best.name}; the target is {'met' if met else 'missed'}",
    ]  # fmt: skip
    text = "\n".join(lines) + "\n"
    write_atomically(room / "report.md", text)
    record = {
        **told,
        "target": {"speed": wish.speed, "points": wish.points, "megabytes": wish.megabytes, "met": met},
        "torch": {str(batch): {"p50": time.median, "p95": time.p95} for batch, time in whole.items()},
        "candidates": [_record(each, whole, each.name in on_front) for each in candidates],
        "chosen": best.name,
    }
    write_atomically(room / "report.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    _draw(room / "front.png", candidates, whole[BATCHES[0]], told)
    return text


def _time(time: Latency, whole: Latency | None) -> str:
    faster = "" if whole is None else f": {whole.median / time.median:.2f}x"
    return f"{time.median:.3g} ({time.p95:.3g}){faster}"


def _record(each: Candidate, whole: Mapping[int, Latency], on_front: bool) -> dict[str, Any]:
    return {
        "name": each.name,
        "folder": str(each.folder),
        "score": each.score,
        "points": {"value": 100 * each.change.value, "interval_95": [100 * each.change.low, 100 * each.change.high]},
        "bytes": each.bytes,
        "milliseconds": {str(batch): {"p50": time.median, "p95": time.p95} for batch, time in each.times.items()},
        "speed": {str(batch): each.speed(whole[batch].median, batch) for batch in BATCHES},
        "front": on_front,
    }


def _draw(path: Path, candidates: Sequence[Candidate], whole: Latency, told: Mapping[str, Any]) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    best = front(candidates)
    axes.plot([each.speed(whole.median) for each in best], [each.score for each in best], color="0.6", zorder=1)
    for each in candidates:
        place = (each.speed(whole.median), each.score)
        half = (each.change.high - each.change.low) / 2
        axes.errorbar(*place, yerr=half, fmt="o", capsize=3, zorder=2)
        axes.annotate(each.name, place, xytext=(5, 5), textcoords="offset points", fontsize=8)
    axes.axhline(told["score"], color="0.6", linestyle="--", linewidth=1)
    axes.set_xlabel("times as fast as fp32 in torch, batch 1")
    axes.set_ylabel(f"{told['metric']} (bars: 95 % of the difference)")
    axes.margins(x=0.15)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
