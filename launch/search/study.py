"""The study that searches share: Optuna's, with trials that are given back when whoever ran them is gone.

Optuna's journal has no sign of life of its workers. Here each keeps a file per trial fresh,
<output>/claims/NNNN; a trial that is under way and whose file has grown old is taken over by whoever sees it first, and
its run resumes from its checkpoint.
"""

from __future__ import annotations

import math
import os
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config import TASKS, RunConfig
from engine.errors import UserError, first_line
from launch.search.space import Dimension
from launch.seeds.plan import check_options, shared_options

#: seconds after which nobody is taken to work on a trial any more
STALE = 60.0
#: the only study of a folder
STUDY = "zerobert"
SAMPLERS = ("tpe", "random", "grid", "cmaes")
PRUNERS = ("none", "asha", "hyperband", "median")
#: objectives that no evaluation tells
SECONDS = "seconds"
MISSING = "search needs optuna; pip install 'zerobert[search]'"


@dataclass(frozen=True)
class Objective:
    """What is optimised."""

    name: str
    """a score of the evaluations, such as accuracy, or "seconds" of the trial"""
    maximise: bool

    @property
    def tag(self) -> str:
        """The curve of a score."""
        return f"eval/{self.name}"

    def __str__(self) -> str:
        return f"{self.name} ({'max' if self.maximise else 'min'})"


def read_objectives(given: list[str], config: RunConfig) -> list[Objective]:
    """The objectives that a user names: NAME, NAME:min or NAME:max; the score that chooses the best weights if none.

    Raises:
        UserError: a name twice, a direction that is none, or nothing says whether higher is better.
    """
    task = TASKS.get(config.task)
    metric = getattr(config.part(task.section), "metric", None)
    names = given or ([metric] if metric else [])
    if not names:
        raise UserError(
            f"objective: task {config.task} has no score that is the natural one; give one, as mlm_loss:min"
        )
    found = []
    for text in names:
        name, colon, direction = text.partition(":")
        if not name or (colon and direction not in ("min", "max")):
            raise UserError(f"objective: {text!r} is not allowed; give a score, which may end in :min or :max")
        known = {**task.metrics, SECONDS: False}
        if not colon and name not in known:
            raise UserError(f"objective: {text!r} says not whether higher is better; give {text}:min or {text}:max")
        found.append(Objective(name, direction == "max" if colon else known[name]))
    if len({each.name for each in found}) < len(found) or found[0].name == SECONDS:
        raise UserError(f"objective: {', '.join(names)} is not allowed; give a score first, and each name once")
    return found


