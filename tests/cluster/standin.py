"""Stands in for launch/train.py in tests of the protocol: steps that take no work, the same files, signals and exits.

Everything that `zerobert submit` itself asks of launch.train is the real one. `standin.json` in the working folder
tells how long a step takes and what goes wrong.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

if __name__ != "__main__":
    from launch.real_train import *  # noqa: F403


def newest(output: Path) -> int:
    steps = [int(path.parent.name[5:]) for path in output.glob("checkpoints/step-*/state.json")]
    return max(steps, default=0)


def save(output: Path, step: int) -> None:
    folder = output / "checkpoints" / f"step-{step:06d}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "state.json").write_text("{}")


def beat(output: Path, step: int, total: int, state: str) -> None:
    values = {"time": time.time(), "step": step, "total": total, "loss": 2.5, "tokens_per_second": 1000.0}
    values |= {"restarts": int(os.environ.get("SLURM_RESTART_COUNT", "0")), "job": os.environ["SLURM_JOB_ID"]}
    values |= {"state": state, "host": os.uname().nodename, "ranks": int(os.environ["SLURM_STEP_NUM_TASKS"])}
    (output / ".heartbeat").write_text(json.dumps(values))
    (output / ".heartbeat").rename(output / "heartbeat.json")


def train(arguments: list[str]) -> int:
    import yaml

    config = yaml.safe_load(Path(arguments[arguments.index("--config") + 1]).read_text())
    plan = json.loads(Path("standin.json").read_text())
    output, total, rank = Path(config["output"]), int(config["train"]["steps"]), int(os.environ["SLURM_PROCID"])
    asked: list[int] = []
    signal.signal(signal.SIGUSR1, lambda number, frame: asked.append(number))
    start = newest(output)
    print(f"rank {rank} of {os.environ['SLURM_STEP_NUM_TASKS']} on {os.uname().nodename} {arguments} {__file__}")
    if plan.get("fail_at_once"):
        return 1
    if rank:
        while (not asked or plan.get("deaf")) and newest(output) < total:
            time.sleep(0.05)
        return 0
    for step in range(start + 1, total + 1):
        time.sleep(plan["seconds"])
        with (output / "steps.txt").open("a") as file:
            file.write(f"{step}\n")
        beat(output, step, total, "training")
        if step == plan.get("crash_at") and not start:
            save(output, step)
            return 1
        if asked and not plan.get("deaf"):
            save(output, step)
            (output / "REQUEUE").write_text(f"{step}\n")
            beat(output, step, total, "preempted")
            return 0
    save(output, total)
    beat(output, total, total, "done")
    return 0


if __name__ == "__main__":
    sys.exit(train(sys.argv[1:]))
