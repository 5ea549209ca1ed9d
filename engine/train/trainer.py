"""The training loop: fetch, forward, backward, update, observe. It knows `Task`, never a task's name."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Generator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine import dist
from engine.config import RunConfig, architecture_of
from engine.data.loading.loader import BatchLayout, training_batches
from engine.data.loading.source import Cursor, MicroBatch
from engine.errors import RunError, UserError
from engine.model.adapters.adapt import in_base
from engine.model.folder import CONFIG_FILE, described, saved_files
from engine.optim.build import build_optimizer
from engine.optim.schedule import learning_rate
from engine.tasks.task import Best, Evaluation, Task
from engine.train import best, earlier, evaluation
from engine.train.adapters.adapting import Adapting
from engine.train.audit import Audit
from engine.train.certificate.certificate import UpdateCertificate
from engine.train.checkpoint import folder as checkpoint
from engine.train.checkpoint.saver import Saver
from engine.train.curves.meter import Meter
from engine.train.curves.monitor import Monitor, Progress, memory_bytes
from engine.train.exporting import write_export
from engine.train.heap import keep_heap, release_freed, share_with_forks
from engine.train.log import say
from engine.train.observer import StepObserver
from engine.train.profile.profile import Profile, check_profile
from engine.train.ranks.neighbours import give_way
from engine.train.regularising import Regularising
from engine.train.result import RunResult
from engine.train.start import record_config, tell_loaded
from engine.train.watch.faults import RollBack, found_late
from engine.train.watch.guard import Guard, pending_evaluation, unsaved
from engine.train.watch.preempt import Stop, Stopped
from engine.train.watch.session import Session
from engine.zero.engine import ZeroEngine


class Trainer:
    """One run of one task on this rank."""

    def __init__(
        self,
        task: Task,
        config: RunConfig,
        deepspeed: dict[str, Any],
        layout: BatchLayout,
        start: Path | None,
        session: Session,
        facts: dict[str, Any],
    ) -> None:
        """
        Args:
            task: what is trained.
            config: the run's configuration.
            deepspeed: the resolved DeepSpeed configuration.
            layout: how the global batch is divided over ranks and gradient accumulation.
            start: the checkpoint to resume from; None for a new run.
            session: this start of the run, with its watchdog and heartbeat.
            facts: what every checkpoint records of data and model; see `engine.tasks.identity`.
        """
        self.task, self.config, self.layout, self.facts = task, config, layout, facts
        self.session, self.world = session, session.world
        self.output = Path(config.output)
        self.source = task.train_source()
        self.total = config.train.total_steps(self.source.epoch_size(0))
        check_profile(config.train, self.total)
        self.step, self.loss, self.ends_early = 0, math.nan, False
        self.best: Best | None = None
        self.evaluation: Evaluation | None = None
        state = None if start is None else checkpoint.read_state(start)
        self.cursor = Cursor() if state is None else state.cursor
        self.described = described(task.model_config, task.export_class(task.model_config))
        self._build_engine(deepspeed)
        self.tokenizer = saved_files(task.vocabulary) if self.world.is_main else {}
        self.saver = Saver(
            self.output / "checkpoints",
            config.train.keep,
            background=config.train.async_save,
            kept_steps=config.train.saved_steps,
            meaning={CONFIG_FILE: self.described.to_json_string().encode(), **self.tokenizer},
        )
        self.meter = Meter(self.zero.device)
        self._open_output(start, state, deepspeed)
        self._build_observers(resumed=start is not None)

    def _build_engine(self, deepspeed: dict[str, Any]) -> None:
        """Fork the loader's processes, then build the model and engine, which they must not copy; collective."""
        config, train = self.config, self.config.train
        share_with_forks()
        self.batches: Generator[MicroBatch, None, None] | None = dist.agreed(self._load)
        model = dist.agreed(self.task.build_model)
        stepping = self.world.device if config.zero.offload_optimizer == "none" else torch.device("cpu")
        optimizer = build_optimizer(model, config.optim, stepping, train.zero_stage)
        self.zero = ZeroEngine(model, optimizer, deepspeed, in_base(model, self.task.loaded), self.task.passes)
        self.adapting = Adapting(self.zero, self.task.adaptation, config.prune, self.total)
        self.regularising = Regularising(self.zero, config.regularise, self.total, self.task.loaded)
        dist.seed_everything(config.seed, self.world.rank)  # building drew numbers; a resume restores states later

    def _open_output(self, start: Path | None, state: checkpoint.RunState | None, deepspeed: dict[str, Any]) -> None:
        """Set aside what an earlier run left in the folder, resume, and begin the curves; collective.

        In this order: a resume may copy the best weights there, and the curves begin at its step.
        """
        self.output.mkdir(parents=True, exist_ok=True)
        if self.world.is_main:
            earlier.make_room(self.output, start)
        if start is not None and state is not None:
            self._resume(start, state)
        self.monitor = Monitor(self.config, self.step)
        if self.world.is_main:
            self._record_config(deepspeed)
            if start is None:
                tell_loaded(self.task, self.config)

    def _build_observers(self, *, resumed: bool) -> None:
        """Attach the observers of steps to the engine, once its states are loaded; collective."""
        train = self.config.train
        self.certificate = UpdateCertificate(self.zero, self.config.optim, train.verify_update, self.output)
        self.audit = Audit(self.zero.model.module, self.output, self.step, enabled=train.audit)
        self.profile = Profile(self.config, self.zero, self.task.flops, self.total - self.step)
        self.guard = Guard(self.session, self.zero, self.step if resumed else None, self.total)

    def _resume(self, path: Path, state: checkpoint.RunState) -> None:
        checkpoint.load(self.zero, path, state)
        self.step, self.cursor, self.ends_early = state.step, state.cursor, False
        self.best = dist.gather_objects(best.regain(state, path, self.output) if self.world.is_main else None)[0]
        self.meter.restore(state.meter)
        told = [
            checkpoint.resumption(state, path, self.world.size, self.config.to_dict()),
            *self.saver.resume(path, state.step),
        ]
        for line in told:
            say(line)

    def _record_config(self, deepspeed: dict[str, Any]) -> None:
        """Write the configuration and the DeepSpeed dict to the run's folder and its curves."""
        values = self.config.to_dict()
        values["optim"]["betas"] = list(values["optim"]["betas"])
        record_config(self.output, values, deepspeed)
        self.monitor.config(values, deepspeed, self.step)
        self.monitor.begin(replace(self.config, train=replace(self.config.train, steps=self.total)))

    def run(self) -> RunResult:
        """Train to the last step or to an early end, then evaluate, save and export.

        Raises:
            Stopped: all ranks were asked to stop, and have saved.
        """
        self.progress = Progress(self.step, self.total, self.world.is_main)
        try:
            self._train_to_the_end()
            if self.evaluation is None:
                self.evaluate()
            self.guard.check()
        except Stopped as stopped:
            self._save_and_stop(stopped.stop)
            raise
        self.saver.wait()
        self.adapting.prove_trained(self.output)
        self.export_if_last()
        self.saver.wait()
        self.progress.close()
        self.monitor.end(self.step)
        return RunResult(self.step, self.loss, self.evaluation, self.output / "export", self.best)

    def _train_to_the_end(self) -> None:
        release_freed()  # memory that building the model took
        keep_heap()
        give_way(torch.get_num_threads())
        self.guard.check()
        impatient = best.patience_is_over(self.best, self.step, self.config.train)
        if self.step < self.total and (impatient or pending_evaluation(self.output, self.step)):
            self.evaluate()
        while not self.over:
            batches, self.batches = self.batches or self._load(), None
            try:
                with contextlib.closing(batches):
                    self._train(batches)
            except RollBack as back:
                self._roll_back(back)

    def _load(self) -> Generator[MicroBatch, None, None]:
        pin = self.world.device.type == "cuda"
        return training_batches(self.source, self.layout, self.cursor, self.config.data.workers, pin=pin)

    def _train(self, batches: Iterator[MicroBatch]) -> None:
        train, saved_steps = self.config.train, self.config.train.saved_steps
        batches = self.profile.batches(batches)
        observer = self._observer()
        while not self.over:
            with self.profile.step(self.step + 1):
                self.train_step(batches, observer)
                self.saver.poll()
                if self._due(train.log_interval):
                    self.write_point()
            self.meter.exclude(self.profile.between(self.step, self.monitor.text))
            if self._due(train.eval_interval):
                self.evaluate()
                self.guard.check()
            self.guard.stop_if_asked()
            if self._due(train.save_interval) or self.step in saved_steps:
                self.save()
                self.guard.check()

    def _roll_back(self, back: RollBack) -> None:
        """Go back to the newest intact checkpoint; collective.

        Raises:
            RunError: there is none.
        """
        self.saver.wait()
        path = checkpoint.newest_intact(self.output / "checkpoints")
        if path is None:
            raise RunError(f"{back}, and there is no checkpoint to roll back to; set train.save_interval")
        say(f"{back}: rolling back, and leaving its batch out")
        self._resume(path, checkpoint.read_state(path))
        self.guard.policy.go_back(self.step)
        self.monitor.close()
        self.monitor = Monitor(self.config, self.step)
        self.progress.close()
        self.progress = Progress(self.step, self.total, self.world.is_main)

    def _save_and_stop(self, stop: Stop) -> None:
        """Make a checkpoint of the last step and mark the run to be resumed (`REQUEUE`); collective.

        Raises:
            RunError: the checkpoint can't be written, or must not be.
        """
        saved = None
        if self.config.train.save_interval is None:
            if not stop.by_a_person:
                raise unsaved(stop, self.step)
        elif self.step > 0:
            self.save(required=True)
            self.saver.wait()
            saved = self.output / "checkpoints" / checkpoint.checkpoint_name(self.step)
        say(self.session.preempted(stop, self.step, saved))
        self.progress.close()
        self.monitor.close()

    def _due(self, interval: int | None) -> bool:
        if interval is None:
            return False
        return self.over or (interval > 0 and self.step % interval == 0)

    @property
    def over(self) -> bool:
        """Whether the last step is done, or patience with the evaluations has ended."""
        return self.ends_early or self.step == self.total

    def train_step(self, batches: Iterator[MicroBatch], observer: StepObserver) -> None:
        """One optimizer step over a global batch: the passes of its micro-batches, then the update."""
        self._leave_out(batches)
        rate = learning_rate(self.step, self.total, self.config.optim)
        self.regularising.before_step(self.step)
        with observer.step(self.step + 1, rate, self.cursor):
            ahead = self.task.ahead(self.zero.model, self.guard.fetched(batches, self.layout.accumulation))
            for index in range(self.zero.accumulation):
                last = index + 1 == self.zero.accumulation
                observer.before_fetch()
                batch = next(ahead)
                output = self.adapting.penalised(self.task.step(self.zero.model, batch))
                observer.before_backward(batch, output)
                self.zero.backward(output.loss)
                observer.before_update(last=last)
                self.zero.step(rate, last_micro_batch=last, observe=last and observer.measures_norms)
                observer.after_update()
            self.adapting.after_update()
            self.step, self.cursor = self.step + 1, batch.cursor
            observer.after_step(self.cursor)

    def _leave_out(self, batches: Iterator[MicroBatch]) -> None:
        """Skip the global batches that a rollback leaves out."""
        while self.guard.skips(self.cursor):
            for _ in range(self.layout.accumulation):
                self.cursor = next(batches).cursor

    def _observer(self) -> StepObserver:
        """A new observer of the steps up to the end of the run or to a rollback."""
        return StepObserver(
            self.zero,
            self.guard,
            self.audit,
            self.certificate,
            self.profile,
            self.meter,
            self.monitor,
            self.progress,
            self.config.monitor.norm_interval,
            architecture_of(self.task.model_config).layer_of,
        )

    def write_point(self) -> None:
        """Write a point of the training curves, if any update since the last one was applied; collective."""
        if self.meter.steps == 0:
            return
        timed = max(1, self.meter.timed_steps)
        values = {f"train/{name}": value for name, value in self.meter.point().items()}
        self.loss = values["train/loss"]
        values["train/learning_rate"] = learning_rate(self.step - 1, self.total, self.config.optim)
        values["train/memory_bytes"] = float(memory_bytes(self.zero.device))
        norm = self.zero.grad_norm()
        if norm is not None:
            values["train/grad_norm"] = norm
        if self.zero.loss_scale is not None:
            values["train/loss_scale"] = self.zero.loss_scale
            values["train/skipped_steps"] = float(self.zero.skipped_steps)
        self.monitor.scalars(values, self.step)
        self.progress.point(self.step, values)
        self.guard.point(self.loss, values["train/tokens_per_second"], timed)
        if fault := found_late(self.step, self.loss, norm if self.guard.policy.minds_gradients else None):
            self.saver.wait()
            raise fault

    def evaluate(self) -> None:
        """Evaluate on held-out data, write its curves, and export the model if it is the best so far; collective."""
        source = self.task.evaluation_source("validation")
        if source is None:
            return
        start = time.perf_counter()
        with self.guard.evaluating(self.step):
            self.evaluation = evaluation.evaluate(
                self.task, source, self.zero, self.guard, self.world, self.layout.micro_batch
            )
            better = self.adapting.may_be_best and best.is_better(self.evaluation, self.best, self.task)
            if self.world.is_main:
                praise = f"; the best {self.task.best_metric} so far" if better else ""
                texts = self.config.monitor.texts
                evaluation.tell(self.evaluation, self.step, self.monitor, texts=texts, praise=praise)
            if better:
                self.best = best.of_evaluation(self.evaluation, self.step, self.task)
                self.export()
        self.ends_early = best.ends_early(self.best, self.step, self.total, self.task, self.config.train)
        self.meter.exclude(time.perf_counter() - start)

    def save(self, *, required: bool = False) -> None:
        """Begin to write a checkpoint of the current step; collective.

        Args:
            required: whether the run must not go on without it, as with that of the last step.

        Raises:
            RunError: it is required and can't be written.
        """
        start = time.perf_counter()
        state = checkpoint.RunState(
            step=self.step,
            cursor=self.cursor,
            world_size=self.world.size,
            config=json.loads(json.dumps(self.config.to_dict())),
            **best.recorded(self.best),
            facts=self.facts,
            micro_batch=self.layout.micro_batch,
            meter=self.meter.state(),
        )
        with self.guard.doing("saving"):
            self.saver.save(self.zero, state, required=required or self.over)
            self.guard.saved()
        self.meter.exclude(time.perf_counter() - start)

    def export_if_last(self) -> None:
        """Export the final weights, unless the export holds the best ones."""
        if self.task.best_metric is None or self.best is None:
            self.export()

    def export(self) -> None:
        """Write the current weights as a Hugging Face folder, once a save in progress has ended; collective.

        Raises:
            UserError: on every rank, if transformers doesn't compute from the folder what the run's model does; the
                weights are in a checkpoint, even where the run wants none.
        """
        self.saver.wait()
        weights = self.zero.full_state_dict()
        try:
            dist.agreed(lambda: self._write_export(weights) if self.world.is_main else None)
        except UserError:
            self.save(required=True)
            self.saver.wait()
            raise

    def _write_export(self, weights: dict[str, Tensor]) -> None:
        best, out = (self.step, self.best, self.evaluation, self.facts), self.output / "export"
        write_export(self.task, weights, self.described, self.tokenizer, out, *best)
