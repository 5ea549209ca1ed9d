"""Start real training runs under real launchers and read their curves back."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from engine.errors import UserError
from engine.zero.nvme import check_tools
from launch.curves import Curve, read_curves
from launch.launcher import free_port
from tests.warm import SERVER, Started

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "launch" / "train.py")
BIN = Path(sys.executable).parent
#: a model of 2 layers, 32 wide, and a point of the curves at every step
SMALL = [
    "--model.hidden_size=32",
    "--model.heads=2",
    "--model.layers=2",
    "--model.max_positions=64",
    "--data.sequence_length=64",
    "--data.workers=0",
    "--optim.learning_rate=1e-3",
    "--train.log_interval=1",
    "--train.global_batch=16",
    "--train.eval_samples=16",
]
NO_DROPOUT = ["--model.hidden_dropout=0", "--model.attention_dropout=0"]


def environment() -> dict[str, str]:
    """This environment without a launcher's variables, on CPU ranks of one thread."""
    hidden = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_", "OMPI_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    return kept | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def can_swap() -> bool:
    """Whether this machine can build what offload to NVMe needs."""
    try:
        check_tools(os.environ)
    except UserError:
        return False
    return True


def command(launcher: str, ranks: int) -> list[str]:
    """The command line of a launcher, up to the script."""
    python, port = sys.executable, str(free_port())
    return {
        "python": [python],
        "deepspeed": [
            python, str(BIN / "deepspeed"), "--quiet", "--num_accelerators", str(ranks), "--master_port", port,
        ],
        "torchrun": [python, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", f"--master_port={port}"],
        "mpirun": [str(BIN / "mpirun"), "--allow-run-as-root", "--oversubscribe", "-n", str(ranks), python],
    }[launcher]  # fmt: skip


def defaults(options: Sequence[str]) -> list[str]:
    """SMALL without what the options give themselves, dimensions of a start model, and another task's length."""
    given = {option.partition("=")[0] for option in options}
    given |= {"--data.sequence_length"} if "--task" in given else set()
    dimensions = "--model." if "--model.init_from" in given else None
    names = [(option, option.partition("=")[0]) for option in SMALL]
    return [option for option, name in names if name not in given and not (dimensions and name.startswith(dimensions))]


def start(output: Path, *options: str, launcher: str = "python", ranks: int = 1) -> subprocess.Popen[str]:
    """Start a run under a real launcher in a session of its own, so that a test can kill all of its ranks."""
    arguments = [*command(launcher, ranks), SCRIPT, f"--output={output}", *defaults(options), *options]
    return subprocess.Popen(
        arguments,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def placed(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What a launcher tells a rank of its place."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in place.items()}


def start_warm(output: Path, *options: str, ranks: int = 1, script: str = SCRIPT, **variables: str) -> Started:
    """Start a run as forks of a process with all libraries, which is several times as fast, in a session of its own.

    The environment of its ranks has the variables besides.
    """
    port = free_port()
    places = [environment() | variables | (placed(rank, ranks, port) if ranks > 1 else {}) for rank in range(ranks)]
    return SERVER.start([script, f"--output={output}", *defaults(options), *options], places, Path.cwd(), joined=True)


def run(output: Path, *options: str, launcher: str | None = None, ranks: int = 1, code: int = 0) -> str:
    """Run to the end, warm without a launcher's name, check the exit code, and return what was printed."""
    if launcher is None:
        process: subprocess.Popen[str] | Started = start_warm(output, *options, ranks=ranks)
    else:
        process = start(output, *options, launcher=launcher, ranks=ranks)
    printed, _ = process.communicate(timeout=240)
    assert process.returncode == code, printed
    return printed


def execute(script: str, *arguments: str, ranks: int = 2, timeout: float = 240.0) -> subprocess.CompletedProcess[str]:
    """Run a worker of the tests, a path below the root, on ranks that are forks, as `run` does without a launcher."""
    port = free_port()
    places = [environment() | placed(rank, ranks, port) for rank in range(ranks)]
    return SERVER.run([str(ROOT / script), *arguments], places, ROOT, joined=True, timeout=timeout)


def losses(output: Path, tag: str = "train/loss") -> Curve:
    """The curve of a run, from its TensorBoard files."""
    return read_curves(output, [tag])[tag]
