"""One of the two processes of the doctor's gloo check: `python -m launch.doctor.gloo_rank HOST PORT SECONDS RANK`."""

from __future__ import annotations

import sys
from datetime import timedelta


def main(host: str, port: str, seconds: str, rank: str) -> int:
    """Join, sum the ranks' numbers, and check the sum."""
    import torch

    from engine.dist import sum_over_ranks

    torch.distributed.init_process_group(
        "gloo",
        init_method=f"tcp://{host}:{port}",
        rank=int(rank),
        world_size=2,
        timeout=timedelta(seconds=float(seconds)),
    )
    total = sum_over_ranks(torch.full((1000,), int(rank) + 1.0))
    torch.distributed.destroy_process_group()
    return 0 if bool((total == 3.0).all()) else 3


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
