"""LAMB's state goes through DeepSpeed's universal checkpoints, to other numbers of ranks of the same stage."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.zero_exactness import apart, reference
from tests.conftest import ROOT
from tests.train.runs import environment, free_port
from tests.zero.universal_worker import SHARES


def ranks(count: int, what: str, folder: Path, stage: int) -> None:
    launcher = ["torch.distributed.run", f"--nproc_per_node={count}", f"--master_port={free_port()}"]
    python(*launcher, "-m", "tests.zero.universal_worker", what, str(folder), str(stage))


def python(*module: str) -> None:
    command = [sys.executable, "-m", *module]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "saved", "resumed"), [(1, 2, 1), (2, 2, 1), (2, 1, 2)])
def test_a_universal_checkpoint_goes_on_as_if_nothing_had_happened(
    tmp_path: Path, stage: int, saved: int, resumed: int
) -> None:
    ranks(saved, "save", tmp_path, stage)
    convert = ["--input_folder", str(tmp_path / "saved"), "--output_folder", str(tmp_path / "universal")]
    python("deepspeed.checkpoint.ds_to_universal", *convert, "--inject_missing_state", "--num_extract_workers", "1")
    ranks(resumed, "load", tmp_path, stage)
    weights = torch.load(tmp_path / "load.pt")
    assert apart(weights, reference("lamb", SHARES, 1)) < 2e-6
