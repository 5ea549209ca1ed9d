"""What a plan is asked for: a recipe's run or a model's, with the plan's own options over it."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.config import ARCHITECTURES, MODEL_SIZES, TASKS, ModelConfig, RunConfig, TrainConfig, sizes_of
from engine.config.train import DEFAULT_STEPS
from engine.errors import UserError
from launch.configure.start_model import folder_config, with_folder
from launch.forecast.hardware import Hardware
from launch.forecast.planner import Request
from launch.forecast.workload import teacher_shapes

#: Devlin et al. 2019: 1M steps of 256 sequences, nine tenths with 128 tokens and one tenth with 512
BERT_TOKENS = 256 * (900_000 * 128 + 100_000 * 512)
#: of BERT's own vocabulary
BERT_VOCABULARY = 30522
SIZES = ("model.size", "model.hidden_size", "model.layers", "model.heads", "model.intermediate_size")


@dataclass(frozen=True)
class Wanted:
    """The run to plan before the hardware is known."""

    run: RunConfig
    given: frozenset[str]
    """dotted names of what the recipe gives"""
    recipe: str | None
    precision: str | None
    """asked for by an option or by the recipe"""
    asked_by: str
    """which of the two"""


def wanted_run(options: Any, advised: RunConfig | None = None) -> Wanted:
    """The recipe's run, that of an advice, or BERT's pre-training.

    Raises:
        UserError: neither a recipe nor a model, or a wrong recipe.
    """
    if options.config is not None:
        from launch.configure.options import parse_options

        options_of_run = parse_options(["--config", options.config], complete=False)
        own = "train.precision" if options.precision is None else "precision"
        return Wanted(
            options_of_run.config,
            options_of_run.given,
            options.config,
            options.precision or options_of_run.config.train.precision,
            own,
        )
    if advised is not None:
        return Wanted(advised, frozenset(), None, options.precision, "precision")
    if options.model is None:
        raise UserError("model: not given; give --model bert-base or --config RECIPE")
    run = RunConfig(train=TrainConfig(global_batch=256))
    return Wanted(run, frozenset(), None, options.precision, "precision")


def settled_precision(wanted: Wanted, hardware: Hardware) -> str:
    """The precision to plan: as asked for, else bf16, or fp16 where the GPU doesn't compute in bf16.

    Raises:
        UserError: the hardware can't train in the one that is asked for.
    """
    if wanted.precision == "bf16" and not hardware.bf16:
        where = f"{hardware.name} doesn't compute in it (compute capability 8.0 does); give --precision fp16"
        raise UserError(f"{wanted.asked_by}: 'bf16' can't be had: {where}")
    if wanted.precision == "fp16" and hardware.accelerator == "cpu":
        raise UserError(
            f"{wanted.asked_by}: 'fp16' needs a GPU, and this machine has none; give --precision bf16 or --gpu"
        )
    return wanted.precision or ("bf16" if hardware.bf16 else "fp16")


def request_of(options: Any, wanted: Wanted, precision: str) -> Request:
    """What is to be planned.

    Raises:
        UserError: names the option that is wrong.
    """
    run, recipe = wanted.run, wanted.run if wanted.recipe else None
    task = TASKS.get(run.task)
    length = options.sequence_length or task.sequence_length(run)
    batch = options.global_batch or run.train.global_batch
    model, vocabulary, notes = planned_model(options, wanted)
    if (run.model.init_from is None or options.model is not None) and length > model.positions:
        model = replace(model, max_positions=length)
    kept = model if options.model is not None or run.model.init_from is None else run.model
    run = replace(
        with_objective(task.with_sequence_length(run, length), model.fresh_architecture),
        model=kept,
        train=replace(run.train, global_batch=batch, precision=precision),  # type: ignore[arg-type]
        optim=replace(run.optim, name=options.optimizer or run.optim.name),
    )
    each = task.sequences_per_sample(run)
    if each > 1:
        notes += (f"a sample counts as {each} sequences: those of a question, as far as labelled.options tells",)
    if len(teacher_shapes(run)) < len(run.distil.folders):
        notes += ("distil.teachers: not all have a config.json that can be read (yet), and those aren't counted",)
    tokens = planned_tokens(options, wanted, batch * each * length)
    if tokens is None:
        notes += (
            f"the recipe counts epochs ({run.train.epochs:g}), so only its data would tell the days; give --steps",
        )
    return Request(
        model=model,
        vocabulary=vocabulary,
        sequence_length=length,
        global_batch=batch,
        precision=precision,
        optimizer=run.optim.name,
        checkpointing=options.activation_checkpointing or recomputation(wanted),
        attention=options.attention,
        read_share=task.read_share(run),
        tokens=tokens,
        run=run,
        recipe=recipe,
        notes=notes,
    )


def with_objective(run: RunConfig, architecture: str) -> RunConfig:
    """The same run on MLM alone where its architecture has no head for pairs."""
    if not TASKS.get(run.task).decodes or "pretraining" in ARCHITECTURES.get(architecture).export_classes:
        return run
    return replace(run, data=replace(run.data, objective="mlm"))


def recomputation(wanted: Wanted) -> str:
    """What a plan may do about it: as a recipe says, and where it says nothing what is faster."""
    if "model.activation_checkpointing" not in wanted.given:
        return "auto"
    return "on" if wanted.run.model.activation_checkpointing else "off"


def planned_tokens(options: Any, wanted: Wanted, tokens_a_step: int) -> float | None:
    """Tokens of the whole training; None for epochs, whose length the data decides."""
    if options.tokens is not None:
        return float(options.tokens)
    train = wanted.run.train
    steps = options.steps or train.steps
    if steps is None and wanted.recipe is None:
        return float(BERT_TOKENS)
    if steps is None and train.epochs is not None:
        return None
    return float(steps or DEFAULT_STEPS) * tokens_a_step


def planned_model(options: Any, wanted: Wanted) -> tuple[ModelConfig, int, tuple[str, ...]]:
    """The dimensions to plan, the vocabulary, and what to tell about them.

    Raises:
        UserError: an unknown size.
    """
    model = wanted.run.model
    vocabulary = options.vocabulary or store_vocabulary(wanted.run.data.path) or BERT_VOCABULARY
    if options.model is not None:
        return sized(model, options.model), vocabulary, ()
    if model.init_from is None:
        return unnamed(model, wanted, vocabulary)
    shape = folder_config(model.init_from)
    if shape is not None:
        return with_folder(model, shape), options.vocabulary or shape.vocabulary, ()
    missing = f"model.init_from {model.init_from!r} has no config.json that can be read (yet)"
    if any(name in wanted.given for name in SIZES):
        note = f"{missing}: planned with the recipe's own dimensions"
        return replace(model, init_from=None), vocabulary, (note,)
    note = f"{missing}: planned as BERT-base; give --model for another"
    return replace(model, init_from=None, size="base"), vocabulary, (note,)


def unnamed(model: ModelConfig, wanted: Wanted, vocabulary: int) -> tuple[ModelConfig, int, tuple[str, ...]]:
    """A model without a folder; the recipe of a task that needs one leaves it to the command line."""
    if TASKS.get(wanted.run.task).starts_fresh:
        return model, vocabulary, ()
    note = "the recipe leaves model.init_from to the command line: planned as BERT-base; give --model for another"
    return replace(model, size="base"), vocabulary, (note,)


def sized(model: ModelConfig, name: str) -> ModelConfig:
    """The same model in a named size.

    Raises:
        UserError: there is no such size.
    """
    architecture, _, size = name.lower().rpartition("-")
    sizes = sizes_of(architecture or model.fresh_architecture)
    if size not in sizes or architecture not in ("", *MODEL_SIZES):
        raise UserError(f"model: {name!r} is unknown; choose one of {', '.join(sizes)}")
    model = replace(model, architecture=architecture or model.architecture)
    return replace(model, size=size, hidden_size=None, layers=None, heads=None, intermediate_size=None, init_from=None)


def store_vocabulary(path: str | None) -> int | None:
    """The size of a prepared store's vocabulary; None where there is no store."""
    if path is None:
        return None
    try:
        size = json.loads((Path(path) / "manifest.json").read_text(encoding="utf-8"))["vocab_size"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return size if isinstance(size, int) and size > 0 else None
