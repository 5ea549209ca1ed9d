"""Save and resume in deterministic mode: what a resumed run computes has the bits of the undisturbed one."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import goal
from benchmarks.proof import materials
from benchmarks.proof.runs import Run, run_all, tail
from benchmarks.proof.stage import Report, Setting
from engine.durable import sha256_of

STEPS, SAVED = 6, 3
#: what is compared at every step after the checkpoint
TAGS = ("train/loss", "train/mlm_loss", "train/grad_norm")
WEIGHTS = Path("export") / "model.safetensors"


def options(folder: Path, scale: materials.Scale, stage: int, precision: str, optimizer: str) -> list[str]:
    """Of a run with dropout on, all of whose algorithms are deterministic."""
    base = [option for option in materials.pretraining(folder, scale, optimizer) if "dropout" not in option]
    own = {"train.zero_stage": stage, "train.precision": precision, "train.steps": STEPS}
    own |= {"train.save_interval": SAVED, "train.deterministic": "true"}
    kept = [option for option in base if option.partition("=")[0].removeprefix("--") not in own]
    return [*kept, *(f"--{name}={value}" for name, value in own.items())]


def cut_back(whole: Path, copy: Path) -> None:
    """A copy of a finished run as it was when its first checkpoint had just been written."""
    copy.mkdir()
    name = f"step-{SAVED:06d}"
    shutil.copytree(whole / "checkpoints" / name, copy / "checkpoints" / name)


def differing(whole: Run, resumed: Run) -> dict[str, Any]:
    """How many points of the curves after the checkpoint differ in any bit, and whether the weights do."""
    points, expected = 0, 0
    for tag in TAGS:
        true = [point for point in whole.curve(tag) if point[0] > SAVED]
        own = dict(point for point in resumed.curve(tag) if point[0] > SAVED)
        expected += len(true)
        points += sum(own.get(step) != value for step, value in true)
    same = sha256_of(whole.output / WEIGHTS) == sha256_of(resumed.output / WEIGHTS)
    return {"points that differ": points, "points": expected, "weights": "same bits" if same else "differ"}


def row(rivals: dict[str, dict[str, Any]]) -> dict[str, Any]:
    wrong = sum(
        values.get("points that differ", 1) + (values.get("weights") != "same bits") + (values.get("points") == 0)
        for values in rivals.values()
    )
    held = goal("points and weights that differ after a resume", float(wrong), at_most=0)
    title = f"{STEPS} steps against {SAVED}, a new process, and the rest, deterministic"
    return {"title": title, "rivals": rivals, "goals": [held]}


def cases(toy: bool) -> Sequence[tuple[int, str, str]]:
    """ZeRO stage, precision, optimizer."""
    return [(2, "bf16", "adamw")] if toy else [(2, "bf16", "adamw"), (3, "bf16", "lamb"), (1, "fp32", "adamw")]


def run(setting: Setting, report: Report) -> None:
    folder, scratch = Path(setting.materials), Path(setting.scratch)
    scale, _ = materials.read(folder)
    runs = {f"zero{case[0]}-{case[1]}-{case[2]}": options(folder, scale, *case) for case in cases(setting.toy)}
    whole: dict[str, Run] = {}
    rivals: dict[str, dict[str, Any]] = {}
    for name, ended in run_all(runs, scratch, setting.device, at_once=3):
        whole[name] = ended
        if ended.code:
            rivals[name] = {"failed": ended.why}
            tail(ended)
    resumed = {f"{name}-resumed": [*runs[name], "--resume=auto"] for name, ended in whole.items() if not ended.code}
    for name in resumed:
        cut_back(scratch / name.removesuffix("-resumed"), scratch / name)
    for name, ended in run_all(resumed, scratch, setting.device, at_once=3):
        first = name.removesuffix("-resumed")
        rivals[first] = {"failed": ended.why} if ended.code else differing(whole[first], ended)
        report.put(row(rivals))
        if ended.code:
            tail(ended)
    report.put(row(rivals))
