"""Curves: TensorBoard, CSV and Weights & Biases through DeepSpeed's MonitorMaster, and lines for people."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engine.config import MonitorConfig, RunConfig
from engine.errors import UserError
from engine.train import norms
from engine.train.norms import ParameterNorms


def monitor_section(config: MonitorConfig, output: Path) -> dict[str, Any]:
    """DeepSpeed's monitor settings: each back end under the run's own folder."""
    section: dict[str, Any] = {
        "tensorboard": {"enabled": config.tensorboard, "output_path": str(output), "job_name": "tensorboard"},
        "csv_monitor": {"enabled": config.csv, "output_path": str(output), "job_name": "csv"},
    }
    if config.wandb:
        section["wandb"] = {"enabled": True, "project": config.wandb_project, "group": config.wandb_group}
    return section


def check_monitor(config: MonitorConfig) -> None:
    """Refuse Weights & Biases where it isn't installed (DeepSpeed would fail in the middle of the start).

    Raises:
        UserError: names monitor.wandb and the package.
    """
    if config.wandb:
        try:
            import wandb  # noqa: F401
        except ImportError as error:
            raise UserError("monitor.wandb: true needs the package wandb; pip install wandb, or turn it off") from error


class Monitor:
    """Writes curves, texts and pictures of a run; does nothing on ranks other than 0."""

    def __init__(self, config: RunConfig, first_step: int) -> None:
        from deepspeed.monitor.config import get_monitor_config
        from deepspeed.monitor.monitor import MonitorMaster

        self._master = MonitorMaster(get_monitor_config(monitor_section(config.monitor, Path(config.output))))
        tensorboard = self._master.tb_monitor
        self._writer = tensorboard.summary_writer if tensorboard is not None else None
        if self._writer is not None and first_step > 0:
            self._writer.file_writer.add_event(restart_event(first_step + 1))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write points of curves at a global step."""
        self._master.write_events([(tag, value, step) for tag, value in values.items()])

    def norms(self, found: Mapping[str, ParameterNorms], step: int) -> None:
        """Write curves a layer, and to TensorBoard histograms over parameters."""
        self.scalars(norms.curves(found), step)
        for tag, values in norms.histograms(found).items() if self._writer is not None else ():
            self._writer.add_histogram(tag, np.asarray(values), step)  # type: ignore[union-attr]

    def text(self, tag: str, markdown: str, step: int) -> None:
        """Write Markdown to TensorBoard."""
        if self._writer is not None:
            self._writer.add_text(tag, markdown, step)

    def image(self, tag: str, pixels: NDArray[np.uint8], step: int) -> None:
        """Write a picture [height, width, 3] to TensorBoard."""
        if self._writer is not None:
            self._writer.add_image(tag, pixels, step, dataformats="HWC")

    def config(self, config: dict[str, Any], deepspeed: dict[str, Any], step: int) -> None:
        """Write the run's configuration and its DeepSpeed dict as text."""
        for tag, values in (("config/run", config), ("config/deepspeed", deepspeed)):
            self.text(tag, "```json\n" + json.dumps(values, indent=2) + "\n```", step)

    def close(self) -> None:
        """Flush what is pending."""
        if self._writer is not None:
            self._writer.close()


def restart_event(step: int) -> Any:
    """What tells TensorBoard that a run starts again at `step`: later points of the run that died don't count."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    return Event(wall_time=time.time(), step=step, session_log=SessionLog(status=SessionLog.START))


def memory_bytes(device: torch.device) -> int:
    """Peak memory of this rank: allocated on its GPU, or resident in its process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) if sys.platform == "darwin" else int(peak) * 1024


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Progress:
    """A progress bar on a terminal; elsewhere a plain line at every point of the curves."""

    def __init__(self, first_step: int, total: int, enabled: bool) -> None:
        from tqdm import tqdm

        self._enabled, self._first, self._total, self._start = enabled, first_step, total, time.monotonic()
        self._terminal = enabled and sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=first_step, unit="step", disable=not self._terminal, dynamic_ncols=True)

    def advance(self) -> None:
        """One step is done."""
        self._bar.update()

    def point(self, step: int, values: Mapping[str, float]) -> None:
        """Show the newest point of the curves; `step` steps are done."""
        shown = {"loss": f"{values['train/loss']:.4f}", "lr": f"{values['train/learning_rate']:.2e}"}
        shown["tokens/s"] = f"{values['train/tokens_per_second']:,.0f}"
        if self._terminal:
            self._bar.set_postfix(shown)
        elif self._enabled:
            left = (time.monotonic() - self._start) / max(1, step - self._first) * (self._total - step)
            fields = "  ".join(f"{name} {value}" for name, value in shown.items())
            print(f"step {step}/{self._total}  {fields}  left {duration(left)}", flush=True)

    def say(self, line: str) -> None:
        """Print a line without breaking the bar."""
        if self._enabled:
            self._bar.write(line, file=sys.stdout)
            sys.stdout.flush()

    def close(self) -> None:
        self._bar.close()
