"""The training command in a process whose memory really ends.

`python -m tests.launch.forecast.limited MIB RANK options...`:
Rank RANK, or every rank with -1, gets MIB of address space beyond what its libraries take, so that torch's allocator
fails as it does on a full machine.
"""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

from engine.zero.quiet import import_deepspeed, silence_libraries
from launch.cli import run_command
from launch.train import main

if __name__ == "__main__":
    mebibytes, limited, *options = sys.argv[1:]
    silence_libraries()
    import_deepspeed()
    if limited in ("-1", os.environ.get("RANK", "0")):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        size = pages * resource.getpagesize() + (int(mebibytes) << 20)
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
    run_command(main, options)
