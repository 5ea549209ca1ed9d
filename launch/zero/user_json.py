"""Merges a user's DeepSpeed JSON, also one with "auto" values for Hugging Face's Trainer, with the run's options.

- "auto" values, and keys that the file leaves out, follow the run's options.
- A concrete value sets its option of the run where that is not given.
- If both are given by the same source and differ, the run is refused. A file that the command line names overrides a
  recipe's options, and options on the command line override a file that a recipe names.
- Values that are no options of the run go to DeepSpeed unchanged.

Nothing here imports torch or DeepSpeed, so a wrong file is refused at once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.config import RunConfig
from engine.errors import UserError
from launch.zero.claims import FLAG, TEXT, Claim, Claims, ValueKind, number, one_of, whole
from launch.zero.keys import FIXED, REFUSED, WITHOUT_EFFECT, check_fixed, check_names, fail, find, translated
from launch.zero.reasons import AUTOMATIC, leaves

#: key -> kind of its value, for keys that are no options of the run; DeepSpeed's own models check zero_optimization,
#: bf16 and fp16
KINDS: dict[str, ValueKind] = {
    "communication_data_type": one_of("fp32", "fp16", "bf16"),
    "gradient_predivide_factor": number(positive=True),
    "steps_per_print": whole(1),
    "log_level": TEXT,
    "data_types.grad_accum_dtype": one_of("fp32", "fp16", "bf16"),
    "flops_profiler.profile_step": whole(1),
    "flops_profiler.top_modules": whole(1),
    "aio.block_size": whole(1),
    "aio.queue_depth": whole(1),
    "aio.intra_op_parallelism": whole(1),
} | dict.fromkeys(
    (
        "prescale_gradients", "disable_allgather", "wall_clock_breakdown", "memory_breakdown", "dump_state",
        "disable_python_gc", "flops_profiler.enabled", "flops_profiler.detailed", "comms_logger.enabled",
        "comms_logger.verbose", "comms_logger.prof_all", "comms_logger.debug", "aio.single_submit",
        "aio.overlap_events", "aio.use_gds",
    ),
    FLAG,
)  # fmt: skip


@dataclass(frozen=True)
class DeepSpeedFile:
    """The content of a DeepSpeed JSON, sorted."""

    path: str
    claims: list[Claim]
    """its values for options of the run"""
    accumulation: int | None
    """its gradient_accumulation_steps; None if missing or left open by "auto" there"""
    rest: dict[str, Any]
    """dotted key -> concrete value, for keys that are no options of the run"""
    told: list[str]
    """messages about renamed keys and keys without effect"""

    def claimed(self, field: str) -> Any:
        """The value that the file gives to an option; None if it gives none."""
        return next((claim.value for claim in self.claims if claim.field == field), None)

    def overrides(self, config: RunConfig) -> dict[str, Any]:
        """Its values that are no options of the run and have a meaning in it, by dotted key."""
        return {key: value for key, value in self.rest.items() if not _idle(key, config)}

    def notes(self, config: RunConfig) -> list[str]:
        """Messages for the user about it: renamed keys, and keys without effect."""
        idle = [key for key in self.rest if _idle(key, config)]
        return self.told + [f"{self.path}: {key} has no meaning in this run" for key in idle]


def read(path: str) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: the file doesn't exist, isn't JSON or no object, or has a key twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise fail(path, twice[0], "is there twice; delete one")
        return dict(pairs)

    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UserError(f"deepspeed_config: {path} can't be read: {reason}; give a DeepSpeed JSON") from error
    try:
        values = json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise UserError(f"deepspeed_config: {path} is not JSON: {error}; correct it") from error
    if not isinstance(values, dict):
        raise UserError(f"deepspeed_config: {path} holds {type(values).__name__}, not an object {{...}}; correct it")
    return values


def load(path: str) -> DeepSpeedFile:
    """Read a file and sort its keys.

    Raises:
        UserError: names the file, the key, its value and the remedy.
    """
    values, told = translated(path, read(path))
    check_names(path, values)
    check_fixed(path, values)
    warmup = find(values, "scheduler.params")
    if isinstance(warmup, dict) and "warmup_type" not in warmup:
        told.append(f"{path}: scheduler.params.warmup_type is missing; the warm-up is linear, not logarithmic")
    claims = Claims(path, values)
    rest = dict(_rest(path, values, told))
    return DeepSpeedFile(path, claims.found, claims.accumulation, rest, told)


def _rest(path: str, values: dict[str, Any], told: list[str]) -> Iterator[tuple[str, Any]]:
    """The keys that go to DeepSpeed unchanged, with their values; checks those that DeepSpeed's models don't check."""
    for key in leaves(values):
        value, top = find(values, key), key.split(".")[0]
        idle = next((name for name in (key, top) if name in WITHOUT_EFFECT), None)
        if idle is not None and value not in (None, False, "auto"):
            told.append(f"{path}: {key} has no effect: {WITHOUT_EFFECT[idle]}")
        if value is None or idle is not None or {key, top} & (FIXED.keys() | REFUSED.keys()):
            continue
        if value == "auto":
            if key not in AUTOMATIC:
                raise fail(path, key, "is 'auto', and nothing gives it a value; give one, or delete it")
            continue
        kind = KINDS.get(key)
        converted = value if kind is None else kind.convert(value)
        if kind is not None and converted is None:
            raise fail(path, key, f"is {value!r}; give {kind.words}")
        yield key, int(converted) if isinstance(converted, float) and converted.is_integer() else converted


def adopt(
    config: RunConfig, given: frozenset[str], later: frozenset[str] = frozenset(), *, complete: bool = True
) -> RunConfig:
    """The run's configuration with the options that its DeepSpeed JSON sets; unchanged if it names none.

    Args:
        config: the run's configuration.
        given: dotted options given by the source that names the file, the command line or a recipe: they must not
            contradict it. The file overrides those of earlier sources, a recipe's where the command line names it.
        later: dotted options given by later sources, which override the file.
        complete: as in `RunConfig.validate`.

    Raises:
        UserError: the file is wrong, or contradicts an option; names both sides, both values and the remedy.
    """
    if config.deepspeed_config is None:
        return config
    file = load(config.deepspeed_config)
    claims: dict[str, Claim] = {}
    if "train.epochs" in later:
        later |= {"train.steps"}
    for claim in (claim for claim in file.claims if claim.field not in later):
        other = claims.setdefault(claim.field, claim)
        if other.value != claim.value:
            problem = f"is {claim.shown!r} and {other.key} is {other.shown!r}; both set {claim.field}: keep one"
            raise fail(file.path, claim.key, problem)
    if "train.steps" in claims and "train.epochs" in given:
        raise _contradiction(file.path, claims["train.steps"], "train.epochs", config.train.epochs)
    if "train.steps" in claims:
        config = with_option(config, "train.epochs", None)
    order = sorted(claims.values(), key=lambda claim: claim.field == "optim.warmup")  # a share needs train.steps
    for claim in order:
        config = _with_claim(config, claim, given, file.path)
    _validate(config, claims, file.path, complete)
    return config


def _with_claim(config: RunConfig, claim: Claim, given: frozenset[str], path: str) -> RunConfig:
    mine = option(config, claim.field)
    if claim.field in given:
        if not _same(claim, mine, config):
            raise _contradiction(path, claim, claim.field, mine)
        return config
    if isinstance(claim.value, str) and claim.value.startswith("not "):
        return config  # the default is neither bf16 nor fp16
    return with_option(config, claim.field, claim.value)


def _same(claim: Claim, mine: Any, config: RunConfig) -> bool:
    if isinstance(claim.value, str) and claim.value.startswith("not "):
        return bool(mine != claim.value.removeprefix("not "))
    if claim.field == "optim.warmup" and 0 < mine < 1 and config.train.steps is not None:
        return bool(round(mine * config.train.steps) == claim.value)
    return bool(tuple(mine) == claim.value if isinstance(mine, list) else mine == claim.value)


def _contradiction(path: str, claim: Claim, name: str, mine: Any) -> UserError:
    shown = list(mine) if isinstance(mine, tuple) else mine
    return fail(
        path, claim.key, f'is {claim.shown!r}, but {name} is given as {shown!r}; give one of them, or "auto" there'
    )


def _validate(config: RunConfig, claims: dict[str, Claim], path: str, complete: bool) -> None:
    """Validate the configuration; an error about an option that the file set also names the file and the key."""
    try:
        config.validate(complete)
    except UserError as error:
        named = [claim for field, claim in claims.items() if str(error).startswith(f"{field}:")]
        origin = f" ({named[0].field} comes from {named[0].key} in {path})" if named else ""
        raise UserError(f"{error}{origin}") from error


def option(config: RunConfig, field: str) -> Any:
    """The value of a dotted option."""
    part, name = field.split(".")
    return getattr(getattr(config, part), name)


def with_option(config: RunConfig, field: str, value: Any) -> RunConfig:
    """The configuration with one dotted option set."""
    part, name = field.split(".")
    return replace(config, **{part: replace(getattr(config, part), **{name: value})})


def with_ranks(config: RunConfig, given: frozenset[str], ranks: int) -> RunConfig:
    """Complete the batch sizes of a file by the number of ranks: global batch = micro-batch x accumulation x ranks.

    Raises:
        UserError: the file's sizes, or the file's and the run's, contradict each other at this number of ranks.
    """
    if config.deepspeed_config is None or "debug" in given:
        return config
    file = load(config.deepspeed_config)
    steps, micro, batch = file.accumulation, config.train.micro_batch, config.train.global_batch
    sure = file.claimed("train.global_batch") is not None or "train.global_batch" in given
    name = "train_batch_size" if file.claimed("train.global_batch") is not None else "train.global_batch"
    if steps is None:
        if isinstance(micro, int) and file.claimed("train.micro_batch") is not None and batch % (micro * ranks):
            problem = f"is {micro}, and {name} {batch} is no multiple of {micro} x {ranks} rank(s); change one of them"
            raise fail(file.path, "train_micro_batch_size_per_gpu", problem)
        return config
    if not isinstance(micro, int):
        if batch % (steps * ranks):
            problem = f"is {steps}, and {name} {batch} is no multiple of {steps} x {ranks} rank(s); change one of them"
            raise fail(file.path, "gradient_accumulation_steps", problem)
        return with_option(config, "train.micro_batch", batch // (steps * ranks))
    product = micro * steps * ranks
    if sure and batch != product:
        parts = f"micro-batch {micro} x accumulation {steps} x {ranks} rank(s) = {product}"
        remedy = 'change one, or make gradient_accumulation_steps "auto"'
        raise fail(file.path, "gradient_accumulation_steps", f"is {steps}: {name} {batch} is not {parts}; {remedy}")
    return with_option(config, "train.global_batch", product)


def _idle(key: str, config: RunConfig) -> bool:
    """Whether a key belongs to a feature that the run doesn't use."""
    used = {
        "bf16": config.train.precision == "bf16",
        "fp16": config.train.precision == "fp16",
        "aio": config.zero.offload_optimizer == "nvme",
        "zero_optimization.offload_optimizer": config.zero.offload_optimizer != "none",
        "zero_optimization.offload_param": config.zero.offload_parameters != "none",
    }
    unused = [section for section, is_used in used.items() if not is_used]
    third = key.startswith("zero_optimization.stage3_") and config.train.zero_stage != 3
    return third or any(key.startswith(f"{section}.") for section in unused)
