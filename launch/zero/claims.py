"""The values of a DeepSpeed JSON that are options of the run: found key by key, converted and checked."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from engine.config import OPTIMIZERS
from engine.config.train import OffloadTarget
from launch.zero.keys import fail, find, nearest, remove

#: schedule of DeepSpeed -> value of optim.schedule with the same shape
SCHEDULES = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
PLACES: tuple[OffloadTarget, ...] = ("none", "cpu", "nvme")
OPTIMIZER_PARAMS = (
    "lr", "betas", "eps", "weight_decay", "max_coeff", "min_coeff", "adam_w_mode", "bias_correction", "amsgrad",
    "torch_adam", "fused",
)  # fmt: skip
SCHEDULER_PARAMS = (
    "warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "warmup_type", "total_num_steps", "warmup_min_ratio",
    "cos_min_ratio", "last_batch_iteration",
)  # fmt: skip


@dataclass(frozen=True)
class Claim:
    """A concrete value in a file (not "auto") and the option of the run that it sets."""

    key: str
    shown: Any
    """the value as the file has it"""
    field: str
    value: Any
    """the value as the option takes it"""


@dataclass(frozen=True)
class ValueKind:
    """A kind of value, in words for messages; `convert` returns None for a value of another kind."""

    words: str
    convert: Callable[[Any], Any]


def _number(value: Any) -> float | None:
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if plain and math.isfinite(value) else None


def whole(least: int) -> ValueKind:
    """A whole number of at least `least`, also written as 5e8."""

    def convert(value: Any) -> int | None:
        number = _number(value)
        return int(number) if number is not None and number >= least and number == int(number) else None

    return ValueKind(f"a whole number of at least {least}, without quotes", convert)


def number(*, positive: bool = False) -> ValueKind:
    """A number of at least 0, or above 0 if `positive`."""

    def convert(value: Any) -> float | None:
        converted = _number(value)
        return converted if converted is not None and (converted > 0 or (converted == 0 and not positive)) else None

    return ValueKind(
        "a positive number, without quotes" if positive else "a number of at least 0, without quotes", convert
    )


def one_of(*choices: Any) -> ValueKind:
    """One of the given values, with the same type."""
    words = f"one of {', '.join(map(repr, choices))}"
    return ValueKind(
        words, lambda value: value if any(value == c and type(value) is type(c) for c in choices) else None
    )


def _pair(value: Any) -> tuple[float, float] | None:
    numbers = [_number(item) for item in value] if isinstance(value, list) and len(value) == 2 else [None]
    return (numbers[0], numbers[1]) if None not in numbers else None  # type: ignore[return-value]


FLAG = one_of(True, False)
TEXT = ValueKind("text", lambda value: value if isinstance(value, str) and value else None)
PAIR = ValueKind("a list of two numbers", _pair)

#: dotted key of a DeepSpeed JSON -> (kind of its value, the option of the run that it sets)
DIRECT: dict[str, tuple[ValueKind, str]] = {
    "train_batch_size": (whole(1), "train.global_batch"),
    "train_micro_batch_size_per_gpu": (whole(1), "train.micro_batch"),
    "gradient_clipping": (number(), "optim.max_grad_norm"),
    "zero_optimization.stage": (one_of(0, 1, 2, 3), "train.zero_stage"),
    "optimizer.params.lr": (number(positive=True), "optim.learning_rate"),
    "optimizer.params.betas": (PAIR, "optim.betas"),
    "optimizer.params.eps": (number(positive=True), "optim.eps"),
    "optimizer.params.weight_decay": (number(), "optim.weight_decay"),
    "optimizer.params.max_coeff": (number(positive=True), "optim.max_trust_ratio"),
    "scheduler.params.warmup_max_lr": (number(positive=True), "optim.learning_rate"),
    "scheduler.params.warmup_num_steps": (whole(0), "optim.warmup"),
    "scheduler.params.total_num_steps": (whole(1), "train.steps"),
    "scheduler.params.cos_min_ratio": (number(), "optim.min_ratio"),
    "tensorboard.enabled": (FLAG, "monitor.tensorboard"),
    "csv_monitor.enabled": (FLAG, "monitor.csv"),
    "wandb.enabled": (FLAG, "monitor.wandb"),
    "wandb.project": (TEXT, "monitor.wandb_project"),
    "wandb.group": (TEXT, "monitor.wandb_group"),
}


class Claims:
    """Moves the keys that are options of the run out of a file's values, into `found`."""

    def __init__(self, path: str, values: dict[str, Any]) -> None:
        """
        Args:
            path: the file, for messages.
            values: its content with the present names of keys; keys that are taken are removed from it.
        """
        self.path, self.values = path, values
        self.found: list[Claim] = []
        self.accumulation = self.take("gradient_accumulation_steps", whole(1))
        self._optimizer()
        self._scheduler()
        for key, (kind, field) in DIRECT.items():
            self.claim(key, kind, field)
        self._precision()
        for section, field in {"offload_optimizer": "optimizer", "offload_param": "parameters"}.items():
            self._offload(f"zero_optimization.{section}", f"zero.offload_{field}")
        self._recomputation()

    def take(self, key: str, kind: ValueKind) -> Any:
        """Remove a key and return its converted value; None if it is missing, null or "auto"."""
        value = find(self.values, key)
        if value is None:
            return None
        remove(self.values, key)
        if value == "auto":
            return None
        converted = kind.convert(value)
        if converted is None:
            raise fail(self.path, key, f"is {value!r}; give {kind.words}")
        return converted

    def claim(self, key: str, kind: ValueKind, field: str) -> None:
        """Take a key and record the option that it sets."""
        value = self.take(key, kind)
        if value is not None:
            shown = list(value) if isinstance(value, tuple) else value
            self.found.append(Claim(key, shown, field, value))

    def _optimizer(self) -> None:
        self._params("optimizer", OPTIMIZER_PARAMS, "zerobert's optimizers have lr, betas, eps, weight_decay")
        name = self.take("optimizer.type", TEXT)
        if name is None:
            return
        types = {own: OPTIMIZERS.get(own).deepspeed_types for own in OPTIMIZERS.names}
        own = next((own for own, known in types.items() if name.lower() in map(str.lower, known)), None)
        if own is None:
            choices = " or ".join(known[0] for known in types.values() if known)
            raise fail(self.path, "optimizer.type", f"is {name!r}, which zerobert doesn't have; give {choices}")
        self.found.append(Claim("optimizer.type", name, "optim.name", own))

    def _scheduler(self) -> None:
        name = self.take("scheduler.type", TEXT)
        if name is not None and name not in SCHEDULES:
            choices = f"give {', '.join(SCHEDULES)}, or delete the section and set optim.schedule"
            raise fail(self.path, "scheduler.type", f"is {name!r}, which zerobert doesn't have; {choices}")
        if name is not None:
            self.found.append(Claim("scheduler.type", name, "optim.schedule", SCHEDULES[name]))
        self._params("scheduler", SCHEDULER_PARAMS, "set optim.schedule and its options instead")
        if name == "WarmupLR" and find(self.values, "scheduler.params.total_num_steps") not in (None, "auto"):
            raise fail(self.path, "scheduler.params.total_num_steps", "is none of WarmupLR's; delete it")

    def _params(self, section: str, known: tuple[str, ...], advice: str) -> None:
        params = find(self.values, f"{section}.params")
        if params is not None and not isinstance(params, dict):
            raise fail(self.path, f"{section}.params", f"is {params!r}; give an object {{...}}")
        for name in params or ():
            if name == "max_grad_norm":
                raise fail(self.path, f"{section}.params.{name}", "doesn't clip in DeepSpeed; set gradient_clipping")
            if name not in known:
                remedy = nearest(name, known).replace("delete it", f"delete it: {advice}")
                raise fail(self.path, f"{section}.params.{name}", f"is unknown; {remedy}")

    def _precision(self) -> None:
        sections = {name: find(self.values, name) for name in ("bf16", "fp16")}
        set_to = {name: self.take(f"{name}.enabled", FLAG) for name, section in sections.items() if section}
        on = [name for name, value in set_to.items() if value]
        if len(on) == 2:
            raise fail(self.path, "bf16.enabled", "and fp16.enabled are both true; enable one")
        if on:
            self.found.append(Claim(f"{on[0]}.enabled", True, "train.precision", on[0]))
        elif set_to and all(value is False for value in set_to.values()) and len(set_to) == 2:
            self.found.append(Claim("bf16.enabled and fp16.enabled", False, "train.precision", "fp32"))
        elif len(set_to) == 1 and next(iter(set_to.values())) is False:
            name = next(iter(set_to))
            self.found.append(Claim(f"{name}.enabled", False, "train.precision", f"not {name}"))

    def _offload(self, section: str, field: str) -> None:
        given = find(self.values, section)
        if given is None:
            return
        if not isinstance(given, dict):
            raise fail(self.path, section, f'is {given!r}; give an object such as {{"device": "cpu"}}')
        self.claim(f"{section}.device", one_of(*PLACES), field)
        place = next((claim.value for claim in self.found if claim.field == field), None)
        where = self.take(f"{section}.nvme_path", TEXT)
        if where is not None and place == "nvme" and field == "zero.offload_optimizer":
            self.found.append(Claim(f"{section}.nvme_path", where, "zero.nvme_path", where))

    def _recomputation(self) -> None:
        layers = self.take("activation_checkpointing.number_checkpoints", whole(0))
        cut = find(self.values, "activation_checkpointing.partition_activations")
        if layers or cut is True:
            key = "number_checkpoints" if layers else "partition_activations"
            shown = layers or True
            claim = Claim(f"activation_checkpointing.{key}", shown, "model.activation_checkpointing", True)
            self.found.append(claim)
