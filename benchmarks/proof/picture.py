"""One picture of a proof: a panel for each table that has figures to compare."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.plots import bars, kinds, paint

PICTURE = "proof.png"


def draw(document: Mapping[str, Any], output: Path) -> str:
    """Write it; a line that says where it is, or why there is none."""
    if importlib.util.find_spec("matplotlib") is None:
        return "no picture: matplotlib is not installed"
    rows = [row for found in document["stages"].values() for row in found["rows"] if "bars" in kinds(row)]
    if not rows:
        return "no picture: there is nothing to compare"
    import matplotlib

    matplotlib.use("Agg")
    paint(rows, bars, output / PICTURE)
    return f"picture {output / PICTURE}"
