"""Running out of memory for real: the automatic micro-batch, and the report with its remedies."""

from __future__ import annotations

import re
import resource
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from engine.config import RunConfig, TrainConfig
from engine.dist import World
from engine.train.fit import cgroup_available, is_out_of_memory, longest_batch
from launch.forecast.fit import halvings, remedies
from tests.conftest import ROOT
from tests.train.runs import SMALL, environment, free_port

OPTIONS = [*SMALL, "--model.hidden_size=128", "--model.intermediate_size=512", "--train.global_batch=1024"]
#: glibc's malloc keeps address space that nothing uses: an arena a thread, and freed blocks below a threshold
ARENA = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "262144"}
SHORT = ["--train.steps=1", "--train.save_interval=null", "--train.verify_update=0"]


def small_stacks() -> None:
    """A thread's stack counts whole, though almost nothing of it is used."""
    resource.setrlimit(resource.RLIMIT_STACK, (1 << 20, resource.getrlimit(resource.RLIMIT_STACK)[1]))


def limited(
    output: Path, store: Path, *options: str, mebibytes: int = 1000, rank: int = -1, ranks: int = 1
) -> tuple[int, str]:
    """Exit code and output of a run in a process with so much memory."""
    torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", f"--master_port={free_port()}"]
    command = [
        sys.executable,
        *(torchrun if ranks > 1 else []),
        "-m",
        "tests.launch.forecast.limited",
        str(mebibytes),
        str(rank),
    ]
    run = subprocess.run(
        [*command, f"--output={output}", f"--data.path={store}", *OPTIONS, *SHORT, *options],
        cwd=ROOT, env=environment() | ARENA, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=240,
        preexec_fn=small_stacks,
    )  # fmt: skip
    return run.returncode, run.stdout


def test_auto_halves_until_it_fits(store: Path, tmp_path: Path) -> None:
    code, printed = limited(tmp_path / "run", store, "--train.micro_batch=auto")
    assert code == 0, printed
    refused = [int(size) for size in re.findall(r"auto: (\d+) doesn't fit", printed)]
    found = re.search(r"global batch 1024 = 1 x (\d+) x (\d+)", printed)
    assert found, printed
    assert refused == [1024 >> index for index in range(len(refused))]
    assert refused
    assert int(found[1]) == refused[-1] // 2
    assert int(found[1]) * int(found[2]) == 1024
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert saved["train"]["micro_batch"] == int(found[1])


@pytest.mark.slow
def test_a_rank_with_less_memory_decides_for_all(store: Path, tmp_path: Path) -> None:
    code, printed = limited(tmp_path / "run", store, "--train.micro_batch=auto", mebibytes=700, rank=1, ranks=2)
    assert code == 0, printed
    assert "auto: 512 doesn't fit" in printed
    assert re.search(r"global batch 1024 = 2 x (\d+) x (\d+)", printed)


def test_running_out_is_one_line_with_forecast_fact_and_remedy(store: Path, tmp_path: Path) -> None:
    code, printed = limited(tmp_path / "run", store, "--train.micro_batch=1024")
    assert code == 1, printed
    lines = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, printed
    assert "Traceback" not in printed
    assert re.search(
        r"out of memory on rank 0 with micro-batch 1024: the rank's peak was .+ \(forecast .+: .*activations .+\); "
        r"set train.micro_batch 512 or auto, model.activation_checkpointing true",
        lines[0],
    ), lines[0]


def test_not_even_one_sequence_fits(store: Path, tmp_path: Path) -> None:
    options = ["--train.micro_batch=auto", "--model.hidden_size=1024", "--model.layers=8", "--train.global_batch=2"]
    code, printed = limited(tmp_path / "run", store, *options, mebibytes=500)
    assert code == 1, printed
    assert "train.micro_batch: auto found that not even 1 sequence fits" in printed


@given(share=st.integers(1, 5000), data=st.data())
def test_halvings_divide_the_share_and_shrink_by_half(share: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(1, share))
    sizes = list(halvings(share, first))
    assert sizes[-1] == 1
    assert sizes[0] <= first
    assert all(share % size == 0 for size in sizes)
    assert all(after <= before // 2 for before, after in pairwise(sizes))


def test_remedies_are_those_that_are_left() -> None:
    config = RunConfig(train=TrainConfig(zero_stage=3))
    config.model.activation_checkpointing = True
    assert remedies(config, 8) == "set train.micro_batch 4 or auto, zero.offload_optimizer cpu"
    config.zero.offload_optimizer = "cpu"
    assert remedies(config, 1) == "take ranks with more memory"


def test_only_a_lack_of_memory_is_one() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 55)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_a_control_group_limits_the_memory(tmp_path: Path) -> None:
    assert cgroup_available(tmp_path) == []
    (tmp_path / "memory.current").write_text("300\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert cgroup_available(tmp_path) == []
    (tmp_path / "memory.max").write_text("1000\n")
    assert cgroup_available(tmp_path) == [700]


def test_the_trial_takes_the_longest_sequences(store: Path) -> None:
    from engine.config import DataConfig
    from engine.tasks.pretrain import Pretraining

    config = RunConfig(data=DataConfig(path=str(store), sequence_length=64))
    batch = longest_batch(Pretraining(config).train_source(), 5)
    assert batch.inputs["lengths"].tolist() == [64] * 5
    assert World().is_main
