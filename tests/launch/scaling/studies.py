"""Files of points of a known law, as ours and as other people write them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np

from tests.scaling.known import points

ITEMS = 500


def write_points(folder: Path, *, sizes: int = 5, budgets: int = 4, abilities: bool = False) -> Path:
    """points.csv of a ladder, with two abilities on demand: `exact`, whose jump the metric makes, and `flat`."""
    given = points(sizes=sizes, budgets=budgets, noise=0.003)
    place = np.log(given.flops / given.flops.min()) / np.log(given.flops.max() / given.flops.min())
    random = np.random.default_rng(0)
    even = 0.2 + 0.79 * place
    columns = {
        "name": given.names, "parameters": given.parameters, "tokens": given.tokens, "loss": given.losses,
        "objective": ["mlm"] * len(given), "architecture": ["bert"] * len(given),
        "acc_exact": random.binomial(ITEMS, even**20) / ITEMS, "prob_exact": np.clip(even, 0, 1),
        "acc_flat": np.zeros(len(given)),
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "points.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    if abilities:
        listed = [
            {
                "name": "exact",
                "items": ITEMS,
                "chance": 0.0,
                "discontinuous": "acc_exact",
                "continuous": ["prob_exact"],
            },
            {"name": "flat", "items": ITEMS, "chance": None, "discontinuous": "acc_flat", "continuous": []},
        ]
        (folder / "points.json").write_text(json.dumps({"abilities": listed, "date": "2026-11-29"}))
    return path
