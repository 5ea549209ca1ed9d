"""All benchmarks one after the other, their results and pictures: `make bench`, some hours.

    python -m benchmarks.all                                    everything, under runs/bench
    python -m benchmarks.all --only fused_loss roofline --quick
    python -m benchmarks.all --options "finetune=--peer-python peer/bin/python"

Each runs as `python -m benchmarks.NAME --json` in a process of its own. One that fails, or is skipped because its data
or peer isn't there, doesn't end the rest. Written are NAME.json (rows, date, commit, load of the machine), NAME.log
(what it printed to stderr), machine.json, summary.json and `pictures`. Exit code 1 if any failed or missed a goal, 2
for a wrong option. `--quick` makes them short: it shows that they run; its figures mean little, and no goal is judged.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, machine, missed
from benchmarks.startup import end_session

#: by name, in order, with options that make those short that have no --quick
BENCHMARKS: dict[str, tuple[str, ...]] = {
    "pretrain_step": ("--sizes=mini", "--repeats=1", "--steps=20", "--unjudged"),
    "time_to_loss": ("--unjudged",),
    "architectures": ("--minutes=0.2", "--seeds=1", "--rates=1e-3", "--held-out=64"),
    "finetune": ("--limit=1500", "--epochs=1", "--seeds=1", "--variant=plain", "--unjudged"),
    "tasks": (),
    "adapters": ("--quick",),
    "adapters_peer": ("--quick",),
    "predict": ("--rows=64", "--trial-rows=32", "--repeats=3", "--batches=8", "--unjudged"),
    "onnx": ("--models=minilm", "--batches=1", "--lengths=32", "--seconds=2"),
    "serve": ("--rows=64", "--repeats=3", "--seconds=2", "--unjudged"),
    "quantise": ("--widths=384", "--batches=1", "--repeats=5", "--unjudged"),
    "prepare": (),
    "startup": ("--repeats=5", "--unjudged"),
    "scaling": (),
    "neighbour": (),
    "fused_loss": ("--rows=307", "--hidden=256", "--dtypes=bf16", "--threads=2", "--repeats=5", "--no-memory"),
    "optimizer_step": ("--sizes=24M", "--threads=2", "--repeats=5"),
    "zero_step": ("--stages=1", "--repeats=5", "--rivals", "FusedAdamW", "FusedLamb", "torch.optim.AdamW(fused)"),
    "memory_forecast": ("--cases=0",),
    "long_sequences": ("--lengths", "1024", "2048", "--tokens=2048"),
    "roofline": (),
}
#: seconds between the request to end and the end
GRACE_S = 20.0
SKIPPED = "skipped:"


@dataclass(frozen=True)
class Outcome:
    """How a benchmark went."""

    name: str
    state: str
    """ok, missed (it has results, and a goal is missed), failed or skipped"""
    seconds: float
    reason: str = ""


def document(text: str) -> list[dict[str, Any]] | None:
    """The rows in what a benchmark printed, after lines of libraries if there are any; None if it holds none."""
    starts = [0, *(place + 1 for place in range(len(text)) if text.startswith("\n[", place))]
    for start in starts:
        with contextlib.suppress(ValueError):
            found = json.loads(text[start:])
            if isinstance(found, list) and all(map(is_row, found)):
                return found
    return None


def is_row(row: object) -> bool:
    """Whether it is a title with rivals, each of them figures and words by name."""
    if not isinstance(row, dict) or not isinstance(row.get("title"), str) or not isinstance(row.get("rivals"), dict):
        return False
    return all(isinstance(values, dict) for values in row["rivals"].values())


def judge(name: str, code: int | None, printed: str, errors: str, seconds: float) -> Outcome:
    """What the exit code and the output mean; without a code it was ended at the limit.

    A benchmark that can't run here ends, with any exit code, with a line "skipped: reason" in place of rows. One that
    misses a goal of its rows ends with 1.
    """
    if code is None:
        return Outcome(name, "failed", seconds, f"ended after {seconds:.0f} s, its limit")
    rows = document(printed)
    if code in (0, 1) and rows and (lines := missed(rows)):
        return Outcome(name, "missed", seconds, "; ".join(lines))
    if code == 0 and rows:
        return Outcome(name, "ok", seconds)
    last = last_line(errors) or last_line(printed) or "no message"
    if last.startswith(SKIPPED):
        return Outcome(name, "skipped", seconds, last.removeprefix(SKIPPED).strip())
    why = f"exit code {code}: {last}" if code else "it printed no rows of a title and rivals"
    return Outcome(name, "failed", seconds, why)


def last_line(text: str) -> str:
    """The last line that isn't blank, or nothing."""
    return next((line for line in reversed(text.splitlines()) if line.strip()), "")


