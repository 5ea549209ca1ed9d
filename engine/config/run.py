"""One run: the tree of its parts, and the checks across them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from engine.config.architecture import ARCHITECTURES, check_options
from engine.config.data import DataConfig, LabelledConfig
from engine.config.fault import FaultConfig
from engine.config.methods.adapter import VIRTUAL, AdapterConfig
from engine.config.methods.distil import DistilConfig
from engine.config.methods.prune import PruneConfig
from engine.config.methods.regularise import RegulariseConfig
from engine.config.model import ModelConfig
from engine.config.optim import OptimConfig
from engine.config.task_entry import Section
from engine.config.tasks import TASKS, task_entries
from engine.config.train import MonitorConfig, TrainConfig, ZeroConfig
from engine.errors import require


def extra_sections() -> dict[str, type[Section]]:
    """The sections that tasks from outside of the package bring along, by name.

    Raises:
        ValueError: two parts of the configuration would have the same name.
    """
    known: dict[str, Any] = get_type_hints(RunConfig)
    extra: dict[str, type[Section]] = {}
    for entry in task_entries():
        if known.setdefault(entry.section, entry.options) is not entry.options:
            raise ValueError(f"the section {entry.section!r} of a task is another part of the configuration already")
        if entry.section not in RunConfig.__dataclass_fields__:
            extra[entry.section] = entry.options
    return extra


@dataclass
class RunConfig:
    """One run: what to train, on what, how, and where its files go."""

    task: str = "pretrain"
    """what to train; one of `TASKS`"""
    output: str = "runs/default"
    """folder of everything that the run writes"""
    resume: str = "never"
    """never, auto (the newest checkpoint in the output folder, if any) or a checkpoint folder"""
    branch_from: str | None = None
    """a checkpoint of another run, to begin with where this one goes on from none of its own: its weights, optimizer
    states and place in the data. With train.steps and optim.decay of its own it is as if this run had made it"""
    seed: int = 1
    """seed of weights, data order, masking and dropout"""
    deepspeed_config: str | None = None
    """your own DeepSpeed JSON, "auto" values allowed; what it sets must not contradict what this run's options set"""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    labelled: LabelledConfig = field(default_factory=LabelledConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    regularise: RegulariseConfig = field(default_factory=RegulariseConfig)
    distil: DistilConfig = field(default_factory=DistilConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    fault: FaultConfig = field(default_factory=FaultConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    extra: dict[str, Section] = field(
        default_factory=lambda: {name: options() for name, options in extra_sections().items()}
    )
    """sections of tasks from outside of the package, by name; files and command lines have them beside the others"""

    def validate(self, complete: bool = True) -> None:
        """Check every field and every combination that needs neither data nor hardware.

        Args:
            complete: whether a task that needs data and a model must have them; a plan needs neither.

        Raises:
            UserError: names the first field that is wrong.
        """
        TASKS.check(self.task)
        require(bool(self.output), "output", self.output, "give a folder")
        require(0 <= self.seed < 2**32, "seed", self.seed, "give a whole number in [0, 2^32)")
        if self.model.architecture is not None:
            ARCHITECTURES.check(self.model.architecture)
        if self.model.init_from is None:
            check_options(self.model.fresh_architecture, self.model)
        for name in section_names():
            _check_finite(name, self.part(name))
            self.part(name).validate()
        if self.model.init_from is None:
            ARCHITECTURES.get(self.model.fresh_architecture).check_dimensions(self.model)
        self.zero.check_stage(self.train.zero_stage)
        self.regularise.check_beside(self.adapter, self.optim.learning_rate, self.zero.offload_optimizer)
        self.distil.check_beside(self.regularise, self.labelled.augment)
        self.prune.check_beside(self.adapter, self.regularise, self.train.freeze, self.zero.offload_optimizer)
        start, own = self.model.init_from, Path(self.output).absolute() / "export"
        require(
            start is None or not Path(start).absolute().is_relative_to(own),
            "model.init_from",
            start,
            "this run will write its own model there; give another output",
        )
        task = TASKS.get(self.task)
        self._check_trained_parts(task.freezes)
        if isinstance(self.train.micro_batch, int):
            self.regularise.check_micro_batch(self.train.micro_batch)
        for name in self.regularise.of_loss:
            remedy = f"the loss of task {self.task} isn't defined with it; leave it out"
            value = getattr(self.regularise, name)
            require(name in task.regularisers, f"regularise.{name}", value, remedy)
        for name in ("teachers", "texts"):
            value, remedy = getattr(self.distil, name), f"task {self.task} can't learn from them; leave it out"
            require(value is None or name in task.distils, f"distil.{name}", value, remedy)
        task.check_metric(self)
        task.validate(self, complete)

    def _check_trained_parts(self, freezes: bool) -> None:
        """Refuse frozen weights where the task trains all of them, and rules that leave an adapter no place."""
        method, freeze = self.adapter.method, self.train.freeze
        remedy = f"task {self.task} trains all weights; leave it out"
        require(freezes or method == "none", "adapter.method", method, remedy)
        require(freezes or freeze is None, "train.freeze", freeze, remedy)
        aware, remedy = self.train.int8_aware, f"task {self.task} is no task on labelled data; leave it out"
        require(freezes or not aware, "train.int8_aware", aware, remedy)
        remedy = f"adapter.method {method} keeps the weights that would be rounded as they are; leave it out"
        require(method == "none" or not aware, "train.int8_aware", aware, remedy)
        for name in () if freezes else self.regularise.given:
            value = getattr(self.regularise, name.partition(".")[2])
            require(False, name, value, f"task {self.task} is no task on labelled data; leave it out")
        layers, whole = self.model.init_layers, method == "none" and freeze is None
        remedy = "adapters and frozen weights are told by those of all layers; train all weights, or give null"
        require(whole or layers is None, "model.init_layers", layers, remedy)
        for name in ("heads", "neurons"):
            value, remedy = getattr(self.prune, name), f"task {self.task} is no task on labelled data; leave it out"
            require(freezes or value == 1.0, f"prune.{name}", value, remedy)
        offload = self.zero.offload_optimizer
        remedy = "adapter.method adalora changes weights between steps, which are then in files; give cpu or none"
        require(method != "adalora" or offload != "nvme", "zero.offload_optimizer", offload, remedy)
        ratio, has_b = self.optim.lora_ratio, method in ("lora", "dora")
        remedy = f"adapter.method {method} has no factors A and B; leave it out"
        require(has_b or ratio == 1.0, "optim.lora_ratio", ratio, remedy)
        noisy = self.regularise.adversarial != "none"
        remedy = "regularise.adversarial has noise for the words of texts, and a prompt is none; choose another method"
        require(not noisy or method != "prompt", "adapter.method", method, remedy)
        placed = freeze is None or method not in VIRTUAL
        require(placed, "train.freeze", freeze, f"adapter.method {method} freezes the whole encoder; leave it out")

    def part(self, name: str) -> Any:
        """The section of a name, also of a task from outside of the package."""
        return self.extra[name] if name in self.extra else getattr(self, name)

    def to_dict(self) -> dict[str, Any]:
        """The tree as plain values, ready for JSON and YAML."""
        values = asdict(self)
        extra: dict[str, Any] = values.pop("extra")
        return values | extra


def section_names() -> tuple[str, ...]:
    """The parts of the configuration that have fields of their own."""
    own = (name for name, kind in get_type_hints(RunConfig).items() if is_dataclass(kind))
    return (*own, *extra_sections())


def _check_finite(part: str, values: Any) -> None:
    """Refuse infinities and NaN, which YAML can write as .inf and .nan."""
    for entry in fields(values):
        value = getattr(values, entry.name)
        for number in value if isinstance(value, tuple) else (value,):
            finite = not isinstance(number, float) or math.isfinite(number)
            require(finite, f"{part}.{entry.name}", value, "give a finite number")
