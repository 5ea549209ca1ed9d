"""Memory of a forward and a backward pass of ModernBERT at 1,024 to 8,192 tokens a sequence, the same tokens in all.

    python -m benchmarks.long_sequences            some two minutes
    python -m benchmarks.long_sequences --threads 2

Attention within windows keeps and needs as much a token whatever the length is; attention to the whole sequence must
keep no scores of tokens by tokens. Both are shown: with windows in all layers but the first and the last, and with
every third layer global, each with our kernels and with plain torch. The peak is what torch's CPU allocator had given
out at a time (benchmarks/allocations.c, which is preloaded and needs gcc), above what there was before the passes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import ROOT, emit

LENGTHS = (1024, 2048, 4096, 8192)
LAYERS = 7
#: by its name, every how many layers one attends to the whole sequence, from the first on
GLOBAL = {"first and last": LAYERS - 1, "every third": 3}
KERNELS = ("auto", "reference")
VOCABULARY = 1000


def peak(length: int, global_every: int, kernels: str, tokens: int) -> tuple[int, float]:
    """Bytes at the peak of the second forward and backward pass, and its loss a masked token in nats."""
    import torch

    from benchmarks.memory_forecast import Allocator
    from engine.config import ModelConfig
    from engine.kernels import dispatch
    from engine.model.build import build_config, initialise
    from engine.model.modernbert.models import ModernBertForMaskedLM

    dispatch.select(kernels)  # type: ignore[arg-type]
    config = ModelConfig("mini", "modernbert", layers=LAYERS, hidden_size=128, heads=2, global_every=global_every)
    model = ModernBertForMaskedLM(build_config(config, VOCABULARY))
    initialise(model, 0)
    generator = torch.Generator().manual_seed(0)
    masked = torch.arange(0, tokens, 7)
    batch = {
        "input_ids": torch.randint(5, VOCABULARY, (tokens,), generator=generator),
        "position_ids": torch.arange(length).repeat(tokens // length),
        "lengths": torch.full((tokens // length,), length),
        "mlm_positions": masked,
        "mlm_labels": torch.randint(5, VOCABULARY, (len(masked),), generator=generator),
    }
    allocator = Allocator(torch.device("cpu"))
    for _ in range(2):  # the first one makes the gradients and loads libraries
        allocator.take()
        loss = model(**batch, max_length=length)["mlm_loss_sum"] / len(masked)
        loss.backward()
    return allocator.take(), loss.item()


def measure(lengths: Sequence[int], global_every: int, kernels: str, tokens: int, threads: int = 1) -> dict[int, float]:
    """Peak bytes a token, by length; each in a process of its own."""
    from benchmarks.memory_forecast import counting_library

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        environment = {"LD_PRELOAD": str(counting_library(Path(folder))), "OMP_NUM_THREADS": str(threads)}
        for length in lengths:
            chosen = json.dumps([length, global_every, kernels, tokens])
            command = [sys.executable, "-m", "benchmarks.long_sequences", "--worker", chosen]
            done = subprocess.run(
                command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=True
            )
            found[length] = json.loads(done.stdout.splitlines()[-1])[0] / tokens
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens of a sequence")
    parser.add_argument("--tokens", type=int, default=max(LENGTHS), help="of a micro-batch, a multiple of all lengths")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(peak(*json.loads(args.worker))))
        return
    rows = {}
    for name, every in GLOBAL.items():
        for kernels in KERNELS:
            bytes_of = measure(args.lengths, every, kernels, args.tokens, args.threads)
            rows[f"global: {name}, {kernels}"] = {f"{length:,} tokens": found for length, found in bytes_of.items()}
    emit([{"title": "Bytes a token at the peak of a forward and backward pass", "rivals": rows}], args.json)


if __name__ == "__main__":
    main()
