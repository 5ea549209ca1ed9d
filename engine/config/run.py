"""One run: the tree of its parts, and the checks across them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from engine.config.check import require
from engine.config.data import DataConfig, LabelledConfig
from engine.config.fault import FaultConfig
from engine.config.model import ModelConfig
from engine.config.optim import OptimConfig
from engine.config.train import MonitorConfig, TrainConfig
from engine.config.zero import ZeroConfig

TaskName = Literal["pretrain", "sequence_classification"]


@dataclass
class RunConfig:
    """One run: what to train, on what, how, and where its files go."""

    task: TaskName = "pretrain"
    """pretrain (MLM + NSP) or sequence_classification"""
    output: str = "runs/default"
    """folder of everything that the run writes"""
    resume: str = "never"
    """never, auto (the newest checkpoint in the output folder, if any) or a checkpoint folder"""
    seed: int = 1
    """seed of weights, data order, masking and dropout"""
    deepspeed_config: str | None = None
    """your own DeepSpeed JSON, "auto" values allowed; what it sets must not contradict what this run's options set"""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    labelled: LabelledConfig = field(default_factory=LabelledConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    fault: FaultConfig = field(default_factory=FaultConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)

    def validate(self, complete: bool = True) -> None:
        """Check every field and every combination that needs neither data nor hardware.

        Args:
            complete: whether fine-tuning must have labelled data and a model; a plan needs neither.

        Raises:
            UserError: names the first field that is wrong.
        """
        require(self.task in get_args(TaskName), "task", self.task, f"choose one of {', '.join(get_args(TaskName))}")
        require(bool(self.output), "output", self.output, "give a folder")
        require(0 <= self.seed < 2**32, "seed", self.seed, "give a whole number in [0, 2^32)")
        parts = ("model", "data", "labelled", "optim", "train", "zero", "fault", "monitor")
        for part in parts:
            _check_finite(part, getattr(self, part))
            getattr(self, part).validate()
        self.zero.check_stage(self.train.zero_stage)
        start, own = self.model.init_from, Path(self.output).absolute() / "export"
        require(
            start is None or not Path(start).absolute().is_relative_to(own),
            "model.init_from",
            start,
            "this run will write its own model there; give another output",
        )
        if self.task == "pretrain":
            self._validate_pretraining()
        elif complete:
            require(
                bool(self.labelled.train), "labelled.train", self.labelled.train, "give a file of labelled examples"
            )
            require(bool(self.model.init_from), "model.init_from", self.model.init_from, "give the folder of a model")

    def _validate_pretraining(self) -> None:
        length, limit = self.data.sequence_length, self.model.max_positions
        fits = bool(self.model.init_from) or length <= limit
        require(
            fits, "data.sequence_length", length, f"it exceeds model.max_positions ({limit}); lower it or raise that"
        )

    def to_dict(self) -> dict[str, Any]:
        """The tree as plain values, ready for JSON and YAML."""
        return asdict(self)


def _check_finite(part: str, values: Any) -> None:
    """Refuse infinities and NaN, which YAML can write as .inf and .nan."""
    for one in fields(values):
        value = getattr(values, one.name)
        for number in value if isinstance(value, tuple) else (value,):
            finite = not isinstance(number, float) or math.isfinite(number)
            require(finite, f"{part}.{one.name}", value, "give a finite number")


def from_dict(values: dict[str, Any]) -> RunConfig:
    """The tree of a saved configuration; the inverse of `RunConfig.to_dict` through JSON."""
    parts = {
        "model": ModelConfig,
        "data": DataConfig,
        "labelled": LabelledConfig,
        "optim": OptimConfig,
        "train": TrainConfig,
        "zero": ZeroConfig,
        "fault": FaultConfig,
        "monitor": MonitorConfig,
    }
    built = {name: part(**values.get(name, {})) for name, part in parts.items()}
    config = RunConfig(**{**values, **built})
    config.optim.betas = (config.optim.betas[0], config.optim.betas[1])
    return config
