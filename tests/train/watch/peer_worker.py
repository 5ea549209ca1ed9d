"""A process that looks after another one of this machine while it waits outside of Python, as in a call of CUDA.

FOLDER RANK RANKS HOW: processes meet in the folder; HOW is "blocked", or "leaves" or "lingers" for one that ends in
order once all of them look: at once, or when another would have been missed for long.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

from engine.durable import write_atomically
from engine.train.watch.peers import PeerWatch, Process, neighbours, own_process

PERIOD, GRACE = 0.2, 1.0


def gathered(folder: Path, own: Process, size: int) -> list[Process]:
    """What `engine.dist.gather_objects` does, without a process group."""
    write_atomically(folder / f"{own.rank}.json", json.dumps(asdict(own)))
    while len(files := sorted(folder.glob("?.json"))) < size:
        time.sleep(0.02)
    return [Process(**json.loads(file.read_text())) for file in files]


def main(folder: Path, rank: int, size: int, how: str) -> None:
    own = own_process(rank)
    assert own is not None
    peers = PeerWatch(lambda: (folder / f"lost-{rank}").touch(), PERIOD, GRACE)
    peers.watch(rank, neighbours(own, gathered(folder, own, size)))
    (folder / f"watching-{rank}").touch()
    if how == "blocked":
        ctypes.CDLL(None).pause()
    while len(list(folder.glob("watching-?"))) < size:
        time.sleep(0.02)
    peers.end()
    if how == "lingers":
        time.sleep(GRACE + 10 * PERIOD)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