class Study:
    """Optuna's study, with the trials of all searches in one folder."""

    def __init__(
        self,
        output: Path,
        storage: str | None,
        objectives: list[Objective],
        space: list[Dimension],
        sampler: str,
        pruning: tuple[str, int | None],
        config: RunConfig,
    ) -> None:
        """
        Args:
            config: of the training, whose options all trials share.

        Raises:
            UserError: the storage can't be used, or holds another search; a sampler that can't sample the space.
        """
        try:
            import optuna
        except ImportError as error:
            raise UserError(f"search: {MISSING}") from error
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.output, self.objectives, self.space, self._optuna = output, objectives, space, optuna
        self.claims = output / "claims"
        self._storages: Any = optuna.storages
        self._is_grid = sampler == "grid"
        self.study = self._opened(storage, _sampler(optuna, sampler, space, config.seed), build_pruner(*pruning))
        self.study.stop = lambda: (
            None
        )  # a grid's sampler ends Optuna's own loop by it when it is done, and this isn't one
        self._check_folder(storage)
        self._check_same(config)

    def _opened(self, storage: str | None, sampler: Any, pruner: Any) -> Any:
        optuna, where = self._optuna, storage or str(self.output / "journal.log")
        try:
            self.claims.mkdir(parents=True, exist_ok=True)
            probe = self.claims / f".{uuid.uuid4().hex}"
            probe.touch()
            probe.unlink()
            kept: Any = where if "://" in where else _journal(optuna, Path(where))
            directions = ["maximize" if each.maximise else "minimize" for each in self.objectives]
            return optuna.create_study(
                storage=kept, sampler=sampler, pruner=pruner, study_name=STUDY, directions=directions,
                load_if_exists=True,
            )  # fmt: skip
        except Exception as error:  # of the file system, of SQLAlchemy, of a database's driver
            raise UserError(
                f"storage: {where!r} cannot be used ({first_line(error)}); give a file or a database's URL that can be "
                "written"
            ) from error

    def _check_folder(self, storage: str | None) -> None:
        """Refuse a storage that has the trials of another folder: numbers and signs of life are by folder."""
        mark = self.claims / "folder"
        with self._alone():
            here = mark.read_text(encoding="utf-8") if mark.is_file() else None
            there = self.study.user_attrs.get("folder")
            if there is None and any(self.output.glob("trial-*")) == bool(self.study.get_trials(deepcopy=False)):
                there = here = here or uuid.uuid4().hex
                mark.write_text(here, encoding="utf-8")
                self.study.set_user_attr("folder", there)
        if here != there:
            raise UserError(
                f"storage: {storage or str(self.output / 'journal.log')!r} does not hold the trials in {self.output}; "
                "give the storage and the output that the search began with, or another of both"
            )

    def _check_same(self, config: RunConfig) -> None:
        """Refuse to add trials to a search for something else."""
        told = {"objectives": [str(each) for each in self.objectives], "space": [repr(each) for each in self.space]}
        before = self.study.user_attrs
        for name, value in told.items():
            if name in before and before[name] != value:
                raise UserError(
                    f"{name}: {', '.join(value)} is not what the trials in {self.output} have "
                    f"({', '.join(before[name])}); put it back, or give another --output"
                )
            if name not in before:
                self.study.set_user_attr(name, value)
        searched = {each.field for each in self.space}
        options = {"seed": config.seed, **shared_options(config)}
        options = {name: value for name, value in options.items() if name not in searched}
        if "options" not in before:
            self.study.set_user_attr("options", options)
        check_options("trials", self.output, before.get("options", {}), options)

    def next(self, trials: int) -> Any | None:
        """A trial to run: one that was given back, or a new one; None when enough are there.

        Args:
            trials: how many there shall be, of all searches together.
        """
        with self._alone():
            for frozen in self.study.get_trials(deepcopy=False):
                if frozen.state == self._optuna.trial.TrialState.RUNNING and self._is_stale(frozen.number):
                    self.touch(frozen.number)
                    return self._optuna.trial.Trial(self.study, frozen._trial_id)
            if len(self.study.get_trials(deepcopy=False)) >= trials:
                return None
            trial = self.study.ask()
            self.touch(trial.number)
            return trial

    @property
    def most(self) -> int:
        """Trials that a search can have: those of a grid, where that is the sampler."""
        grids = [each.grid for each in self.space]
        return math.prod(map(len, filter(None, grids))) if self._is_grid else sys.maxsize

    @property
    def under_way(self) -> int:
        """Trials that others run."""
        running = self._optuna.trial.TrialState.RUNNING
        return sum(each.state == running for each in self.study.get_trials(deepcopy=False))

    def touch(self, number: int, seconds: float | None = None) -> None:
        """Say that a trial is being worked on, and for how long up to now."""
        path = self.claims / f"{number:04d}"
        if seconds is None:
            path.touch()
        else:
            path.write_text(f"{seconds:.1f}", encoding="utf-8")

    def spent(self, number: int) -> float:
        """Seconds that a trial has had, of those who stopped or were killed too."""
        try:
            return float((self.claims / f"{number:04d}").read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):  # of a new trial; of one that was killed as it wrote
            return 0.0

    @contextmanager
    def only_one(self, name: str) -> Iterator[bool]:
        """Whether this search may do what only one of them shall do; it is known to others until it leaves, or dies."""
        claim, ended = self.claims / name, threading.Event()
        with self._alone():
            mine = self._is_old(claim)
            if mine:
                claim.touch()

        def keep_fresh() -> None:
            while not ended.wait(STALE / 6):
                claim.touch()

        thread = threading.Thread(target=keep_fresh, daemon=True)
        if mine:
            thread.start()
        try:
            yield mine
        finally:
            ended.set()
            if mine:
                thread.join()
                claim.unlink(missing_ok=True)

    def give_back(self, number: int) -> None:
        """Let others take a trial over at once."""
        os.utime(self.claims / f"{number:04d}", (0, 0))

    def _is_stale(self, number: int) -> bool:
        return self._is_old(self.claims / f"{number:04d}")

    def _is_old(self, claim: Path) -> bool:
        try:
            return time.time() - claim.stat().st_mtime > STALE
        except FileNotFoundError:  # killed between the two lines that make a trial
            return True

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One search of the folder at a time, on whichever node."""
        lock: Any = self._storages.journal.JournalFileOpenLock(str(self.claims / "choice"))
        lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def tell(self, trial: Any, values: Mapping[str, float]) -> None:
        """Record the result of a trial."""
        self.study.tell(trial.number, [values[each.name] for each in self.objectives], skip_if_finished=True)

    def tell_pruned(self, trial: Any) -> None:
        """Record that a trial was ended since it was worse than others at the same step."""
        self.study.tell(trial.number, state=self._optuna.trial.TrialState.PRUNED, skip_if_finished=True)

    def tell_failed(self, trial: Any, reason: str) -> None:
        """Record that a trial's run failed."""
        trial.set_user_attr("failed", reason)
        self.study.tell(trial.number, state=self._optuna.trial.TrialState.FAIL, skip_if_finished=True)


