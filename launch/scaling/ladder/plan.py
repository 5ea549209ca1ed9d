"""`zerobert scaling plan`: the runs of a ladder, their FLOPs, and the time that the forecast gives them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engine.config import TASKS
from engine.errors import UserError, require
from launch.cli import CommandParser
from launch.forecast.hardware import GPUS, Hardware, described_hardware, this_machine
from launch.forecast.planner import Request, duration, recipe_candidate
from launch.forecast.request import store_vocabulary
from launch.scaling.ladder.cells import Cell, Ladder, Rung, plan_ladder
from launch.scaling.ladder.reading import read_ladder

DESCRIPTION = """Tell the runs of a ladder of sizes, and write nothing.

  zerobert scaling plan launch/recipes/ladder_tiny.yaml                  this machine
  zerobert scaling plan ladder.yaml --gpu h100 --gpus 8 --price 2.5      eight GPUs at 2.5 an hour each

A ladder's file says which sizes (shapes of constant proportions), token budgets, architectures, objectives and seeds
are trained, and by which power laws of the parameters rate and batch follow. Each size and seed is trained once, to
the largest budget; smaller budgets branch off before their decay. FLOPs are matrix products with attention and heads.
"""


def build_parser() -> CommandParser:
    """The parser of the command."""
    parser = CommandParser(prog="zerobert scaling plan", description=DESCRIPTION)
    parser.add_argument("file", type=str, help="YAML file of the ladder")
    parser.add_argument("--output", type=str | None, default=None, help="folder of all runs; the file's, or runs/NAME")
    parser.add_argument("--gpu", type=str | None, default=None, help=f"{', '.join(GPUS)}; by default this machine")
    parser.add_argument("--gpus", type=int | None, default=None, help="of a run, on all nodes; 1 with gpu")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="GPUs of a node")
    parser.add_argument("--price", type=float | None, default=None, help="of a GPU and hour, for the cost")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    return parser


def main(arguments: list[str]) -> int:
    """Print the plan."""
    values = build_parser().parse_args(arguments)
    for name in ("gpus", "gpus_per_node", "price"):
        value = getattr(values, name)
        require(value is None or value > 0, name.replace("_", "-"), value, "give a positive number")
    require(values.gpus is None or values.gpu is not None, "gpus", values.gpus, "give gpu too, such as --gpu h100")
    ladder = plan_ladder(read_ladder(values.file), None if values.output is None else Path(values.output))
    precision = ladder.cells[0].config.train.precision
    if values.gpu is None:
        hardware = this_machine(precision)
    else:
        hardware = described_hardware(values.gpu, values.gpus or 1, values.gpus_per_node, None, precision)
    if values.price is not None and hardware.accelerator == "cpu":
        raise UserError(f"price: {values.price:g} is of a GPU, and this machine has none; give --gpu")
    rows = [_row(ladder, rung, hardware) for rung in ladder.rungs]
    if values.json:
        told = {"hardware": asdict(hardware), "output": str(ladder.output), "rungs": rows, "flops": ladder.flops}
        print(json.dumps(told | {"runs": [cell.member.name for cell in ladder.cells]}, indent=1))
        return 0
    print("\n".join(_told(ladder, rows, hardware, values.price)), flush=True)
    return 0


def step_seconds(cell: Cell, hardware: Hardware) -> float:
    """Seconds of an optimizer step, by the forecast.

    Raises:
        UserError: the run can't be trained on this hardware.
    """
    run = cell.config
    task = TASKS.get(run.task)
    request = Request(
        model=run.model,
        vocabulary=store_vocabulary(run.data.path) or 0,
        sequence_length=run.data.sequence_length,
        global_batch=run.train.global_batch,
        precision=run.train.precision,
        optimizer=run.optim.name,
        checkpointing="on" if run.model.activation_checkpointing else "off",
        attention="flash",
        read_share=task.read_share(run),
        tokens=None,
        run=run,
        recipe=run,
    )
    if request.global_batch % hardware.ranks:
        raise UserError(
            f"gpus: {hardware.ranks} can't share the global batch {request.global_batch} of {cell.rung.size.name}; "
            "give fewer, or a larger rules.global_batch"
        )
    found = recipe_candidate(request, hardware)
    assert found is not None
    return found.cost.seconds


def _row(ladder: Ladder, rung: Rung, hardware: Hardware) -> dict[str, Any]:
    cells = [cell for cell in ladder.cells if cell.rung == rung]
    steps = sum(rung.executed(cell.budget) for cell in cells)
    length = cells[0].config.data.sequence_length
    size = asdict(rung.size) | {"name": rung.size.name}
    return {
        "objective": rung.objective,
        "size": size,
        "parameters": rung.parameters,
        "global_batch": rung.batch,
        "learning_rate": rung.learning_rate,
        "warmup": rung.warmup,
        "budgets": [asdict(budget) | {"tokens": budget.steps * rung.batch * length} for budget in rung.budgets],
        "runs": len(cells),
        "finished": sum(cell.member.is_finished for cell in cells),
        "steps": steps,
        "flops": steps * rung.step_flops,
        "seconds": steps * step_seconds(cells[0], hardware),
    }


def _told(ladder: Ladder, rows: Sequence[dict[str, Any]], hardware: Hardware, price: float | None) -> list[str]:
    """The plan in lines."""
    lines = [f"{'size':28} {'parameters':>11} {'batch':>6} {'rate':>8} {'tokens of the budgets':>30} {'steps':>8} "
             f"{'FLOPs':>9} {'time':>13}"]  # fmt: skip
    for row in rows:
        size, budgets = row["size"], row["budgets"]
        tokens = ", ".join(f"{budget['tokens'] / 1e6:.3g}M" for budget in budgets)
        name = f"{size['architecture']}-{row['objective']}/{size['name']}"
        lines.append(
            f"{name:28} {row['parameters']:11,} {row['global_batch']:6} {row['learning_rate']:8.2g} {tokens:>30} "
            f"{row['steps']:8,} {row['flops']:9.2g} {duration(row['seconds'] / 86400):>13}"
        )
    seconds = sum(row["seconds"] for row in rows)
    finished, runs = (sum(row[name] for row in rows) for name in ("finished", "runs"))
    cost = "" if price is None else f", {seconds / 3600 * hardware.ranks * price:,.2f} at {price:g} a GPU and hour"
    lines += [
        f"{runs} runs, {finished} of them finished, {ladder.flops:.3g} FLOPs, {duration(seconds / 86400)} one after "
        f"the other on {hardware.ranks} x {hardware.name} by the forecast{cost}"
    ]
    lines.append(f"into {ladder.output}")
    return lines
