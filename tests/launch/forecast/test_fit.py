"""Running out of memory for real: the automatic micro-batch, and the report with its remedies."""

from __future__ import annotations

import re
import resource
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from engine.config import ModelConfig, RunConfig, TrainConfig
from engine.data.loading.loader import BatchLayout
from engine.data.loading.source import Cursor
from engine.dist import World
from engine.train.checkpoint.folder import RunState
from engine.train.fit import cgroup_available, is_out_of_memory, longest_batch
from launch.forecast.fit import default_layout, halvings, remedies
from launch.forecast.hardware import GIB
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_running_out_is_one_line_with_forecast_fact_and_remedy(store: Path, tmp_path: Path) -> None:
    code, printed = limited(tmp_path / "run", store, "--train.micro_batch=1024", mebibytes=700)
    assert code == 1, printed
    lines = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, printed
    assert "Traceback" not in printed
    assert re.search(
        r"out of memory on rank 0 with micro-batch 1024: the rank's peak was .+ \(forecast .+: .*activations .+\); "
        r"set train.micro_batch 512 or auto, model.activation_checkpointing true",
        lines[0],
    ), lines[0]


@pytest.mark.slow
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


@pytest.fixture
def on_gpu(store: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., BatchLayout]:
    """The layout that a run of BERT-large with 128 tokens gets on a GPU that is only said to be there."""
    from launch.train import build_task

    def layout(gib: int = 80, start: Path | None = None, **train: Any) -> BatchLayout:
        config = RunConfig(model=ModelConfig(size="large"), train=TrainConfig(**{"global_batch": 512, **train}))
        config.data.path = str(store)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (gib * GIB, gib * GIB))
        return default_layout(config, build_task(config), start, World(device=torch.device("cuda:0")))

    return layout


def test_a_gpus_default_is_what_fits_of_so_many_tokens(on_gpu: Callable[..., BatchLayout]) -> None:
    layout = on_gpu(80, precision="bf16")
    assert (layout.micro_batch, layout.accumulation) == (128, 4)
    assert layout.reason == "the largest that divides a rank's share, up to 128 x 128 = 16,384 tokens"
    small = on_gpu(16, precision="bf16")
    assert small.micro_batch < 128
    assert re.search(r"up to the \d+ that the forecast fits into 16\.0 GiB$", small.reason)
    assert on_gpu(1).micro_batch == 1
    assert on_gpu(80, global_batch=24, precision="bf16").micro_batch == 24


def test_a_resumed_run_keeps_its_micro_batch_on_a_gpu(on_gpu: Callable[..., BatchLayout], tmp_path: Path) -> None:
    def begun(ranks: int = 1, **train: Any) -> Path:
        config = RunConfig(train=TrainConfig(**{"global_batch": 512, **train})).to_dict()
        state = RunState(step=7, cursor=Cursor(0, 7, 7), world_size=ranks, config=config, micro_batch=32)
        (tmp_path / "state.json").write_text(state.text())
        return tmp_path

    kept = on_gpu(start=begun(), precision="bf16")
    assert (kept.micro_batch, kept.accumulation) == (32, 16)
    assert kept.reason == "as in the checkpoint that the run goes on from"
    others: list[dict[str, Any]] = [{"ranks": 2}, {"micro_batch": 32}, {"global_batch": 1024}]
    for other in others:
        assert on_gpu(start=begun(**other), precision="bf16").micro_batch == 128


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
