"""The CUDA kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer; and planted bugs, which
prove that the emulator and the sanitizers can fail."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from engine.kernels.cuda.nvrtc import SOURCES
from tests.cuda_emulator.emulated import HERE, SCHEDULES, compile_sources

ADDRESS = ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
THREAD = ("-O1", "-fsanitize=thread")
PLAIN = ("-O1",)


@dataclass(frozen=True)
class Bug:
    """A change to the kernels' sources, and what must be said of it."""

    file: str
    right: str
    wrong: str
    found: str
    """part of what the program prints when it fails"""
    flags: tuple[str, ...] = PLAIN
    unnoticed: tuple[str, ...] = ()
    """schedules that may miss it; every other must not"""


BARRIER = "if (lane == 0) partial[warp] = part;\n    __syncthreads();"
SUMS_BARRIER = "if (lane == 0) partial[warp] = x;\n    __syncthreads();"
TEAM_BARRIER = "partial[slot * WARPS + warp] = x;\n    __syncthreads();"
SCORES = "store_scores(part, target_logit, args);"
LATE = "store_scores(part, to_f(x[target]), args);"
TILE = "    __syncthreads();\n    const int lane = threadIdx.x % WARP, tid = threadIdx.x;"
ROWS_END = "first + group_rows < rows ? first + group_rows : rows"
LAST_LOOP = "for (int i = cut.tail + tid; i < args.classes; i += THREADS) {\n        x[i]"
BUGS = {
    "missing barrier": Bug("xent.cuh", BARRIER, BARRIER.split("\n")[0], "a result isn't finite"),
    "missing barrier, race": Bug("xent.cuh", BARRIER, BARRIER.split("\n")[0], "data race", THREAD),
    "missing barrier in a sum": Bug(
        # backwards, the first warp, whose sum is the one that's stored, happens to come last
        "common.cuh",
        SUMS_BARRIER,
        SUMS_BARRIER.split("\n")[0],
        "a result isn't finite",
        unnoticed=("reverse",),
    ),
    "divergent barrier": Bug(
        "xent.cuh", BARRIER, BARRIER.replace("__sync", "if (warp == 0) __sync"), "divergent barrier"
    ),
    "divergent barriers at two lines": Bug(
        "xent.cuh",
        BARRIER,
        BARRIER.replace("__syncthreads();", "if (warp == 0) __syncthreads();\n    else\n        __syncthreads();"),
        "divergent barrier",
    ),
    "shuffle that some lanes miss": Bug("common.cuh", "x += __shfl", "if (threadIdx.x > 3) x += __shfl", "deadlock"),
    "late read": Bug("xent.cuh", SCORES, LATE, "data race", THREAD),
    "off by one": Bug("xent.cuh", LAST_LOOP, LAST_LOOP.replace("i <", "i <="), "heap-buffer-overflow", ADDRESS),
    "off by one in shared memory": Bug(
        "common.cuh", "partial[warp] = x;", "partial[warp + 1] = x;", "heap-buffer-overflow", ADDRESS
    ),
    "missing barrier in a tile": Bug(
        "activation.cuh", TILE, TILE.split("\n")[1], "a result isn't finite", unnoticed=("reverse",)
    ),
    "missing barrier in a tile, race": Bug("activation.cuh", TILE, TILE.split("\n")[1], "data race", THREAD),
    "barrier after an early end": Bug(
        "activation.cuh", TILE, "    if (at.column >= width) return;\n" + TILE, "divergent barrier"
    ),
    "rows beyond the last": Bug("activation.cuh", ROWS_END, "first + group_rows", "heap-buffer-overflow", ADDRESS),
    "columns beyond the last": Bug(
        "activation.cuh", "    if (at.column >= width) return;\n", "", "heap-buffer-overflow", ADDRESS
    ),
    "sums that share a place": Bug(
        "activation.cuh", "(long long)at.group * width + column", "column", "a result isn't finite"
    ),
    "missing barrier of a row's sums": Bug(
        "layer_norm.cuh", TEAM_BARRIER, TEAM_BARRIER.split("\n")[0], "a result isn't finite"
    ),
    "one place for the sums of two rows, race": Bug("layer_norm.cuh", "slot ^= 1;", "", "data race", THREAD),
    "missing barrier between teams": Bug(
        # by number, each team happens to come after the one whose sums it reads
        "layer_norm.cuh",
        "        __syncthreads();\n    }\n}",
        "    }\n}",
        "a result isn't finite",
        unnoticed=("forward",),
    ),
    "off by a row": Bug("layer_norm.cuh", "if (row >= rows)", "if (row > rows)", "heap-buffer-overflow", ADDRESS),
    "off by a pack": Bug("layer_norm.cuh", "column < width", "column <= width", "heap-buffer-overflow", ADDRESS),
    "missing barrier before partial sums are read": Bug(
        "column_sum.cuh", "total;\n    __syncthreads();", "total;", "a result isn't finite"
    ),
    "undefined shift": Bug("common.cuh", "lanes = WARP / 2;", "lanes = WARP / 2 << WARP;", "shift exponent", ADDRESS),
}


