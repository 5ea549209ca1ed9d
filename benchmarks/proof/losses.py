"""The losses of training at every ZeRO stage, in every precision and with both optimizers, against a CPU's."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import goal
from benchmarks.proof import materials
from benchmarks.proof.runs import Run, run_all, tail
from benchmarks.proof.stage import Report, Setting

#: largest relative difference from the CPU's fp32 losses at any step; bf16 runs of 20 steps on a CPU, of a smaller
#: vocabulary, differed by at most 5e-4; TF32 and fp16 have eight times finer steps than bf16
BOUNDS = {"fp32": 1e-3, "bf16": 5e-3, "fp16": 2e-3}
#: a loss scale that overflows in no step, so that no step is left out and all see the same data
SCALE_POWER = 10


@dataclass(frozen=True)
class Case:
    """One run."""

    stage: int
    precision: str
    optimizer: str
    launcher: str = "python"
    task: str = "pretrain"

    @property
    def name(self) -> str:
        parts = [f"zero{self.stage}", self.precision, self.optimizer]
        parts += [self.launcher] * (self.launcher != "python") + [self.task] * (self.task != "pretrain")
        return "-".join(parts)

    @property
    def reference(self) -> str:
        return self.optimizer if self.task == "pretrain" else materials.FINE_TUNING

    def options(self, folder: Path, scale: materials.Scale, scratch: Path) -> list[str]:
        """Of the run; fp16 gets a DeepSpeed JSON for its loss scale."""
        fine = self.task != "pretrain"
        base = materials.fine_tuning(folder, scale) if fine else materials.pretraining(folder, scale, self.optimizer)
        own = [f"--train.zero_stage={self.stage}", f"--train.precision={self.precision}"]
        if self.precision == "fp16":
            path = scratch / "fp16.json"
            path.write_text(json.dumps({"fp16": {"enabled": True, "initial_scale_power": SCALE_POWER}}))
            own.append(f"--deepspeed_config={path}")
        return [*base, *own]


def cases(toy: bool) -> Sequence[Case]:
    """In the order of their worth; a CPU has no fp16, and stage 0 scales no loss."""
    if toy:
        fine_tuning = Case(2, "fp32", "adamw", task="fine-tuning")
        return [Case(2, "bf16", "adamw"), Case(1, "fp32", "lamb"), Case(3, "fp32", "adamw", "deepspeed"), fine_tuning]
    bf16 = [Case(stage, "bf16", "adamw") for stage in (2, 0, 1, 3)]
    fp16 = [Case(stage, "fp16", "adamw") for stage in (2, 1, 3)]
    lamb = [Case(stage, precision, "lamb") for precision in ("bf16", "fp16") for stage in (2, 0, 1, 3)]
    others = [Case(2, "fp32", "adamw"), Case(2, "bf16", "adamw", "deepspeed")]
    others += [Case(2, "bf16", "adamw", task="fine-tuning")]
    return [*bf16, *fp16, *others, *(case for case in lamb if (case.stage, case.precision) != (0, "fp16"))]


def apart(losses: Sequence[float], reference: Sequence[float]) -> float | None:
    """The largest relative difference at any step; None where steps are missing."""
    if len(losses) != len(reference):
        return None
    return max(abs(own - true) / abs(true) for own, true in zip(losses, reference, strict=True))


def figures(run: Run, reference: Sequence[float]) -> dict[str, Any]:
    """What a run is judged by."""
    losses = [loss for _, loss in run.curve("train/loss")]
    skipped = run.curve("train/skipped_steps")
    found: dict[str, Any] = {"apart": apart(losses, reference), "seconds": run.seconds, "steps": len(losses)}
    if found["apart"] is None:
        found["failed"] = run.why or f"{len(losses)} of {len(reference)} steps"
    if skipped:
        found["skipped steps"] = skipped[-1][1]
    if losses:
        found |= {"first loss": losses[0], "last loss": losses[-1], "last loss, CPU": reference[-1]}
    return found | {"losses": losses}


def row(done: Mapping[str, tuple[Case, dict[str, Any]]], wanted: int) -> dict[str, Any]:
    """The table so far: a line a run, and a goal a precision; the curves of all."""
    goals = []
    for precision, bound in BOUNDS.items():
        of_it = [values["apart"] for case, values in done.values() if case.precision == precision]
        if of_it:
            figure = f"{precision}, largest relative difference from the CPU's losses in {len(of_it)} run(s)"
            goals.append(goal(figure, None if None in of_it else max(of_it), at_most=bound))
    rivals = {
        name: {key: value for key, value in values.items() if key != "losses" and value is not None}
        for name, (_, values) in done.items()
    }
    curves = {name: list(enumerate(values["losses"], 1)) for name, (_, values) in done.items()}
    title = "losses of seeded runs against those of fp32 on a CPU"
    return {"title": title, "rivals": rivals, "losses": curves, "wanted": wanted, "goals": goals}


def run(setting: Setting, report: Report) -> None:
    folder, scratch = Path(setting.materials), Path(setting.scratch)
    scale, references = materials.read(folder)
    chosen = {case.name: case for case in cases(setting.toy)}
    runs = {name: case.options(folder, scale, scratch) for name, case in chosen.items()}
    launchers = {name: case.launcher for name, case in chosen.items()}
    done: dict[str, tuple[Case, dict[str, Any]]] = {}
    for name, ended in run_all(runs, scratch, setting.device, at_once=2 if setting.toy else 4, launchers=launchers):
        case = chosen[name]
        done[name] = case, figures(ended, references[case.reference])
        report.put(row(done, len(chosen)))
        if ended.code:
            print(f"--- {name}")
            tail(ended)
