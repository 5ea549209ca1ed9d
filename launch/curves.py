"""`zerobert curves`: a run's curves, read back from its TensorBoard event files."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from engine.errors import UserError
from launch.cli import CommandParser

DESCRIPTION = """A run's curves, read back from its TensorBoard event files.

  zerobert curves runs/pretrain_tiny
  zerobert curves runs/pretrain_tiny --tags train/loss eval/mlm_loss --plot loss.png
  zerobert curves runs/pretrain_tiny --tags train/loss --rows 0 --json
"""
Curve = list[tuple[int, float]]


def build_parser() -> CommandParser:
    """The parser of the command."""
    parser = CommandParser(prog="zerobert curves", description=DESCRIPTION)
    parser.add_argument("run", nargs="?", help="output folder of a run")
    parser.add_argument(
        "--tags", nargs="+", metavar="TAG", default=["train/loss"], help="curves, such as eval/mlm_loss"
    )
    parser.add_argument("--rows", type=int, default=20, help="points of a table, evenly spaced; 0 prints all")
    parser.add_argument("--json", action="store_true", help="print {tag: [[step, value], ...]}")
    parser.add_argument("--plot", type=str, default=None, help="write a picture (png, svg, pdf) instead")
    return parser


def main(arguments: list[str]) -> int:
    """Print curves as a table or JSON, or draw them."""
    values = build_parser().parse_args(arguments)
    if values.rows < 0:
        raise UserError(f"rows: {values.rows} is not allowed; give 0 or more")
    if values.plot and values.json:
        raise UserError(f"plot: {values.plot!r} and json exclude each other; give one of the two")
    if values.run is None and len(values.tags) > 1:  # it stands behind the tags
        values.run = values.tags.pop()
    if values.run is None:
        raise UserError("run: not given; give the output folder of a run")
    values.tags = named_tags(values.tags)
    curves = read_curves(Path(values.run), values.tags)
    if values.plot:
        draw(curves, Path(values.plot))
        print(f"wrote {values.plot}")
    elif values.json:
        print(json.dumps(curves))
    else:
        print(table(curves, values.rows))
    return 0


def named_tags(words: list[str]) -> list[str]:
    """The tags that a user names, each once: `a b`, `a,b` or `[a, b]`.

    Raises:
        UserError: none is named.
    """
    text = " ".join(map(str, words)).strip()
    if text.startswith("[") and text.endswith("]"):
        text = text[1:-1]
    tags = [tag.strip("'\"") for tag in text.replace(",", " ").split()]
    if not tags:
        raise UserError("tags: none is named; give some such as train/loss")
    return list(dict.fromkeys(tags))


def read_curves(run: Path, tags: list[str]) -> dict[str, Curve]:
    """Points (global step, value) of each tag; points that a restart made obsolete are left out.

    Raises:
        UserError: no event files, or a tag that the run doesn't have.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of every restart
    folder = run / "tensorboard" if (run / "tensorboard").is_dir() else run
    if not any(folder.glob("events.out.tfevents.*")):
        raise UserError(f"run: {str(run)!r} holds no TensorBoard files; give the output folder of a run")
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    known = events.Tags()["scalars"]
    for tag in tags:
        if tag not in known:
            raise UserError(f"tags: the run has no curve {tag!r}; choose from {', '.join(known)}")
    return {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in tags}


def table(curves: dict[str, Curve], rows: int) -> str:
    """Curves side by side, a row a step."""
    steps = sorted({step for curve in curves.values() for step, _ in curve})
    if rows and len(steps) > rows:
        steps = [steps[round(i * (len(steps) - 1) / max(1, rows - 1))] for i in range(rows)]
    columns = {tag: dict(curve) for tag, curve in curves.items()}
    lines = ["step".rjust(8) + "".join(tag.rjust(max(14, len(tag) + 2)) for tag in columns)]
    for step in steps:
        cells = [f"{points[step]:.6g}" if step in points else "" for points in columns.values()]
        widths = [max(14, len(tag) + 2) for tag in columns]
        lines.append(str(step).rjust(8) + "".join(c.rjust(w) for c, w in zip(cells, widths, strict=True)))
    return "\n".join(lines)


def draw(curves: dict[str, Curve], path: Path) -> None:
    """Draw curves over the global step, a panel a tag."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(curves), 1, figsize=(8, 3 * len(curves)), sharex=True, squeeze=False)
    for axis, (tag, curve) in zip(axes[:, 0], curves.items(), strict=True):
        axis.plot([step for step, _ in curve], [value for _, value in curve])
        axis.set_ylabel(tag)
        axis.grid(alpha=0.3)
    axes[-1, 0].set_xlabel("global step")
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=120)
    except ValueError as error:
        raise UserError(f"plot: {str(path)!r}: {error}; end it in .png, .svg or .pdf") from error
