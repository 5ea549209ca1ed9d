"""Freed memory goes back, and what a fork shares stays shared."""

from __future__ import annotations

import gc
import re
import subprocess
import sys
from pathlib import Path

import pytest

from engine.train.heap import release_freed, share_with_forks

GLIBC = sys.platform == "linux"


def resident() -> int:
    """Bytes of this process that no file holds."""
    found = re.search(r"^RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


@pytest.mark.skipif(not GLIBC, reason="no glibc")
def test_freed_memory_goes_back_though_something_lies_behind_it() -> None:
    held = [bytearray(20_000) for _ in range(10_000)]
    last = bytearray(20_000)
    full = resident()
    held.clear()
    release_freed()
    assert full - resident() > 150e6
    assert len(last) == 20_000


FORK = """
import gc, os, sys
from pathlib import Path
from engine.train.heap import share_with_forks

objects = [{"a": [i]} for i in range(200_000)]
if sys.argv[1] == "shared":
    share_with_forks()
reader, writer = os.pipe()
child = os.fork()
if not child:
    os.close(writer)
    os.read(reader, 1)  # the parent is done
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    print(next(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty")), flush=True)
    os._exit(0)
gc.collect()
os.write(writer, b"x")
os.waitpid(child, 0)
"""


@pytest.mark.skipif(not GLIBC, reason="no /proc")
def test_a_collection_after_a_fork_leaves_shared_pages_alone() -> None:
    """How much the child holds alone, in kB: with the marks of the parent's collector it is all of the objects."""
    private = {}
    for how in ("shared", "not"):
        command = [sys.executable, "-c", FORK, how]
        private[how] = int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout)
    assert private["not"] - private["shared"] > 20_000


KEEP = """
import resource, torch
from engine.train.heap import keep_heap

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        held = [torch.ones(1 << 20) for _ in range(40)]
        del held
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep_heap()
faults()
print(faults())
"""


@pytest.mark.slow
@pytest.mark.skipif(not GLIBC, reason="no glibc")
@pytest.mark.parametrize("mine", [None, "67108864"])
def test_the_end_of_the_heap_is_kept_unless_the_environment_says_otherwise(
    mine: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_", raising=False)
    if mine is not None:
        monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", mine)
    command = [sys.executable, "-c", KEEP]
    faults = int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout)
    assert (faults < 1000) == (mine is None)


PLACES = """
import torch
from engine.train.heap import RESERVED, keep_heap

keep_heap()
held = [torch.empty(1 << 20) for _ in range(RESERVED >> 22)]
tensors = [torch.empty(1 << 20), torch.empty(1 << 24)]
heap = next(line for line in open("/proc/self/maps") if line.rstrip().endswith("[heap]"))
begin, end = (int(bound, 16) for bound in heap.split()[0].split("-"))
print(*(begin <= tensor.data_ptr() < end for tensor in tensors))
"""


@pytest.mark.slow
@pytest.mark.skipif(not GLIBC, reason="no glibc")
def test_large_buffers_stay_out_of_a_heap_beyond_its_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    """There, smaller tensors would settle in the holes that they leave, and the heap would grow step by step."""
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_", raising=False)
    command = [sys.executable, "-c", PLACES]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    assert said.split() == ["True", "False"]


HUGE = """
from engine.train.heap import RESERVED, keep_heap

keep_heap()
lines = iter(open("/proc/self/smaps"))
heap = next(line for line in lines if line.rstrip().endswith("[heap]"))
begin, end = (int(bound, 16) for bound in heap.split()[0].split("-"))
flags = next(line for line in lines if line.startswith("VmFlags:"))
print(end - begin >= RESERVED, "hg" in flags.split())
"""


@pytest.mark.skipif(not GLIBC, reason="no glibc")
@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="no huge pages in this kernel")
def test_the_heap_has_addresses_in_reserve_and_asks_for_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    said = subprocess.run([sys.executable, "-c", HUGE], capture_output=True, text=True, check=True, timeout=120).stdout
    assert said.split() == ["True", "True"]


def test_the_collector_leaves_what_is_there_alone() -> None:
    before = gc.get_freeze_count()
    share_with_forks()
    assert gc.get_freeze_count() > before
    gc.unfreeze()
