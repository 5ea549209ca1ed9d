"""`zerobert compare`: whether the difference of two runs is real."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import UserError
from engine.tasks.outcomes import score_of
from engine.tasks.significance import LEVEL, Difference, bootstrap, mcnemar, one_alone, paired_t
from launch.cli import CommandParser
from launch.compare.loading import Compared, load

DESCRIPTION = """Whether the difference of two finished runs is real, by a paired test on what they got on each example.

  zerobert compare runs/bert runs/modernbert
  zerobert compare runs/bert_seeds runs/modernbert_seeds --json

Both are of the same task and are scored on the same examples. A share of right answers is judged by McNemar's exact
test, other scores by a paired bootstrap over examples. Of two folders of `zerobert seeds`, runs with the same seed are
pairs, and a paired t-test over the seeds is made too: a difference is called real if both tests say so."""

#: the tests by their names in the JSON document
TESTS = {
    "mcnemar": "McNemar's exact test",
    "bootstrap": "paired bootstrap over examples",
    "paired_t": "paired t-test over seeds or folds",
}


def build_parser() -> CommandParser:
    """The parser of the command."""
    parser = CommandParser(prog="zerobert compare", description=DESCRIPTION)
    parser.add_argument("first", type=str, help="output folder of a run, or of seeds")
    parser.add_argument("second", type=str, help="that of the other")
    parser.add_argument("--metric", type=str | None, default=None, help="the one score to compare; null: all there are")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    return parser


def main(arguments: list[str]) -> int:
    """Compare, and print in words or as JSON."""
    values = build_parser().parse_args(arguments)
    first, second = Path(values.first), Path(values.second)
    found = compare(first, second, values.metric)
    print(json.dumps(found, indent=2, ensure_ascii=False) if values.json else render(found), flush=True)
    return 0


def compare(first: Path, second: Path, metric: str | None = None) -> dict[str, Any]:
    """The comparison of two runs, or of two folders of seeds, as plain values.

    Args:
        metric: the score to compare; None takes all that both tell of single examples.

    Raises:
        UserError: they can't be compared, or have no such score.
    """
    compared = load(first, second)
    names = compared.measures if metric is None else [metric]
    if names[0] not in compared.measures:
        raise UserError(f"metric: {metric!r} is not allowed; choose one of {', '.join(compared.measures)}")
    return {
        "first": str(first),
        "second": str(second),
        "task": compared.pairs[0][0].task,
        "pairs": len(compared.pairs),
        "examples": sum(len(pair[0].outcomes) for pair in compared.pairs[: 1 if compared.same_examples else None]),
        "level": LEVEL,
        "scores": {name: compared_score(name, compared) for name in names},
    }


def compared_score(name: str, compared: Compared) -> dict[str, Any]:
    """What is known of the difference of one score."""
    pairs = [(one.outcomes.scores[name], other.outcomes.scores[name]) for one, other in compared.pairs]
    values = [(float(score_of(name, one)), float(score_of(name, other))) for one, other in pairs]
    found: dict[str, Any] = {
        "first": float(np.mean([one for one, _ in values])),
        "second": float(np.mean([other for _, other in values])),
    }
    alone = one_alone(*pairs[0]) if len(pairs) == 1 else None
    if alone is not None:
        tests = {"mcnemar": mcnemar(*alone, len(pairs[0][0]))}
        found |= {"right_in_first_alone": alone[0], "right_in_second_alone": alone[1]}
    else:
        tests = {"bootstrap": bootstrap(name, pairs, same_examples=compared.same_examples)}
    if len(pairs) > 1:
        tests["paired_t"] = paired_t([one for one, _ in values], [other for _, other in values])
    found["tests"] = {test: as_json(difference) for test, difference in tests.items()}
    found["real"] = all(difference.real for difference in tests.values())
    return found


def as_json(difference: Difference) -> dict[str, Any]:
    """A difference as JSON has it, without NaN."""
    interval = [difference.low, difference.high]
    known = all(math.isfinite(end) for end in interval)
    return {"difference": difference.value, "interval_95": interval if known else None, "p": difference.p}


def render(found: dict[str, Any]) -> str:
    """The comparison in words."""
    pairs = f", {found['pairs']} pairs of runs" if found["pairs"] > 1 else ""
    lines = [f"{found['task']} on {found['examples']:,} examples{pairs}: from {found['first']} to {found['second']}"]
    for name, score in found["scores"].items():
        verdict = "a real difference" if score["real"] else "no real difference"
        lines += ["", f"{name}: {verdict} at {100 * LEVEL:.0f} %, {score['first']:.4f} and {score['second']:.4f}"]
        for test, told in score["tests"].items():
            interval = told["interval_95"]
            shown = "no interval" if interval is None else f"95 % interval {interval[0]:+.4f} to {interval[1]:+.4f}"
            lines.append(f"  {told['difference']:+.4f} ({shown}), p {told['p']:.2g}, {TESTS[test]}")
        if "mcnemar" in score["tests"]:
            first, second = score["right_in_first_alone"], score["right_in_second_alone"]
            lines.append(
                f"  {first + second} examples are right in one run alone: {first} in the first, {second} in the second"
            )
    return "\n".join(lines)
