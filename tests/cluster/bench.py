"""A folder to submit jobs from, on a real cluster, with or without the stand-in for training."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.cluster.slurm_cluster import Cluster, wait_for
from tests.conftest import ROOT
from tests.train.runs import environment

CACHES = shutil.ignore_patterns(".*", "__pycache__")
#: for a command that runs the packages of a copy of the checkout
COMMAND = "import sys; sys.path.insert(0, sys.argv.pop(1)); from launch.__main__ import main; main()"


class Bench:
    """Runs `zerobert` commands of one copy of the code against one cluster."""

    def __init__(self, cluster: Cluster, folder: Path, *, standin: bool = True) -> None:
        self.cluster, self.folder, self.output = cluster, folder, folder / "run"
        folder.mkdir(parents=True, exist_ok=True)
        self.code = ROOT
        if standin:
            self.code = folder / "checkout"
            for name in ("engine", "launch", "slurm"):
                shutil.copytree(ROOT / name, self.code / name, ignore=CACHES)
            (self.code / "launch" / "train.py").rename(self.code / "launch" / "real_train.py")
            shutil.copy(ROOT / "tests" / "cluster" / "standin.py", self.code / "launch" / "train.py")
        self.plan(seconds=0.05)

    def plan(self, **values: object) -> None:
        """What the stand-in does."""
        (self.folder / "standin.json").write_text(json.dumps(values))

    def zerobert(self, *arguments: str, code: int = 0, **variables: str) -> str:
        """What a command prints, standard error after standard output; checks its exit code."""
        done = subprocess.run(
            [sys.executable, "-c", COMMAND, str(self.code), *arguments],
            cwd=self.folder,
            env=environment() | self.cluster.environment | variables,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def submit(self, *options: str, steps: int = 20, **variables: str) -> str:
        """Submit a job of two ranks on each of two nodes; its number."""
        size = ["--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=1", f"--output={self.output}"]
        printed = self.zerobert("submit", *size, f"--train.steps={steps}", *options, **variables)
        found = re.search(r"^job (\d+):", printed, re.MULTILINE)
        assert found is not None, printed
        return found[1]

    def status(self, run: str) -> dict[str, object]:
        return dict(json.loads(self.zerobert("status", run, "--json")))

    def log(self, job: str, name: str = "zerobert") -> str:
        path = self.output / "logs" / f"{name}-{job}.log"
        return path.read_text() if path.is_file() else ""

    def steps(self) -> list[int]:
        """The steps that were trained, in their order, over all attempts."""
        path = self.output / "steps.txt"
        return [int(line) for line in path.read_text().split()] if path.is_file() else []

    def wait_steps(self, count: int) -> None:
        wait_for(lambda: len(self.steps()) >= count, 40, f"{count} steps of {self.folder}")

    def finish(self, job: str, state: str = "COMPLETED", seconds: float = 90) -> str:
        """Wait for a job's end in a state; its log."""
        ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
        self.cluster.wait_state(job, *ends, seconds=seconds)
        assert self.cluster.state(job) == state, self.log(job)
        return self.log(job)


def slurm_environment(cluster: Cluster) -> dict[str, str]:
    """This environment with the cluster's, for SLURM's own commands."""
    return environment() | cluster.environment | {"PATH": os.environ["PATH"]}
