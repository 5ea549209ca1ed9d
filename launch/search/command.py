"""`zerobert search`: the best options of a training, found by trials."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import yaml

from engine.config import RunConfig, require
from engine.errors import RunError, UserError, first_line
from launch.api import in_yaml
from launch.cli import CommandParser
from launch.configure.options import parse_given
from launch.search.running import STOPPED, Run, best_step, points
from launch.search.space import Dimension, read_space
from launch.search.study import PRUNERS, SAMPLERS, SECONDS, Objective, Study, read_objectives
from launch.seeds.command import split
from launch.seeds.plan import is_finished, without
from launch.seeds.running import PASSED_ON, check_launcher
from launch.slurm.submit import parse_job
from launch.slurm.submit import split as split_job

DESCRIPTION = """Search for the best options of a training.

  zerobert search --space space.yaml --trials 30 -- --config launch/recipes/finetune.yaml --labelled.train train.tsv
  zerobert search --space space.yaml --trials 30 --pruner asha -- --config ... --train.eval_interval 20
  zerobert search --space space.yaml --trials 30 --submit 4 -- --time 2:00:00 --gpus-per-node 1 --config ...
  zerobert search --lr-finder -- --config launch/recipes/finetune.yaml --labelled.train train.tsv

What follows -- are options of `zerobert train`; the space is a YAML file of fields with lists or ranges:

  optim.learning_rate: {low: 1e-5, high: 1e-3, log: true}
  train.epochs: [3, 10]

Each trial is an ordinary run, in <output>/trial-NNNN. The same command, started again or several times at once, on one
machine or many that share the folder, adds to the same search until there are so many trials; one that was killed is
taken over and resumes. The report is <output>/report, with the best options as a recipe. With --seeds that recipe is
trained again with seeds that no trial had, and scored on the test data, which chose nothing.

With --lr-finder a single short run tells the loss at growing learning rates, and suggests one."""
#: options of a training that each trial has for itself
PLACED = ("--output", "--resume")
#: trials that fail one after the other before the search gives up
FAILURES = 3


def build_parser() -> CommandParser:
    """The parser of the command's own options."""
    parser = CommandParser(
        prog="zerobert search", usage="zerobert search --space FILE [options] -- TRAINING", description=DESCRIPTION
    )
    parser.add_argument("--space", type=str | None, default=None, help="YAML file of the fields that are searched")
    parser.add_argument("--trials", type=int, default=20, help="trials of all searches in the folder together")
    parser.add_argument(
        "--objective",
        nargs="+",
        default=[],
        metavar="SCORE",
        help="what is optimised: scores of the evaluations, or seconds, with :min or :max where it isn't known; with "
        "several a front; by default the score that chooses the best weights",
    )
    parser.add_argument("--sampler", type=Literal.__getitem__(SAMPLERS), default="tpe", help="how values are chosen")
    parser.add_argument(
        "--pruner",
        type=Literal.__getitem__(PRUNERS),
        default="none",
        help="which trials end early, by their evaluations (train.eval_interval)",
    )
    parser.add_argument(
        "--prune-from", type=int | None, default=None, metavar="STEP", help="the first step at which a trial may end"
    )
    parser.add_argument(
        "--storage",
        type=str | None,
        default=None,
        help="a journal file or a database's URL; by default <output>/journal.log",
    )
    parser.add_argument("--seeds", type=int, default=0, help="seeds that the best recipe is trained with again")
    parser.add_argument("--launcher", type=str, default="", help="what starts a run; see zerobert seeds --help")
    parser.add_argument(
        "--submit",
        type=int | None,
        default=None,
        metavar="N",
        help="search as a SLURM array of N elements; options of zerobert submit stand among those of the training",
    )
    parser.add_argument("--lr-finder", action="store_true", help="the loss at growing learning rates, in one run")
    parser.add_argument(
        "--lr-range", type=float, nargs=2, default=None, metavar="RATE", help="its lowest and highest; 1e-7 and 1"
    )
    parser.add_argument("--lr-steps", type=int | None, default=None, help="its steps; 200")
    return parser