def program(folder: Path, flags: tuple[str, ...], kernels: Path = SOURCES) -> Path:
    """The built `sanitize.cpp`."""
    path = folder / "sanitize"
    compile_sources(path, HERE / "sanitize.cpp", ["-DFEW_KERNELS", *flags], kernels)
    return path


def run(path: Path, schedule: str) -> tuple[int, str]:
    """Exit status and output."""
    command = [str(path), str(SCHEDULES[schedule])]
    env = os.environ | {"TSAN_OPTIONS": "halt_on_error=1"}  # one race is enough
    done = subprocess.run(command, env=env, capture_output=True, text=True, errors="replace", timeout=120)
    return done.returncode, done.stdout + done.stderr


def with_bug(folder: Path, bug: Bug) -> Path:
    """A copy of the kernels' sources with the bug in it."""
    sources = shutil.copytree(SOURCES, folder / "csrc")
    text = (sources / bug.file).read_text()
    assert text.count(bug.right) >= 1, f"the sources changed: plant {bug.right!r} elsewhere"
    (sources / bug.file).write_text(text.replace(bug.right, bug.wrong))
    return sources


@pytest.mark.parametrize(
    "flags", [pytest.param(ADDRESS, id="address and undefined", marks=pytest.mark.slow), pytest.param(PLAIN, id="none")]
)
def test_the_kernels_are_clean(flags: tuple[str, ...], tmp_path: Path) -> None:
    built = program(tmp_path, flags)
    assert [run(built, schedule) for schedule in SCHEDULES] == [(0, "")] * 3


@pytest.mark.slow
def test_the_kernels_have_no_races(tmp_path: Path) -> None:
    assert run(program(tmp_path, THREAD), "random") == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["forward", "reverse"])
def test_the_kernels_have_no_races_in_the_other_schedules(schedule: str, tmp_path: Path) -> None:
    assert run(program(tmp_path, THREAD), schedule) == (0, "")


SLOW = {
    "rows beyond the last",
    "missing barrier in a sum",
    "missing barrier, race",
    "missing barrier in a tile, race",
    "columns beyond the last",
    "sums that share a place",
    "divergent barriers at two lines",
    "off by one in shared memory",
    "one place for the sums of two rows, race",
    "missing barrier between teams",
    "missing barrier before partial sums are read",
    "off by a pack",
    "undefined shift",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in BUGS])
def test_a_planted_bug_is_found(name: str, tmp_path: Path) -> None:
    bug = BUGS[name]
    built = program(tmp_path, bug.flags, with_bug(tmp_path, bug))
    schedules = ["random"] if bug.flags == THREAD else [s for s in SCHEDULES if s not in bug.unnoticed]
    for schedule in schedules:
        status, output = run(built, schedule)
        assert status != 0, f"{schedule}: not noticed"
        assert bug.found in output, f"{schedule}: {output[:2000]}"
