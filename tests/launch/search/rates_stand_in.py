"""Stands for a training where a test is about rates: python rates_stand_in.py SCRIPT OPTIONS.

Its loss is lowest at a rate of 1e-3, and from there on grows without bound; then it waits to be ended. With --seed 13
it refuses its data; with --seed 14 its loss changes by chance alone, and it ends; with --seed 15 it stops at NaN.
"""

from __future__ import annotations

import json
import math
import random
import sys
import time
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from engine.config import OptimConfig
from engine.optim.schedule import learning_rate


def loss_of(rate: float, seed: int, noise: random.Random) -> float:
    if seed == 14:
        return 0.7 + noise.gauss(0, 0.05)
    away = math.log10(rate) + 3
    return 0.4 + 0.3 * min(1.0, away**2 / 9) + noise.gauss(0, 0.01) if away < 0 else 0.4 * 4.0 ** (2 * away)


def main() -> int:
    options = dict(argument[2:].split("=", 1) for argument in sys.argv[2:] if "=" in argument)
    output, seed, total = Path(options["output"]), int(options.get("seed", 1)), int(options["train.steps"])
    (output / "options.json").write_text(json.dumps(options))
    if seed == 13:
        print("error: labelled.train: no such file")
        return 2
    optim = OptimConfig(
        learning_rate=float(options["optim.learning_rate"]),
        schedule="range_test",
        min_ratio=float(options["optim.min_ratio"]),
        warmup=float(options["optim.warmup"]),
    )
    noise = random.Random(seed)
    writer = EventFileWriter(str(output / "tensorboard"))
    for step in range(total):
        rate = learning_rate(step, total, optim)
        loss = loss_of(rate, seed, noise)
        for tag, value in (("train/loss", loss), ("train/learning_rate", rate)):
            summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
            writer.add_event(Event(wall_time=time.time(), step=step + 1, summary=summary))
        if seed == 15 and loss > 1.0:
            writer.close()
            print("error: loss: nan at step 3 is not finite")
            return 1
        if loss > 50.0:
            writer.flush()
            time.sleep(60)
    writer.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
