"""What offload to NVMe needs of a machine: a folder, room, tools; and what it leaves there."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest

from engine.errors import UserError
from engine.zero import nvme
from engine.zero.nvme import PREFIX, check_folder, check_tools, claim, remove, remove_abandoned
from engine.zero.swap import swap_of


def test_a_folder_that_can_be_written_is_made_and_left_empty(tmp_path: Path) -> None:
    check_folder(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


@pytest.mark.parametrize("path", ["/dev/null/swap", "/proc/swap"])
def test_a_folder_that_can_not_be_made_is_refused(path: str) -> None:
    with pytest.raises(
        UserError, match=f"zero.nvme_path: {path} can't be used .*; give a folder that this user can write"
    ):
        check_folder(Path(path))


@pytest.mark.parametrize(
    ("code", "remedy"),
    [(22, "no direct I/O; give a folder on a local disk"), (28, "free space there"), (13, "this user can write to")],
)
def test_a_disk_that_refuses_the_block_is_told_of_with_the_remedy(
    code: int, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_descriptor: int, _data: bytes) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(nvme.os, "write", refuse)
    with pytest.raises(UserError, match=f"{os.strerror(code)}.*{remedy}"):
        check_folder(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_too_little_room_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"GB free, and the optimizer needs 1000000\.0 GB; free space"):
        claim(tmp_path, 10**15)
    assert list(tmp_path.iterdir()) == []


def test_folders_of_live_processes_stay_and_those_of_dead_ones_go(tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(1) as other:
        dead = other.apply(claim, (tmp_path, 0))
    other.join()
    assert dead.is_dir()
    first = claim(tmp_path, 0)
    assert first.is_dir()
    assert not dead.exists()
    second = claim(tmp_path, 0)
    assert sorted(tmp_path.iterdir()) == sorted([first, second])
    remove_abandoned(first)
    assert first.is_dir()
    remove(first, os.getpid() + 1)
    assert first.is_dir()
    remove(first, os.getpid())
    remove(second, os.getpid())
    assert list(tmp_path.glob(f"{PREFIX}*")) == []


def tools(folder: Path, *names: str, compiler: str = "exit 0") -> Mapping[str, str]:
    """An environment in which only these tools are there."""
    for name in names:
        (folder / name).write_text(f"#!/bin/sh\n{compiler}\n")
        (folder / name).chmod(stat.S_IRWXU)
    return {"PATH": str(folder)}


@pytest.mark.parametrize(
    ("names", "missing"), [((), "ninja"), (("ninja",), r"c\+\+"), (("c++",), "ninja"), (("ninja", "c++"), "libaio")]
)
def test_the_missing_tool_is_named(names: tuple[str, ...], missing: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"zero.offload_optimizer: 'nvme' needs {missing}, which is not there"):
        check_tools(tools(tmp_path, *names, compiler="exit 1"))


def test_nothing_is_missing_where_the_compiler_links_libaio(tmp_path: Path) -> None:
    check_tools(tools(tmp_path, "ninja", "c++"))
    check_tools(dict(tools(tmp_path, "ninja", "own")) | {"CXX": "own -m64"})


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
def test_the_compiler_itself_is_asked_for_libaio(tmp_path: Path) -> None:
    (tmp_path / "libaio.h").write_text("#error not this one\n")
    with pytest.raises(UserError, match="needs libaio"):
        check_tools(dict(os.environ) | {"CFLAGS": f"-I{tmp_path}"})


def wrapper(kind: str, buffers: int) -> SimpleNamespace:
    swapper = type(kind, (), {"swap_config": SimpleNamespace(buffer_count=buffers)})()
    return SimpleNamespace(
        optimizer_swapper=swapper,
        fp16_partitioned_groups_flat_numel=[10, 400_000],
        _swappable_optimizer_subgroup=lambda index: index == 1,
    )


def test_a_small_sub_group_stays_in_memory() -> None:
    given = wrapper("PartitionedOptimizerSwapper", 4)
    assert swap_of(given, 0) is None
    swap = swap_of(given, 1)
    assert swap is not None
    assert (swap.sub_group, swap.numel) == (1, 400_000)


@pytest.mark.parametrize(
    ("kind", "buffers", "said"),
    [
        ("PipelinedOptimizerSwapper", 4, "pipeline_read and pipeline_write aren't supported; set both to false"),
        ("PartitionedOptimizerSwapper", 3, "buffer_count: 3 is too few .*; give 4"),
    ],
)
def test_other_ways_to_swap_are_refused(kind: str, buffers: int, said: str) -> None:
    with pytest.raises(UserError, match=said):
        swap_of(wrapper(kind, buffers), 1)
