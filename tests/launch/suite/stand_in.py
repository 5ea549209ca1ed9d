"""Stands for a training where a test is about a suite: python stand_in.py SCRIPT OPTIONS.

Of 40 examples it has right twice as many as its epochs, and as many more as its seed, and with smoothed labels the
seed's remainder by three; of the validation examples twice as large a share, or with 8 epochs 0.05. A file NAME.json
beside the run's folder tells what else is to happen.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

EXAMPLES = 40


def right_of(epochs: float, seed: int) -> int:
    return int(2 * epochs) + seed


def validation_of(epochs: float, seed: int) -> float:
    return 0.05 if epochs == 8 else 2 * right_of(epochs, seed) / EXAMPLES


def main() -> int:
    options = dict(argument[2:].split("=", 1) for argument in sys.argv[2:] if "=" in argument)
    output = Path(options["output"])
    with output.with_name(f"{output.name}.starts").open("a") as file:
        file.write(json.dumps(options) + "\n")
    behaviour = output.with_name(f"{output.name}.json")
    if behaviour.is_file():
        told = json.loads(behaviour.read_text())
        print(f"error: {told['error']}" if "error" in told else "no word of it")
        return int(told["code"])
    right = right_of(float(options["train.epochs"]), int(options["seed"]))
    right += int(options["seed"]) % 3 if "labelled.label_smoothing" in options else 0
    validation = validation_of(float(options["train.epochs"]), int(options["seed"]))
    for name in ("report", "export"):
        (output / name).mkdir(parents=True)
    (output / "config.yaml").write_text(f"task: {options['task']}\n")
    metric = options.get("labelled.metric", "accuracy")
    (output / "export" / "zerobert.json").write_text(json.dumps({"best": {"metric": metric, "value": validation}}))
    rows = [f"{index}\tyes\t{'yes' if index < right else 'no'}\t0.9" for index in range(EXAMPLES)]
    header = "index\ttrue\tpredicted\tconfidence"
    (output / "report" / "predictions.tsv").write_text("\n".join([header, *rows]) + "\n")
    (output / "report" / "report.json").write_text(json.dumps({"scores": {"loss": 1.0, metric: right / EXAMPLES}}))
    (output / "report" / "report.txt").write_text("over\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