def stop(process: subprocess.Popen[str]) -> None:
    """Ask a benchmark's processes to end, so that it ends those that it started, then end what is left."""
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_S)
    end_session(process)


def run(name: str, options: list[str], output: Path, limit: float) -> Outcome:
    """Run one benchmark and write NAME.json if it succeeds, NAME.log in any case."""
    module = f"benchmarks.{name}"
    if importlib.util.find_spec(module) is None:
        return Outcome(name, "failed", 0.0, f"there is no {module}")
    (output / f"{name}.json").unlink(missing_ok=True)  # an earlier result must not pass for this run's
    command = [sys.executable, "-m", module, "--json", *options]
    printed, log = output / f"{name}.out", output / f"{name}.log"
    start, code = time.perf_counter(), None
    load = os.getloadavg()[0]
    with printed.open("w") as out, log.open("w") as errors:
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=errors, text=True, start_new_session=True)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            pass
        finally:
            stop(process)
    text = printed.read_text(errors="replace")
    outcome = judge(name, code, text, log.read_text(errors="replace"), time.perf_counter() - start)
    if outcome.state != "failed":
        printed.unlink()
    if outcome.state in ("ok", "missed"):
        facts: dict[str, Any] = {"benchmark": name, "command": shlex.join(["python", *command[1:]]), **provenance()}
        facts |= {"seconds": outcome.seconds, "load_before": load, "load_after": os.getloadavg()[0]}
        write(output / f"{name}.json", facts | {"rows": document(text)})
    return outcome


def provenance() -> dict[str, str]:
    """Date and commit; `modified` where tracked files differ from it."""
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    try:
        commit = git("rev-parse", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return {"date": now, "commit": "unknown"}
    return {"date": now, "commit": f"{commit}, modified" if changed else commit}


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def quick_options(name: str) -> list[str]:
    """What makes a benchmark short: its own --quick if it has one."""
    module = f"benchmarks.{name}"
    if importlib.util.find_spec(module) is None:
        return []
    shown = subprocess.run([sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True).stdout
    return ["--quick"] if "--quick" in shown else list(BENCHMARKS[name])


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; `options` becomes lists of arguments by name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(BENCHMARKS), metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--quick", action="store_true", help="short runs, whose figures mean nothing")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "bench", help="folder (default runs/bench)")
    parser.add_argument(
        "--options", nargs="+", default=[], metavar="NAME=ARGUMENTS", help="further arguments of a benchmark"
    )
    parser.add_argument("--limit", type=float, default=4 * 3600.0, help="seconds a benchmark may take (default 4 h)")
    args = parser.parse_args(arguments)
    if args.limit <= 0:
        parser.error(f"--limit: {args.limit} is not a positive number of seconds")
    chosen: dict[str, list[str]] = {}
    for text in args.options:
        name, equals, given = text.partition("=")
        if name not in BENCHMARKS or not equals:
            parser.error(f"--options: {text!r} is not NAME=ARGUMENTS with one of {', '.join(BENCHMARKS)}")
        chosen[name] = shlex.split(given)
    args.options = chosen
    if args.output.exists() and not args.output.is_dir():
        parser.error(f"--output: {str(args.output)!r} is a file; give a folder")
    return args


def verdict(outcomes: list[Outcome], judged: bool) -> int:
    """Print which failed and which missed a goal; the exit code."""
    bad = {state: [one.name for one in outcomes if one.state == state] for state in ("failed", "missed")}
    print(f"{len(bad['failed'])} of {len(outcomes)} failed: {', '.join(bad['failed']) or 'none'}")
    if judged:
        print(f"{len(bad['missed'])} of {len(outcomes)} missed a goal: {', '.join(bad['missed']) or 'none'}")
    else:
        print("goals were not judged: --quick makes runs too short for them")
    return 1 if any(bad.values()) else 0


def main() -> int:
    args = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the benchmark under way too
    args.output.mkdir(parents=True, exist_ok=True)
    write(args.output / "machine.json", machine() | provenance() | {"quick": args.quick})
    names = args.only or list(BENCHMARKS)
    outcomes = []
    for number, name in enumerate(names, start=1):
        print(f"{number}/{len(names)} {name} …", flush=True)
        options = [*(quick_options(name) if args.quick else []), *args.options.get(name, [])]
        outcomes.append(run(name, options, args.output, args.limit))
        one = outcomes[-1]
        print(
            f"{number}/{len(names)} {name}: {one.state}, {one.seconds:.0f} s{f': {one.reason}' * bool(one.reason)}",
            flush=True,
        )
    write(args.output / "summary.json", {**provenance(), "outcomes": [asdict(one) for one in outcomes]})
    from benchmarks.plots import draw

    pictures = draw(args.output)
    print(f"results in {args.output}, {len(pictures)} pictures")
    return verdict(outcomes, judged=not args.quick)


if __name__ == "__main__":
    sys.exit(main())