def main(arguments: list[str]) -> int:
    """Run trials until enough are there, and report."""
    own, training = split(arguments, "search --space FILE")
    values = build_parser().parse_args(own)
    check_finder(own, finds=values.lr_finder)
    if values.lr_finder:
        from launch.search.finder import find_rate

        launcher = check_launcher(values.launcher, 1, os.environ)
        return find_rate(training, values.lr_range, values.lr_steps, launcher)
    if values.space is None:
        raise UserError("space: not given; give a YAML file such as --space space.yaml")
    for name, least in (("trials", 1), ("seeds", 0)):
        value = getattr(values, name)
        if value < least:
            raise UserError(f"{name}: {value} is not allowed; give a whole number of at least {least}")
    launcher = check_launcher(values.launcher, 1, os.environ)
    space = read_space(Path(values.space))
    job, dry_run = None, False
    if values.submit is not None:
        ours, training = split_job(training)
        job, dry_run = parse_job(ours)
    config = check_training(training, space)
    objectives = read_objectives(values.objective, config)
    check_pruner(values.pruner, values.prune_from, objectives, config)
    if job is not None:
        from launch.search.array import submit_search

        return submit_search(own, training, config, job, values.submit, dry_run=dry_run)
    output = Path(config.output)
    pruning = (values.pruner, values.prune_from)
    study = Study(output, values.storage, objectives, space, values.sampler, pruning, config)
    shared = without(training, [*PLACED, *(f"--{each.field}" for each in space)])
    search = Search(study, shared, launcher)
    code = search.run(min(values.trials, study.most))
    if code is not None:
        return code
    from launch.search.report import write_report

    print(f"\n{write_report(study)}\nreport    {output / 'report'}", flush=True)
    best = json.loads((output / "report" / "report.json").read_text(encoding="utf-8"))["best"]
    if best is None:
        raise RunError(f"search: no trial has finished; see the output.txt of each in {output}")
    return again(study, best, config, shared, values.seeds, values.launcher) if values.seeds else 0


def check_finder(own: Sequence[str], *, finds: bool) -> None:
    """Refuse options of the range test without it, and those of a search beside it.

    Raises:
        UserError: names the first.
    """
    for word in own:
        name = word.partition("=")[0]
        if not name.startswith("--") or name in ("--lr-finder", "--launcher"):
            continue
        if name.startswith("--lr-") != finds:
            which = "--lr-finder, which is a single run" if finds else "a search; give --lr-finder too"
            raise UserError(f"{name[2:]}: it has no meaning in {which}")


def check_training(training: Sequence[str], space: Sequence[Dimension]) -> RunConfig:
    """The configuration of the training, checked with the ends of each range and each value of a list.

    Raises:
        UserError: the first option that is wrong.
    """
    config, _ = parse_given(list(training))
    if config.resume not in ("never", "auto"):
        raise UserError(f"resume: {config.resume!r} is not allowed; leave it out, since each trial goes on by itself")
    if (Path(config.output) / "config.yaml").exists():
        raise UserError(f"output: {config.output} is the folder of a single run; give another --output")
    remedy = "a search reads each trial's curves there; leave it out"
    require(config.monitor.tensorboard, "monitor.tensorboard", False, remedy)
    fields = [f"--{each.field}" for each in space]
    for name in dict.fromkeys(word.partition("=")[0] for word in training):
        if name in fields:
            print(f"note: {name[2:]} is searched, so what is given after -- is not used", flush=True)
    fixed = without(training, fields)
    for own, values in combinations_of_two(space):
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # notes on the training, told above already
                parse_given([*fixed, *(option(field, value) for field, value in values.items())])
        except UserError as error:
            told = " with ".join(f"{field}: {values[field]!r}" for field in own)
            raise UserError(f"space: {told} is refused: {error}") from error
    return config


