"""Train 5 real steps of a tiny model with the files of ds_configs/, each through `deepspeed launch/train.py`.

Of a file only the three batch sizes are rewritten, which hold for its own number of GPUs, and the NVMe folder.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import ROOT
from engine.errors import UserError
from launch.cli import CommandParser, run_command
from launch.launcher import free_port
from launch.zero.presets import FOLDER, PRESETS

DESCRIPTION = """Train 5 real steps with the files of ds_configs/ on 2 CPU ranks.

  python -m benchmarks.presets
  python -m benchmarks.presets zero2_bf16 zero3_offload
"""
RANKS, STEPS = 2, 5
#: what the files' own batch sizes are replaced by
BATCH = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2}
#: wide enough for parts that DeepSpeed swaps: those of 1 MiB a rank
MODEL = ["--model.hidden_size=256", "--model.heads=4", "--model.layers=2", "--model.max_positions=64"]
RUN = [f"--train.steps={STEPS}", "--train.log_interval=1", "--train.eval_samples=8", "--data.sequence_length=64"]


@dataclass(frozen=True)
class Outcome:
    """How a file fared."""

    name: str
    said: str
    """trained, or the line that says why not"""
    loss: float | None
    seconds: float


def try_files(files: Sequence[Path]) -> int:
    """Train with each file on 2 CPU ranks and print a table; 0 if each trained or said in a line why it can't.

    Raises:
        UserError: a file isn't there.
    """
    for file in files:
        if not file.is_file():
            raise UserError(f"names: {file} is not there; name files of {file.parent}")
    print(f"{STEPS} steps on {RANKS} CPU ranks; {', '.join(BATCH)} and nvme_path are rewritten, nothing else")
    with tempfile.TemporaryDirectory() as folder:
        store = _prepare(Path(folder))
        outcomes = []
        for file in files:
            outcomes.append(_try(file, store, Path(folder) / file.stem))
            print(row(outcomes[-1]), flush=True)
    return int(any(one.said.startswith("failed") for one in outcomes))


def row(one: Outcome) -> str:
    """A line of the table."""
    loss = "-" if one.loss is None else f"{one.loss:.4f}"
    return f"{one.name:26} {loss:>8} {one.seconds:6.1f} s  {one.said}"


def rewritten(values: dict[str, object], nvme: Path) -> dict[str, object]:
    """The configuration for a small run on this machine."""
    values = json.loads(json.dumps(values)) | BATCH
    zero = values["zero_optimization"]
    assert isinstance(zero, dict)
    if "nvme_path" in zero.get("offload_optimizer", {}):
        zero["offload_optimizer"]["nvme_path"] = str(nvme)
    return values


def _prepare(folder: Path) -> Path:
    from engine.data.store.prepare import PrepareConfig, prepare

    store = folder / "store"
    prepare(PrepareConfig(source=["embedded"], output=str(store), vocab_size=1000, workers=0))
    return store


def _try(file: Path, store: Path, folder: Path) -> Outcome:
    from launch.curves import read_curves

    nvme, output, small = folder / "nvme", folder / "run", folder / file.name
    nvme.mkdir(parents=True)
    small.write_text(json.dumps(rewritten(json.loads(file.read_text()), nvme)))
    launcher = [sys.executable, str(Path(sys.executable).parent / "deepspeed"), "--quiet", "--num_accelerators"]
    script = str(ROOT / "launch" / "train.py")
    options = [f"--deepspeed_config={small}", f"--output={output}", f"--data.path={store}", "--data.workers=0"]
    start = time.perf_counter()
    done = subprocess.run(
        [*launcher, str(RANKS), "--master_port", str(free_port()), script, *options, *MODEL, *RUN],
        env=os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.perf_counter() - start
    if done.returncode == 0:
        curve = read_curves(output, ["train/loss"])["train/loss"]
        return Outcome(file.name, f"trained {len(curve)} steps", curve[-1][1], seconds)
    lines = (done.stderr + done.stdout).splitlines()
    why = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), None)
    said = f"refused: {why}" if why else f"failed with exit code {done.returncode}: {lines[-1] if lines else ''}"
    return Outcome(file.name, said.replace(str(folder), "..."), None, seconds)


def main(arguments: list[str]) -> int:
    """Train with the named presets, or with all."""
    parser = CommandParser(prog="python -m benchmarks.presets", description=DESCRIPTION)
    parser.add_argument("names", nargs="*", metavar="NAME", help="presets to train with; all if none is named")
    return try_files([FOLDER / f"{name}.json" for name in parser.parse_args(arguments).names or PRESETS])


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
