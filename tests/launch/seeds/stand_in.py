"""Stands for a training where a test is about what starts it: python stand_in.py SCRIPT OPTIONS.

A file beside the run's folder, NAME.json, tells what is to happen: an exit code, or a stop. Each start appends its
options to NAME.starts.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path


def main() -> int:
    options = dict(argument[2:].split("=", 1) for argument in sys.argv[2:] if "=" in argument)
    output = Path(options["output"])
    with output.with_name(f"{output.name}.starts").open("a") as file:
        file.write(json.dumps(options) + "\n")
    behaviour = output.with_name(f"{output.name}.json")
    told = json.loads(behaviour.read_text()) if behaviour.is_file() else {}
    print(f"training {output.name}", flush=True)
    if told.get("waits"):
        received: list[int] = []
        signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
        (output.parent / "waiting").touch()
        deadline = time.monotonic() + 20
        while not received and time.monotonic() < deadline:
            time.sleep(0.01)
        return 0
    if "code" in told:
        print("error: labelled.train: no such file", file=sys.stderr)
        return int(told["code"])
    seed = int(options["seed"]) + int(options.get("labelled.fold", 0))
    report = output / "report"
    report.mkdir(parents=True)
    rows = [f"{index}\tyes\t{'yes' if index % 10 < seed else 'no'}\t0.9" for index in range(10 * seed)]
    (report / "predictions.tsv").write_text("\n".join(["index\ttrue\tpredicted\tconfidence", *rows]) + "\n")
    scores = {"loss": 1 / seed, "accuracy": seed / 10}
    (report / "report.json").write_text(json.dumps({"scores": scores}))
    (report / "report.txt").write_text("accuracy\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