def _journal(optuna: Any, path: Path) -> Any:
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = optuna.storages.journal.JournalFileOpenLock(str(path))
    return optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path), lock_obj=lock))


def _sampler(optuna: Any, name: str, space: list[Dimension], seed: int) -> Any:
    """
    Raises:
        UserError: an infinite grid, values that aren't numbers for CMA-ES, or its package is missing.
    """
    if name == "grid":
        endless = next((each.field for each in space if each.grid is None), None)
        if endless is not None:
            raise UserError(f"sampler: grid needs finitely many values; give {endless} a list or a step")
        return optuna.samplers.GridSampler({each.field: list(each.grid or ()) for each in space}, seed=seed)
    if name == "cmaes":
        from launch.search.space import Choice

        named = next((each.field for each in space if isinstance(each, Choice)), None)
        if named is not None or len(space) < 2:
            what = f"{named} is a list" if named else "the space has one field"
            raise UserError(f"sampler: cmaes searches two ranges of numbers or more, and {what}; take tpe")
        try:
            import cmaes  # type: ignore[import-untyped] # noqa: F401
        except ImportError as error:
            raise UserError("sampler: cmaes needs a package; pip install 'zerobert[search]'") from error
        return optuna.samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False)
    # without a seed each of several searches draws other values
    return optuna.samplers.TPESampler() if name == "tpe" else optuna.samplers.RandomSampler()


def build_pruner(name: str, first: int | None) -> Any:
    """The rule that ends trials: none of them before step `first`, or where Optuna begins by itself."""
    from optuna import pruners

    kinds: dict[str, tuple[Any, str]] = {
        "none": (pruners.NopPruner, ""),
        "asha": (pruners.SuccessiveHalvingPruner, "min_resource"),
        "hyperband": (pruners.HyperbandPruner, "min_resource"),
        "median": (pruners.MedianPruner, "n_warmup_steps"),
    }
    kind, begins = kinds[name]
    return kind() if first is None else kind(**{begins: first})
