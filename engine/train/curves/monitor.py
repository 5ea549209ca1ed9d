"""Curves: TensorBoard, CSV and Weights & Biases through DeepSpeed's MonitorMaster, and lines on the terminal."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engine.config import MonitorConfig, RunConfig
from engine.errors import UserError
from engine.optim.layout import ParameterNorms
from engine.tasks.task import Evaluation
from engine.train.curves import events, norms
from engine.train.curves.csv_files import CsvCurves
from engine.train.log import say

#: share of a run's steps, or seconds, between lines that stay above the progress bar on a terminal
HISTORY_SHARE, HISTORY_SECONDS = 1 / 200, 60.0


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
    """Writes curves, texts and images of a run; does nothing on ranks other than 0."""

    def __init__(self, config: RunConfig, first_step: int) -> None:
        """
        Args:
            config: the run's configuration.
            first_step: steps done; points of later steps, from an earlier start, no longer count.
        """
        from deepspeed.monitor.config import get_monitor_config
        from deepspeed.monitor.monitor import MonitorMaster

        self._master = MonitorMaster(get_monitor_config(monitor_section(config.monitor, Path(config.output))))
        self._writer = None
        if self._master.tb_monitor is not None:
            self._master.tb_monitor = events.TensorBoardCurves(self._master.tb_monitor, first_step)
            self._writer = self._master.tb_monitor.writer
        if self._master.csv_monitor is not None:
            self._master.csv_monitor = CsvCurves(self._master.csv_monitor, first_step)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write a point at a global step to each curve: `values` by tag."""
        self._master.write_events([(tag, value, step) for tag, value in values.items()])

    def norms(self, parameters: Mapping[str, ParameterNorms], layer_of: Callable[[str], str], step: int) -> None:
        """Write norms as curves per layer, and to TensorBoard as histograms over parameters."""
        self.scalars(norms.curves(parameters, layer_of), step)
        for tag, values in norms.histograms(parameters).items() if self._writer is not None else ():
            self._writer.add_histogram(tag, np.asarray(values), step)  # type: ignore[union-attr]

    def text(self, tag: str, markdown: str, step: int) -> None:
        """Write Markdown to TensorBoard."""
        if self._writer is not None:
            self._writer.add_text(tag, markdown, step)

    def image(self, tag: str, pixels: NDArray[np.uint8], step: int) -> None:
        """Write an RGB image, uint8 [height, width, 3], to TensorBoard."""
        if self._writer is not None:
            self._writer.add_image(tag, pixels, step, dataformats="HWC")

    def config(self, config: dict[str, Any], deepspeed: dict[str, Any], step: int) -> None:
        """Write the run's configuration and its DeepSpeed dict as text."""
        for tag, values in (("config/run", config), ("config/deepspeed", deepspeed)):
            self.text(tag, "```json\n" + json.dumps(values, indent=2) + "\n```", step)

    def begin(self, config: RunConfig) -> None:
        """Put the run on TensorBoard's HParams page."""
        for summary in events.session_start(config) if self._writer is not None else ():
            self._writer.file_writer.add_summary(summary, 0)  # type: ignore[union-attr]

    def end(self, step: int) -> None:
        """Mark the run as done on that page, and close."""
        if self._writer is not None:
            self._writer.file_writer.add_summary(events.session_end(), step)
        self.close()

    def close(self) -> None:
        """Flush pending points and close the writers."""
        if self._writer is not None:
            self._writer.close()


def write_report(config: RunConfig, step: int, split: str, evaluation: Evaluation, text: str) -> None:
    """Write the final report to the curves of a finished run; on rank 0.

    Args:
        step: the run's last step.
        split: split that the report is about; scores of "test" become points, those of "validation" are curves already.
        evaluation: the scores on that split.
        text: the report in Markdown.
    """
    monitor = Monitor(config, step)
    if split == "test":
        monitor.scalars({f"test/{name}": value for name, value in evaluation.scalars.items()}, step)
        for name, pixels in evaluation.images.items():
            monitor.image(f"test/{name}", pixels, step)
    monitor.text(f"report/{split}", f"```\n{text}\n```", step)
    monitor.close()


def memory_bytes(device: torch.device) -> int:
    """Peak memory of this rank in bytes: allocated on its GPU, or on a CPU the resident set of its process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    status = Path("/proc/self/status")  # Linux's, where ru_maxrss includes the process that started this one
    for line in status.read_text().splitlines() if status.is_file() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) if sys.platform == "darwin" else int(peak) * 1024


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Progress:
    """Prints a line at each point of the curves; on a terminal with a progress bar, and fewer lines for a long run."""

    def __init__(self, first_step: int, total: int, enabled: bool) -> None:
        from tqdm import tqdm

        self._first, self._total, self._start = first_step, total, time.monotonic()
        self._terminal = enabled and sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=first_step, unit="step", disable=not self._terminal, dynamic_ncols=True)
        self._kept: tuple[int, float] | None = None
        """step and time of the last line"""

    def advance(self) -> None:
        """One step is done."""
        self._bar.update()

    def point(self, step: int, values: Mapping[str, float]) -> None:
        """Show the newest point of the curves; `step` steps are done."""
        shown = {"loss": f"{values['train/loss']:.4f}", "lr": f"{values['train/learning_rate']:.2e}"}
        shown["tokens/s"] = f"{values['train/tokens_per_second']:,.0f}"
        self._bar.set_postfix(shown)
        now = time.monotonic()
        if not self._terminal or self._is_worth_a_line(step, now):
            self._kept = (step, now)
            left = (now - self._start) / max(1, step - self._first) * (self._total - step)
            fields = "  ".join(f"{name} {value}" for name, value in shown.items())
            say(f"step {step}/{self._total}  {fields}  left {duration(left)}")

    def _is_worth_a_line(self, step: int, now: float) -> bool:
        """Whether a terminal keeps this line: of 100 steps every one, of 100,000 a few hundred and one per minute."""
        if self._kept is None or step == self._total:
            return True
        last, then = self._kept
        return step - last >= HISTORY_SHARE * self._total or now - then >= HISTORY_SECONDS

    def close(self) -> None:
        self._bar.close()
