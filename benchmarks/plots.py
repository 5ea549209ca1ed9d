"""Pictures of benchmark results: `python -m benchmarks.plots runs/bench`.

Reads the JSON files that `benchmarks.all` wrote and writes PNG files beside them, under `pictures`. What a row holds
decides how it is drawn: `curves` (loss over seconds), `points` (a figure against what was varied), `roofline` (FLOPs a
second against FLOPs a byte); without these, and beside curves, bars, one a rival, with the spread where there is one.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
#: what a bar shows, the first of these that two rivals have; otherwise the first figure that two rivals have
PREFERRED = (
    "tokens/s", "tokens_per_s", "sentences_per_s", "MB/s", "median_ms", "median_s", "total error %", "% of peak",
    "% of it",
)  # fmt: skip
COLUMNS, WIDTH, HEIGHT = 2, 7.0, 0.34
#: times the smallest figure from which on bars are drawn on a logarithmic scale
OUTLIER = 30.0
OURS_COLOUR, OTHERS_COLOUR = "#1f6fb4", "#b9bec4"


def read_results(folder: Path) -> dict[str, list[Row]]:
    """Rows by benchmark, of every result in a folder."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        if isinstance(content, dict) and "rows" in content:
            found[path.stem] = content["rows"]
    return found


def kinds(row: Row) -> list[str]:
    """How a row is drawn; a row with no figure to compare and nothing else isn't."""
    special = [name for name in ("curves", "points", "roofline") if row.get(name)]
    comparable = metric(row.get("rivals", {})) is not None and special in ([], ["curves"])
    return [*special, "bars"] if comparable else special


def metric(rivals: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The figure that bars show; None if no two rivals share one."""
    names = [name for values in rivals.values() for name, value in values.items() if is_number(value)]
    shared = [name for name in dict.fromkeys(names) if names.count(name) >= min(2, len(rivals))]
    return next((name for name in PREFERRED if name in shared), shared[0] if shared else None)


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def draw(folder: Path) -> list[Path]:
    """Write the pictures of a folder of results, and return their paths."""
    import matplotlib

    matplotlib.use("Agg")
    pictures = folder / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    written = []
    for name, rows in read_results(folder).items():
        for how, function in PAINTERS.items():
            chosen = [row for row in rows if how in kinds(row)]
            if chosen:
                path = pictures / (f"{name}.png" if how == "bars" else f"{name}_{how}.png")
                paint(chosen, function, path)
                written.append(path)
    return written


def paint(rows: Sequence[Row], function: Any, path: Path) -> None:
    """One panel a row, in two columns."""
    from matplotlib import pyplot

    columns = min(COLUMNS, len(rows))
    lines = -(-len(rows) // columns)
    tallest = max(len(row.get("rivals", {})) for row in rows)
    height = max(3.6, 1.2 + HEIGHT * tallest)
    figure, axes = pyplot.subplots(lines, columns, figsize=(WIDTH * columns, height * lines), squeeze=False)
    for axis, row in zip(axes.flat, rows, strict=False):
        function(axis, row)
        axis.set_title(wrapped(row["title"]), fontsize=9)
    for axis in list(axes.flat)[len(rows) :]:
        axis.remove()
    save(figure, path)
    pyplot.close(figure)


def save(figure: Figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def wrapped(title: str) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(title, 62))


def bars(axis: Axes, row: Row) -> None:
    """A bar a rival, the first one on top; ours stand out."""
    name = metric(row["rivals"])
    shown = {rival: values for rival, values in row["rivals"].items() if is_number(values.get(name))}
    heights = [float(values[name]) for values in shown.values()]
    errors = [
        abs(float(values.get("spread", 0.0)) * height) for values, height in zip(shown.values(), heights, strict=True)
    ]
    own = ["ours" in rival.lower() or rival.lower().startswith(("zerobert", "fused")) for rival in shown]
    colours = [OURS_COLOUR if mine or not any(own) else OTHERS_COLOUR for mine in own]
    places = range(len(shown))
    axis.barh(places, heights, xerr=errors if any(errors) else None, color=colours)
    axis.set_yticks(places, list(shown), fontsize=8)
    axis.invert_yaxis()
    if min(heights) > 0 and max(heights) > OUTLIER * min(heights):
        axis.set_xscale("log")
    axis.set_xlabel(str(name))
    axis.grid(axis="x", alpha=0.3)


def curves(axis: Axes, row: Row) -> None:
    """A line a rival: loss over seconds."""
    for name, points in row["curves"].items():
        axis.plot([seconds for seconds, _ in points], [loss for _, loss in points], label=name)
    axis.set_xlabel("seconds")
    axis.set_ylabel("loss")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)


def points(axis: Axes, row: Row) -> None:
    """The preferred figure of each point against what was varied, on doubling scales."""
    found = [one for one in row["points"] if is_number(one["x"])]
    figures = [{name: value for name, value in one.items() if name != "x"} for one in found]
    name = metric({str(index): values for index, values in enumerate(figures)})
    places = [one["x"] for one in found]
    values = [float(one[name]) for one in figures]
    errors = [abs(float(one.get("spread", 0.0)) * value) for one, value in zip(figures, values, strict=True)]
    axis.errorbar(places, values, yerr=errors, marker="o", capsize=3, color=OURS_COLOUR)
    if min(places) > 0:
        axis.set_xscale("log", base=2)
        axis.set_xticks(places, [f"{place:g}" for place in places])
        axis.minorticks_off()
    axis.set_ylim(bottom=0)
    axis.set_xlabel(str(row.get("x", "x")))
    axis.set_ylabel(str(name))
    axis.grid(alpha=0.3)


def roofline(axis: Axes, row: Row) -> None:
    """The roof, and each part of the step under it; the legend has the shares of the step, of mere passes too."""
    from matplotlib import colormaps

    peak, bandwidth = row["roofline"]["peak_flops"], row["roofline"]["memory_bandwidth"]
    ridge = peak / bandwidth
    intensities = [values["FLOP/byte"] for values in row["rivals"].values() if values["FLOP/byte"]]
    left, right = min([ridge / 20, *intensities]) / 2, ridge * 10
    axis.plot([left, ridge, right], [left * bandwidth / 1e12, peak / 1e12, peak / 1e12], color="black", linewidth=1)
    for index, (name, values) in enumerate(row["rivals"].items()):
        label = f"{name}, {values['% of step']:.1f} %"
        if not values["FLOP/byte"]:
            axis.plot([], [], " ", label=f"(passes) {label}")
            continue
        colour = "black" if name == "step" else colormaps["tab20"](index)
        height = values["GFLOP"] / values["ms"]
        axis.scatter(values["FLOP/byte"], height, s=45, color=colour, label=label, zorder=3)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("FLOP a byte of memory traffic")
    axis.set_ylabel("TFLOP/s, computed bound")
    axis.legend(fontsize=7, loc="lower right")
    axis.grid(alpha=0.3)


PAINTERS = {"bars": bars, "curves": curves, "points": points, "roofline": roofline}


def main() -> int:
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        print("usage: python -m benchmarks.plots FOLDER, a folder of results of benchmarks.all", file=sys.stderr)
        return 2
    written = draw(Path(sys.argv[1]))
    print("\n".join(map(str, written)) or f"no results in {sys.argv[1]}")
    return 0 if written else 1


if __name__ == "__main__":
    sys.exit(main())