def combinations_of_two(space: Sequence[Dimension]) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Two fields, and values that a trial may have: an extreme of each of the two, beside the first of all others.

    An option often excludes another one, or needs it, so that the values of a single field can't be judged.
    """
    first = {each.field: each.extremes[0] for each in space}
    if len(space) == 1:
        yield from (((space[0].field,), {space[0].field: value}) for value in space[0].extremes)
    for one, other in itertools.combinations(space, 2):
        for pair in itertools.product(one.extremes, other.extremes):
            yield (one.field, other.field), {**first, one.field: pair[0], other.field: pair[1]}


def check_pruner(pruner: str, first: int | None, objectives: Sequence[Objective], config: RunConfig) -> None:
    """Refuse pruning that nothing could decide.

    Raises:
        UserError: names the pruner and what is missing.
    """
    if first is not None and (pruner == "none" or first < 1):
        remedy = "give --pruner with it" if pruner == "none" else "give a step of at least 1"
        raise UserError(f"prune-from: {first} is not allowed; {remedy}")
    if pruner != "none" and len(objectives) > 1:
        raise UserError(f"pruner: {pruner!r} is not allowed; it needs a single objective, or take --pruner none")
    if pruner != "none" and not config.train.eval_interval:
        raise UserError(f"pruner: {pruner!r} needs evaluations on the way; give train.eval_interval, or --pruner none")


def option(field: str, value: Any) -> str:
    """A field and its value as an option of a training."""
    return f"--{field}={in_yaml(value)}"


@dataclass
class Search:
    """This process's part of a search."""

    study: Study
    training: list[str]
    """options of all trials"""
    launcher: list[str]
    stopped_by: int | None = None
    """the signal"""

    def run(self, trials: int) -> int | None:
        """Run trials until enough are there and none is under way; the exit code where it was stopped.

        Raises:
            RunError: several trials failed one after the other, or one trained other values than it asked for.
        """
        before = {number: signal.signal(number, self._stop) for number in (*PASSED_ON, signal.SIGINT)}
        failures = 0
        try:
            while self.stopped_by is None:
                trial = self.study.next(trials)
                if trial is not None:
                    failures = 0 if self._run(trial) else failures + 1
                    if failures == FAILURES:
                        raise RunError(f"search: {FAILURES} trials failed one after the other; see their output.txt")
                elif not self.study.under_way:
                    return None
                else:
                    time.sleep(1.0)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        print(f"stopped by {signal.Signals(self.stopped_by).name}; the same command goes on", flush=True)
        return {signal.SIGINT: 130, signal.SIGUSR1: STOPPED}.get(signal.Signals(self.stopped_by), 0)

    def _run(self, trial: Any) -> bool:
        """Run a trial to its end; whether it didn't fail."""
        values = {dimension.field: dimension.suggest(trial) for dimension in self.study.space}
        output = self.study.output / f"trial-{trial.number:04d}"
        told = ", ".join(
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in values.items()
        )
        print(f"trial {trial.number}: {told}", flush=True)
        options = [*self.training, f"--output={output}", "--resume=auto"]
        start, is_single = time.monotonic() - self.study.spent(trial.number), len(self.study.objectives) == 1
        run = Run(output, [*options, *(option(name, value) for name, value in values.items())], self.launcher)
        pruned = False

        def look() -> bool:
            nonlocal pruned
            self.study.touch(trial.number, time.monotonic() - start)
            self._report(trial, run)
            pruned = pruned or (is_single and trial.should_prune())
            return not pruned and self.stopped_by is None

        by_itself = run.watch(look)
        seconds = time.monotonic() - start
        if self.stopped_by is not None:
            self.study.touch(trial.number, seconds)
            self.study.give_back(trial.number)
            return True
        trial.set_user_attr(SECONDS, seconds)
        if not by_itself and pruned:
            self.study.tell_pruned(trial)
            print(f"trial {trial.number}: ended early, worse than others at the same step", flush=True)
            return True
        return self._record(trial, run, values, seconds)

    def _report(self, trial: Any, run: Run) -> None:
        """Tell Optuna the evaluations that it hasn't been told; with several objectives it takes none."""
        first, *others = self.study.objectives
        for step, value in () if others else run.news(first.tag):
            if math.isfinite(value):
                trial.report(value, step)

    def _record(self, trial: Any, run: Run, values: dict[str, Any], seconds: float) -> bool:
        self._report(trial, run)  # what came since the last look
        if run.code != 0 or not is_finished_run(run.output):
            self.study.tell_failed(trial, run.last_words())
            print(f"trial {trial.number}: failed: {run.last_words()}", flush=True)
            return False
        try:
            check_trained(run.output, values)
            found = results(run.output, self.study.objectives, seconds)
        except (RunError, UserError) as error:  # which ends the search, and another one shall not take this trial over
            self.study.tell_failed(trial, first_line(error))
            raise
        self.study.tell(trial, found)
        print(f"trial {trial.number}: " + ", ".join(f"{name} {value:.4f}" for name, value in found.items()), flush=True)
        return True

    def _stop(self, number: int, _frame: FrameType | None) -> None:
        self.stopped_by = number


