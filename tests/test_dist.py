"""Freed memory is kept for the next step's tensors, where the user didn't choose otherwise."""

from __future__ import annotations

import os
import resource
import subprocess
import sys

import pytest

from tests.conftest import ROOT

#: pages faulted in by ten rounds of a tensor of 64 MiB, above glibc's largest threshold of its own
CODE = """
import resource, torch
from engine import dist
dist.keep_freed_memory()
def use(): torch.empty(1 << 24).fill_(1)
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10): use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not os.confstr("CS_GNU_LIBC_VERSION"), reason="not glibc")
@pytest.mark.parametrize(("chosen", "kept"), [({}, True), ({"MALLOC_TRIM_THRESHOLD_": "131072"}, False)])
def test_freed_memory_is_kept_unless_the_user_chose(chosen: dict[str, str], kept: bool) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", CODE]
    done = subprocess.run(command, cwd=ROOT, env=environment | chosen, capture_output=True, text=True, check=True)
    every_round = 10 * (64 << 20) // resource.getpagesize()
    # Kept memory isn't met again by every allocation: glibc aligns a tensor by splitting a block.
    assert (int(done.stdout) < 0.75 * every_round) is kept
