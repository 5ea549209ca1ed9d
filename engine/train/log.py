"""What a run tells the person who started it: lines of rank 0, above the progress bar where a terminal shows one."""

from __future__ import annotations

import sys

from tqdm import tqdm

from engine import dist


def say(line: str) -> None:
    """Print a line on rank 0, at once and without breaking the bar; other ranks are silent."""
    if dist.place()[0] == 0:
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()