def is_finished_run(output: Path) -> bool:
    """Whether a run is over: one that reports has its report, another one its export."""
    return is_finished(output) or (output / "export" / "zerobert.json").is_file()


def check_trained(output: Path, asked: dict[str, Any]) -> None:
    """Compare what a finished run was configured with, and the rate that it really had, with what its trial asked for.

    Raises:
        RunError: names the field and both values.
    """
    trained = yaml.safe_load((output / "config.yaml").read_text(encoding="utf-8"))
    for field, value in asked.items():
        found: Any = trained
        for name in field.split("."):
            found = found[name]
        same = found == value or (isinstance(value, float) and math.isclose(float(found), value, rel_tol=1e-12))
        if not same:
            raise RunError(f"search: {output} trained with {field} {found!r}, and its trial asked for {value!r}")
    rates = [rate for _, rate in points(output, "train/learning_rate")]
    asked_rate = float(trained["optim"]["learning_rate"])
    if rates and max(rates) > asked_rate * (1 + 1e-6):
        raise RunError(f"search: {output} trained at a rate of {max(rates):g}, and its trial asked for {asked_rate:g}")


def results(output: Path, objectives: Sequence[Objective], seconds: float) -> dict[str, float]:
    """The objectives of a finished run: of its best weights, or of the last evaluation where it has no best.

    Raises:
        UserError: no evaluation tells an objective.
    """
    best, found = best_step(output), {}
    for objective in objectives:
        if objective.name == SECONDS:
            found[SECONDS] = seconds
            continue
        curve = points(output, objective.tag)
        if not curve:
            raise UserError(f"objective: no evaluation in {output} tells {objective.name!r}; give a score that it has")
        found[objective.name] = dict(curve).get(best, curve[-1][1]) if best is not None else curve[-1][1]
    return found


def again(
    study: Study, best: Mapping[str, Any], config: RunConfig, training: list[str], seeds: int, launcher: str
) -> int:
    """Train the best recipe with new seeds, unless another search of the folder does; the exit code.

    Args:
        best: the report's.
        training: options of all trials.
    """
    from launch.seeds.command import main as train_seeds

    options = [option(name, value) for name, value in best["values"].items() if name != "seed"]
    tried = [int(value or 0) for each in study.space if each.field == "seed" for value in each.extremes]
    first = 1 + max([config.seed, *tried])
    output = study.output / f"best-{best['number']:04d}"
    with study.only_one("best") as mine:
        if not mine:
            print(f"another search trains the best options again, into {output}", flush=True)
            return 0
        print(f"\nthe best of the validation scores ({best['told']}) is the luckiest too; trained again:", flush=True)
        own = [f"--seeds={seeds}", *([f"--launcher={launcher}"] if launcher else []), "--"]
        return train_seeds([*own, *training, *options, f"--seed={first}", f"--output={output}"])
