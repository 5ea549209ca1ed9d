"""TensorBoard's event files: titles of curves, restarts and hyper-parameters beside the points themselves."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine.config import ModelConfig, OptimConfig, RunConfig, TrainConfig, task_entries
from engine.train.curves.titles import title_of

Point = tuple[str, float, int]
"""tag, value, global step"""
#: fields of each section of the configuration that are hyper-parameters in TensorBoard
COMPARED: dict[type, tuple[str, ...]] = {
    RunConfig: ("task", "seed"),
    ModelConfig: tuple(field.name for field in dataclasses.fields(ModelConfig)),
    OptimConfig: tuple(field.name for field in dataclasses.fields(OptimConfig)),
    TrainConfig: ("global_batch", "steps", "epochs", "zero_stage", "precision"),
}


class TensorBoardCurves:
    """Replaces DeepSpeed's TensorBoard monitor in its MonitorMaster: gives curves titles, and writes no point twice."""

    def __init__(self, monitor: Any, first_step: int) -> None:
        """
        Args:
            monitor: DeepSpeed's TensorBoard monitor.
            first_step: steps done at this start, 0 for a new run.
        """
        self.writer = monitor.summary_writer
        self._first_step = first_step
        self._titled: set[str] = set()
        self._there: dict[str, float] | None = None
        if first_step > 0:
            self.writer.file_writer.add_event(restart_event(first_step + 1))

    def write_events(self, points: Sequence[Point]) -> None:
        """Write points and flush them."""
        for tag, value, step in points:
            if step == self._first_step and self._is_there(tag, value):
                continue
            summary = scalar(tag, value, titled=tag not in self._titled)
            self._titled.add(tag)
            self.writer.file_writer.add_summary(summary, step)
        self.writer.flush()

    def _is_there(self, tag: str, value: float) -> bool:
        """Whether an earlier start wrote the point: a finished run that is started again repeats its evaluation."""
        if self._there is None:
            self._there = points_at(Path(self.writer.log_dir), self._first_step) if self._first_step else {}
        return bool(self._there.get(tag) == np.float32(value))


def restart_event(step: int) -> Any:
    """The event that tells TensorBoard that a run restarts at `step`: it drops later points of the killed start."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    return Event(wall_time=time.time(), step=step, session_log=SessionLog(status=SessionLog.START))


def scalar(tag: str, value: float, *, titled: bool) -> Any:
    """A point of a curve; `titled` for the first point in a file, which carries title and description."""
    from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_SCALAR, Summary
    from tensorboard.plugins.scalar.metadata import create_summary_metadata

    point = Summary.Value(tag=tag, simple_value=float(value))
    if titled:
        title = title_of(tag)
        point.metadata.CopyFrom(create_summary_metadata(title.name, title.description))
        point.metadata.data_class = DATA_CLASS_SCALAR  # TensorBoard's fast loader drops the titles of points without it
    return Summary(value=[point])


def points_at(folder: Path, step: int) -> dict[str, float]:
    """Values at one step of all curves in a folder's event files, by tag, rounded to fp32."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    points: dict[str, float] = {}
    for path in sorted(folder.glob("events.out.tfevents.*")):
        for event in LegacyEventFileLoader(str(path)).Load():
            if event.step == step:
                points |= {
                    value.tag: value.simple_value for value in event.summary.value if value.HasField("simple_value")
                }
    return points


def session_start(config: RunConfig) -> list[Any]:
    """Summaries for TensorBoard's HParams page: hyper-parameters, and which curves are results (metrics).

    The list of results is the same in every run, because TensorBoard takes that of any one run.
    """
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

    kinds = {"bool": api_pb2.DATA_TYPE_BOOL, "number": api_pb2.DATA_TYPE_FLOAT64, "string": api_pb2.DATA_TYPE_STRING}
    started = plugin_data_pb2.SessionStartInfo(start_time_secs=time.time())
    experiment = api_pb2.Experiment()
    for name, kind, value in hyperparameters(config):
        experiment.hparam_infos.add(name=name, type=kinds[kind])
        if value is not None:
            setattr(started.hparams[name], f"{kind}_value", value)
    for tag in results():
        experiment.metric_infos.add(name=api_pb2.MetricName(tag=tag), display_name=title_of(tag).name)
    return [
        _hparams(metadata.EXPERIMENT_TAG, experiment=experiment),
        _hparams(metadata.SESSION_START_INFO_TAG, session_start_info=started),
    ]


def results() -> list[str]:
    """Tags of the curves whose last values are a run's results, of all tasks."""
    return [*(tag for entry in task_entries() for tag in entry.results), "train/loss", "train/tokens_per_second"]


def session_end() -> Any:
    """A summary for TensorBoard's HParams page: the run has come to its end."""
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

    ended = plugin_data_pb2.SessionEndInfo(status=api_pb2.STATUS_SUCCESS, end_time_secs=time.time())
    return _hparams(metadata.SESSION_END_INFO_TAG, session_end_info=ended)


def _hparams(tag: str, **content: Any) -> Any:
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import metadata, plugin_data_pb2

    described = metadata.create_summary_metadata(plugin_data_pb2.HParamsPluginData(**content))
    return Summary(value=[Summary.Value(tag=tag, metadata=described)])  # a tensor would count among the run's texts


def hyperparameters(config: RunConfig) -> list[tuple[str, str, bool | float | str | None]]:
    """Dotted name, kind (bool, number or string) and value of each hyper-parameter; None where it is not set."""
    of_tasks: dict[str, tuple[str, ...]] = {}
    for entry in task_entries():
        of_tasks[entry.section] = tuple(dict.fromkeys((*of_tasks.get(entry.section, ()), *entry.compared)))
    parts = [("", config), *((f"{name}.", config.part(name)) for name in ("model", *of_tasks, "optim", "train"))]
    pairs = []
    for prefix, part in parts:
        kinds = {field.name: _kind(str(field.type)) for field in dataclasses.fields(part)}
        for name in COMPARED.get(type(part)) or of_tasks[prefix[:-1]]:
            value = getattr(part, name)
            shown = value if value is None or kinds[name] != "string" else str(value)
            pairs.append((prefix + name, kinds[name], shown))
    return pairs


def _kind(annotation: str) -> str:
    """TensorBoard's kind for a field of the configuration.

    >>> [_kind(annotation) for annotation in ("bool", "float | None", "tuple[float, float]")]
    ['bool', 'number', 'string']
    """
    if annotation == "bool":
        return "bool"
    return "number" if annotation.removesuffix(" | None") in ("int", "float") else "string"
