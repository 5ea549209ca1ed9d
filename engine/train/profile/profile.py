"""Records a few steps: a trace for TensorBoard and Perfetto, where their time went, and MFU.

MFU (model FLOPs utilisation) is that of Chowdhery et al. 2022 (PaLM), appendix B: the FLOPs that the model needs for
its tokens, without recomputation, over time and peak. The peak is measured, not a data sheet's: `engine.kernels.gemm`.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from engine import dist
from engine.config import RunConfig, TrainConfig
from engine.data.loading.source import MicroBatch
from engine.durable import write_atomically
from engine.errors import require
from engine.kernels.gemm import GemmPeak, measure_peak
from engine.precision import DTYPES
from engine.train.log import say
from engine.train.profile.breakdown import RankRecord, Summary, summarise
from engine.train.profile.recording import DATA, Recording
from engine.zero.engine import ZeroEngine

#: further steps, after those that the certificate verifies, in which allocations and compilation still happen
WARM_UP = 2
#: bytes of a trace above which it is compressed
LARGE = 32 << 20


def warm_up_steps(train: TrainConfig) -> int:
    """Number of steps of a start before the recorded ones."""
    return train.verify_update + WARM_UP


def check_profile(train: TrainConfig, total: int) -> None:
    """Refuse to record more steps than a run of `total` steps has after its warm-up.

    Raises:
        UserError: names train.profile.
    """
    if train.profile is not None:
        left = total - warm_up_steps(train)
        remedy = f"give at most {left}" if left > 0 else "give the run more steps"
        require(
            train.profile <= left,
            "train.profile",
            train.profile,
            f"the run has {total} steps, and its first {warm_up_steps(train)} are not recorded; {remedy}",
        )


class Profile:
    """Records steps once per start, through calls of the loop at step boundaries; at other steps it does nothing."""

    def __init__(self, config: RunConfig, zero: ZeroEngine, flops: Callable[[MicroBatch], float], left: int) -> None:
        """
        Args:
            config: the run's configuration.
            zero: the engine.
            flops: of the forward and backward pass of a micro-batch.
            left: steps that this start still has to do; with too few of them it records none.
        """
        self._zero, self._folder = zero, Path(config.output) / "profile"
        self._dtype = DTYPES[config.train.precision]
        self._warm_up = warm_up_steps(config.train)
        self._wanted = config.train.profile or 0
        self._note = ""
        if self._wanted and self._wanted > left - self._warm_up:
            self._note = f"profile: left out, {left} steps are left and the first {self._warm_up} are not recorded"
            self._wanted = 0
        self._flops = flops
        self._done = 0
        self._recording: Recording | None = None

    def part(self, name: str) -> AbstractContextManager[None]:
        """What happens inside belongs to a part of the current step, one of `PARTS`."""
        return nullcontext() if self._recording is None else self._recording.part(name)

    def batches(self, batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        """The same micro-batches, with the time to wait for them as a part of the step."""
        return self._watched(batches) if self._wanted else batches

    def _watched(self, batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        while True:
            with self.part(DATA):
                batch = next(batches)
            if self._recording is not None:
                self._recording.arrived(batch)
            yield batch

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Encloses optimizer step `number`, from 1, and its point of the curves; an error discards the recording."""
        try:
            with nullcontext() if self._recording is None else self._recording.step(number):
                yield
        except BaseException:
            if self._recording is not None:
                self._recording.stop()
                self._recording = None
            raise
        self._done += 1

    def between(self, step: int, text: Callable[[str, str, int], None]) -> float:
        """Called after each step: begins to record, or ends the recording and reports it; collective.

        Args:
            step: steps done.
            text: writes Markdown to TensorBoard, given tag, text and step.

        Returns:
            Seconds that this took, to be excluded from the throughput.
        """
        if self._note:
            say(self._note)
            self._note = ""
        begins = self._recording is None and self._wanted > 0 and self._done >= self._warm_up
        ends = self._recording is not None and self._recording.steps == self._wanted
        if not (begins or ends):
            return 0.0
        start = time.perf_counter()
        if self._recording is None:
            self._recording = Recording(self._zero, self._flops)
        else:
            recording, self._recording, self._wanted = self._recording, None, 0
            self._conclude(recording, step, text)
        return time.perf_counter() - start

    def _conclude(self, recording: Recording, step: int, text: Callable[[str, str, int], None]) -> None:
        recording.stop()
        peak = self._peak()
        trace, fault = self._write_trace(recording.profiler)
        own = RankRecord(recording.parts(), recording.operators(), recording.flops, recording.tokens, peak, trace)
        gathered = dist.gather_objects((own, fault))
        records, faults = [record for record, _ in gathered], [one for _, one in gathered if one]
        summary = summarise(records, step - recording.steps + 1, recording.steps, self._zero.device.type)
        if dist.place()[0] == 0:
            self._tell(summary, faults)
            text("profile/summary", "\n".join(["```", *summary.lines(), "```"]), step)

    def _peak(self) -> GemmPeak | None:
        """This rank's GEMM peak, measured on all ranks at once, since they share a machine in steps too; collective."""
        dist.barrier()
        try:
            return measure_peak(self._dtype, self._zero.device)
        except torch.OutOfMemoryError:
            return None

    def _write_trace(self, profiler: torch.profiler.profile) -> tuple[str, str]:
        """Write this rank's trace; its path, and the error that kept it from being written, or an empty string."""
        path = self._folder / f"rank{dist.place()[0]}.pt.trace.json"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            for old in (path, compressed(path)):
                old.unlink(missing_ok=True)
            profiler.export_chrome_trace(str(path))
            return str(compress(path) if path.stat().st_size > LARGE else path), ""
        except (OSError, RuntimeError) as error:
            return str(path), f"{path} was not written: {error}"

    def _tell(self, summary: Summary, faults: list[str]) -> None:
        try:
            write_atomically(self._folder / "summary.json", json.dumps(summary.to_dict(), indent=2) + "\n")
        except OSError as error:
            faults.append(f"{self._folder / 'summary.json'} was not written: {error}")
        opens = f"  {summary.traces[0]} opens in https://ui.perfetto.dev and in TensorBoard's profile plugin"
        for line in [*summary.lines(), *(f"  {fault}" for fault in faults), *([] if faults else [opens])]:
            say(line)


def compressed(path: Path) -> Path:
    """The name of a file once `compress` has replaced it."""
    return path.with_name(path.name + ".gz")


def compress(path: Path) -> Path:
    """Replace a file by its gzip."""
    with path.open("rb") as whole, gzip.open(compressed(path), "wb", compresslevel=3) as small:
        shutil.copyfileobj(whole, small)
    path.unlink()
    return compressed(path)
