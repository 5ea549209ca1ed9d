"""The process of one stage: `python -m benchmarks.proof.worker NAME SETTING ROWS`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from benchmarks.all import SKIPPED
from benchmarks.proof.stage import STAGES, Report, Setting, SkippedError


def main(arguments: list[str]) -> int:
    """Run one stage; 0 also where it is skipped, which the last line says."""
    name, setting, rows = arguments
    try:
        STAGES[name].load()(Setting(**json.loads(setting)), Report(Path(rows)))
    except SkippedError as skipped:
        print(f"{SKIPPED} {skipped}", file=sys.stderr)
    return 0


def command(name: str, setting: Setting, rows: Path) -> list[str]:
    """The command line of a stage."""
    return [sys.executable, "-m", "benchmarks.proof.worker", name, json.dumps(asdict(setting)), str(rows)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
