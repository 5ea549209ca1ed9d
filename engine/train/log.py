"""Messages of a run for the person who started it: lines of rank 0, above the progress bar on a terminal."""

from __future__ import annotations

import sys

from tqdm import tqdm

from engine import dist


def say(line: str) -> None:
    """Print a line on rank 0, unbuffered and without breaking the progress bar; other ranks print nothing."""
    if dist.place()[0] == 0:
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()
