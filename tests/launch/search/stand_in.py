"""Stands for a training where a test is about what searches over it: python stand_in.py SCRIPT OPTIONS.

Its accuracy is best at a rate of 1e-3. With train.keep above 3 it is slow, and tells its evaluations as it goes; with
--seed 13 it fails; with --seed 14 it trains at another rate than it was given. Each start appends to starts.txt.
"""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path

import yaml
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter


def main() -> int:
    options = dict(argument[2:].split("=", 1) for argument in sys.argv[2:] if "=" in argument)
    output, rate = Path(options["output"]), float(options["optim.learning_rate"])
    with (output / "starts.txt").open("a") as file:
        file.write(json.dumps(options) + "\n")
    if options.get("seed") == "13":
        print("error: labelled.train: no such file")
        return 2
    trained = 0.5 if options.get("seed") == "14" else rate
    optim = {"learning_rate": trained, "schedule": options.get("optim.schedule", "linear")}
    (output / "config.yaml").write_text(yaml.safe_dump({"optim": optim, "task": "sequence_classification"}))
    accuracy = 1 / (1 + abs(math.log10(rate) + 3))
    writer = EventFileWriter(str(output / "tensorboard"))
    for step in range(1, 6):
        for tag, value in (("eval/accuracy", accuracy * step / 5), ("train/learning_rate", trained)):
            summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
            writer.add_event(Event(wall_time=time.time(), step=step, summary=summary))
        writer.flush()
        time.sleep(max(0.0, (float(options.get("train.keep", 3)) - 3) / 2))
    writer.close()
    (output / "export").mkdir()
    (output / "export" / "zerobert.json").write_text(json.dumps({"best": {"step": 5, "value": accuracy}}))
    (output / "report").mkdir()
    (output / "report" / "report.txt").write_text("accuracy\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
