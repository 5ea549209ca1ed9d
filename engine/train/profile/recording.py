"""Steps under torch's profiler: their parts, the operators and collectives in them, their tokens and FLOPs."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from types import FunctionType
from typing import Any

import torch

from engine.data.loading.source import MicroBatch
from engine.train.profile.breakdown import PARTS, Operators, operators
from engine.zero.engine import ZeroEngine

DATA, FORWARD, BACKWARD, REDUCTION, OPTIMIZER, OTHER = PARTS
#: prefix by which TensorBoard's profile plugin recognises a step
STEP = "ProfilerStep"


class Clock:
    """Measures the parts of steps in seconds; nested parts count for the innermost one alone.

    On a GPU a part lasts from its first kernel to its last: it is measured by events on the current stream, so the
    host need not wait.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_device = device.type == "cuda"
        self._part: str | None = None
        self._marks: list[tuple[str | None, Any]] = []

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What happens inside counts for this part, and for no outer one."""
        outer = self._part
        self._mark(name)
        try:
            yield
        finally:
            self._mark(outer)

    def _mark(self, begins: str | None) -> None:
        now: Any = time.perf_counter()
        if self._on_device:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        self._marks.append((self._part, now))
        self._part = begins

    def seconds(self) -> dict[str, float]:
        """Seconds of each part; waits for the device."""
        if self._on_device:
            torch.cuda.synchronize()
        totals = dict.fromkeys(PARTS, 0.0)
        for (_, begin), (part, end) in zip(self._marks, self._marks[1:], strict=False):
            if part is not None:
                totals[part] += begin.elapsed_time(end) / 1000 if self._on_device else end - begin
        return totals


class Recording:
    """Steps under torch's profiler."""

    def __init__(self, zero: ZeroEngine, flops: Callable[[MicroBatch], float]) -> None:
        self._zero, self._flops = zero, flops
        self._clock = Clock(zero.device)
        self._on_device = zero.device.type == "cuda"
        self.steps, self.tokens, self.flops = 0, 0, 0.0
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._on_device:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        else:  # Kineto logs two lines per recording at a level above that of its errors, which a GPU's user must see
            os.environ.setdefault("KINETO_LOG_LEVEL", "6")
        self.profiler = torch.profiler.profile(activities=activities)
        self._watching = contextlib.ExitStack()
        self._watching.enter_context(wrapped(zero.wrapper.reductions, lambda _: self.part(REDUCTION)))
        self._watching.enter_context(watched_collectives())
        self.profiler.start()

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A part of a step, which is also a range in the trace."""
        with torch.profiler.record_function(name), self._clock.part(name):
            yield

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """A whole optimizer step; time in no other part counts as `OTHER`."""
        with torch.profiler.record_function(f"{STEP}#{number}"), self._clock.part(OTHER):
            yield
        self.steps += 1

    def arrived(self, batch: MicroBatch) -> None:
        """Count the tokens and FLOPs of a micro-batch that is still on the host."""
        self.tokens += int(batch.inputs["lengths"].sum())
        self.flops += self._flops(batch)

    def stop(self) -> None:
        """End the recording."""
        self.profiler.stop()
        self._watching.close()

    def parts(self) -> dict[str, float]:
        """Seconds of each part over all steps."""
        return self._clock.seconds()

    def operators(self) -> Operators:
        """Operators of the steps: on CPUs those of the rank's main thread, on a GPU the kernels of all threads."""
        events: list[Any] = list(self.profiler.events() or [])
        steps = [event for event in events if event.name.startswith(STEP) and _on_host(event)]
        if not self._on_device:
            return operators(steps, on_device=False)
        spans = [(step.time_range.start, step.time_range.end) for step in steps]
        roots = [event for event in events if event.cpu_parent is None and _on_host(event)]
        inside = [root for root in roots if any(start <= root.time_range.start < end for start, end in spans)]
        return operators(inside, on_device=True)


def _on_host(event: Any) -> bool:
    return bool(event.device_type.name == "CPU")


def watched_collectives() -> AbstractContextManager[None]:
    """Make each collective a range in the trace; torch's own range ends before the wait for the other ranks."""
    import deepspeed

    prefixes = ("all_", "barrier", "broadcast", "gather", "reduce", "scatter")
    methods = [
        (module, name)
        for module in (torch.distributed, deepspeed.comm)
        for name, function in vars(module).items()
        if name.startswith(prefixes) and type(function) is FunctionType  # deprecated names warn on any attribute access
    ]
    return wrapped(methods, lambda name: torch.profiler.record_function(f"communication: {name}"))


@contextlib.contextmanager
def wrapped(methods: Sequence[tuple[Any, str]], around: Callable[[str], AbstractContextManager[Any]]) -> Iterator[None]:
    """Wrap methods (object, name) in `around(name)` inside this context; afterwards the originals are restored."""

    def inside(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            with around(name):
                return method(*arguments, **options)

        return call

    own = [(owner, name, vars(owner).get(name)) for owner, name in methods]
    for owner, name in methods:
        setattr(owner, name, inside(name, getattr(owner, name)))
    try:
        yield
    finally:
        for owner, name, before in own:
            if before is None:
                delattr(owner, name)
            else:
                setattr(owner, name, before)
