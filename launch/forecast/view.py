"""A plan for people: the table, the reason, and a picture of the memory."""

from __future__ import annotations

from pathlib import Path

from engine.errors import UserError
from launch.forecast.hardware import GIB, Hardware, compared, digits_between, readable
from launch.forecast.planner import Candidate, Request, options_for, reason, recipe_verdict
from launch.forecast.workload import Workload

#: a colour-blind safe order (Okabe and Ito 2008)
COLOURS = ("#0072B2", "#56B4E9", "#009E73", "#F0E442", "#E69F00", "#D55E00", "#CC79A7", "#999999")


def columns(rows: list[list[str]]) -> list[str]:
    """Lines of left-aligned first and right-aligned other columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def memory_table(rows: list[Candidate], memory: int) -> list[str]:
    """Bytes a rank by kind, in GiB, with digits enough to tell each total from the `memory` that there is."""
    digits = digits_between([(row.memory.total, memory) for row in rows], GIB, 2)
    kinds = list(rows[0].memory.kinds())
    table = [["GiB a rank", *kinds, "total", "host", "fits"]]
    for row in rows:
        sizes = [*row.memory.kinds().values(), row.memory.total, row.memory.host]
        table.append([row.name, *(f"{size / GIB:.{digits}f}" for size in sizes), "yes" if row.fits else "no"])
    return columns(table)


def cost_table(request: Request, rows: list[Candidate]) -> list[str]:
    """What a step costs, of the candidates that fit."""
    table = [["an optimizer step", "micro x acc", "recompute", "sends", "exposed", "step", "tokens/s", "days"]]
    for row in (row for row in rows if row.fits):
        days = row.days(request)
        table.append(
            [
                row.name,
                f"{row.work.micro_batch} x {row.accumulation}",
                "yes" if row.work.activation_checkpointing else "no",
                readable(row.cost.communication),
                f"{row.cost.exposed_seconds:.3f} s",
                f"{row.cost.seconds:.3f} s",
                f"{row.tokens_per_second(request):,.0f}",
                "?" if days is None else f"{days:.2f}" if days >= 0.1 else f"{days:.2g}",
            ]
        )
    return columns(table) if len(table) > 1 else []


def render(
    request: Request,
    hardware: Hardware,
    rows: list[Candidate],
    chosen: Candidate | None,
    own: Candidate | None = None,
    config: str | None = None,
) -> str:
    """The whole plan as text.

    Args:
        own: what the recipe itself chooses.
        config: the recipe's file.
    """
    work = rows[0].work
    every = [*rows, *([] if own is None else [own])]
    closest = min((row.memory.total for row in every), key=lambda total: abs(total - hardware.memory))
    costs = cost_table(request, every)
    lines = [
        f"{work.parameters / 1e6:,.1f} M parameters{trained(work)}, {request.sequence_length} tokens, global batch "
        f"{request.global_batch}, {request.precision}, {request.optimizer}{length(request)}",
        f"{hardware.ranks} x {hardware.name} with {compared(closest, hardware.memory)[1]}, "
        f"{hardware.ranks_per_node} a node",
        "",
        *memory_table(every, hardware.memory),
        *(["", *costs] if costs else []),
        "",
        reason(request, chosen, rows, hardware),
    ]
    if own is not None:
        verdict = recipe_verdict(own, chosen, request, hardware)
        lines.append(verdict[0].upper() + verdict[1:])
    lines += [f"note: {note}" for note in request.notes]
    if chosen is not None:
        recipe = "" if config is None else f"--config {config} "
        lines.append(f"launch/train.py {recipe}{options_for(request, chosen)}")
    return "\n".join([*lines, "", assumptions(request, hardware, chosen or rows[0])])


def trained(work: Workload) -> str:
    """Which share of the parameters is trained, if not all."""
    return "" if work.trained is None else f", {work.trained_parameters / work.parameters:.2%} of them trained"


def length(request: Request) -> str:
    """How long the training is."""
    return "" if request.steps is None else f", {request.steps:,.0f} steps"


def assumptions(request: Request, hardware: Hardware, row: Candidate) -> str:
    """What the predicted times stand on, those of the passes for one candidate."""
    tokens = "" if request.tokens is None else f", {request.tokens:.3g} tokens in all"
    derived = f" (derived from the roofline: limited by {row.cost.limit})" if row.cost.limit else ""
    return (
        f"Predicted, not measured: {row.cost.utilisation:.0%} of {hardware.peak_flops / 1e12:.3g} TFLOP/s{derived}, "
        f"memory {hardware.memory_bandwidth / 1e9:,.0f} GB/s, links {hardware.link_bandwidth / 1e9:,.0f} GB/s, network "
        f"{hardware.network_bandwidth / 1e9:,.0f} GB/s a node{tokens}."
    )


def plot(request: Request, hardware: Hardware, rows: list[Candidate], chosen: Candidate | None, path: Path) -> None:
    """Stacked bars: bytes a rank by kind for every candidate, with the GPU's memory as a line.

    Raises:
        UserError: the picture can't be written there.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 0.55 * len(rows) + 2.2))
    left = [0.0] * len(rows)
    places = list(range(len(rows)))[::-1]
    for kind, colour in zip(rows[0].memory.kinds(), COLOURS, strict=False):
        sizes = [row.memory.kinds()[kind] / GIB for row in rows]
        axes.barh(places, sizes, left=left, color=colour, label=kind, edgecolor="white", linewidth=0.5)
        left = [start + size for start, size in zip(left, sizes, strict=True)]
    axes.axvline(hardware.memory / GIB, color="black", linestyle="--", linewidth=1)
    axes.annotate(" memory", (hardware.memory / GIB, max(places) + 0.45), fontsize=8, va="bottom")
    axes.set_yticks(places, [_label(row, row is chosen) for row in rows], fontsize=8)
    axes.set_xlabel("GiB a rank (forecast)")
    axes.set_title(
        f"{rows[0].work.shape.parameters() / 1e6:,.0f} M parameters, {request.sequence_length} tokens, "
        f"{hardware.ranks} x {readable(hardware.memory)}",
        fontsize=10,
    )
    axes.legend(fontsize=7, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.18), frameon=False)
    try:
        figure.savefig(path, dpi=150, bbox_inches="tight")
    except (OSError, ValueError) as error:
        raise UserError(f"plot: {str(path)!r} can't be written ({error}); give a .png, .svg or .pdf file") from error
    finally:
        pyplot.close(figure)


def _label(row: Candidate, chosen: bool) -> str:
    mark = "▶ " if chosen else ""
    state = "" if row.fits else " (no)"
    return f"{mark}{row.name}, {row.work.micro_batch} x {row.accumulation}{state}"
