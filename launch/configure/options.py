"""The options of a run: defaults, then recipes, then the command line; later sources override earlier ones.

That holds for fields that exclude each other (`REPLACED`) too; given in the same source they are refused.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Literal

from jsonargparse import SUPPRESS, ActionConfigFile

from engine.config import (
    TASKS,
    RunConfig,
    extra_sections,
    optimizers_with_option,
    section_names,
    task_choices,
    tasks_with_field,
)
from engine.config.task_entry import Section
from engine.errors import UserError
from launch.cli import CommandParser
from launch.configure.recipe import read_recipe
from launch.configure.start_model import check_dimensions
from launch.zero.user_json import adopt

DESCRIPTION = """Pre-train BERT (MLM + NSP, or MLM alone) or fine-tune it, sharded by DeepSpeed ZeRO.

  python launch/train.py --debug                                     one process, tiny model, few steps
  deepspeed launch/train.py --config launch/recipes/pretrain_base_phase1.yaml --data.path data/wiki
  deepspeed --num_accelerators 2 launch/train.py --config ...        2 ranks (CPU ranks with DS_ACCELERATOR=cpu)

Values come from the defaults, then from recipes, then from the command line, wherever --config stands in it. There
--model.size does away with a recipe's single dimensions, --train.steps with its train.epochs, and the other way round.
"""
#: field -> fields of earlier sources that it overrides when a later source gives it
REPLACED = {
    "train.steps": ("train.epochs",),
    "train.epochs": ("train.steps",),
    "model.size": ("model.hidden_size", "model.layers", "model.heads", "model.intermediate_size"),
}
#: field -> another field and its values with which the first has an effect; tasks and optimizers add their own
NEEDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "zero.nvme_path": ("zero.offload_optimizer", ("nvme",)),
    "data.short_sequence_probability": ("data.objective", ("mlm_nsp",)),
    "optim.power": ("optim.schedule", ("polynomial",)),
    "optim.decay": ("optim.schedule", ("wsd",)),
}
#: the model and its dimensions under --debug
DEBUG_MODEL = {"size": "tiny", "hidden_size": 64, "layers": 2, "heads": 2, "intermediate_size": 128}


@dataclass(frozen=True)
class Options:
    """A validated configuration and where its values come from; names of fields are dotted."""

    config: RunConfig
    given: frozenset[str]
    """fields that a recipe or the command line sets to other than null, and that no later source overrides"""


def build_parser() -> CommandParser:
    """The parser of the training command, which the caller may change."""
    # to build one takes 25 times as long as to copy it, and plans of many runs parse each of them
    return copy.deepcopy(_parser_of(task_choices(), tuple(extra_sections().items())))


@functools.cache
def _parser_of(tasks: str, extra: tuple[tuple[str, type[Section]], ...]) -> CommandParser:
    """The parser for these tasks, as the help tells them, and the sections that they bring along."""
    usage = "train.py [--config RECIPE] [--debug] [--FIELD VALUE ...]"
    parser = CommandParser(prog="train.py", usage=usage, description=DESCRIPTION)
    parser.add_argument(
        "--config", action=ActionConfigFile, metavar="RECIPE", help="YAML file; launch/recipes has ours"
    )
    parser.add_argument(
        "--debug",
        action="store_true",
        help="tiny model, few steps, deterministic, no workers, where not given otherwise",
    )
    parser.add_argument("--local_rank", type=int, default=0, help=SUPPRESS)
    parser.add_argument("--task", type=Literal.__getitem__(TASKS.names), default=RunConfig.task, help=tasks)
    parser.add_class_arguments(RunConfig, skip={"task", "extra"})
    for name, section in extra:
        parser.add_class_arguments(section, name)
    sections = section_names()
    for action in parser._actions:
        if action.dest in sections:
            action.help = SUPPRESS  # jsonargparse's own option to give a section as a file
    return parser


def parse_options(arguments: Sequence[str], *, complete: bool = True) -> Options:
    """The configuration of a command line, completed by its recipes and the DeepSpeed JSON that it names.

    Args:
        arguments: the command line without the program's name.
        complete: whether fine-tuning must have a model and labelled data.

    Raises:
        UserError: the first wrong field, value or combination.
    """
    parser = build_parser()
    recipes, rest = split_recipes(arguments)
    sources = [flat(parser, read_recipe(path)) for path in recipes]
    merged: dict[str, Any] = {}
    for source in sources:
        merged = joined(merged, source)
    silent = [argument for argument in rest if not argument.startswith("--print_config")]
    here = vars(parser.parse_args(silent, defaults=False).as_flat())
    parser.set_defaults(joined(merged, here))
    if silent == rest:
        parser.note_repeated(rest)
        parsed = parser.get_defaults()  # which are what all sources give; to parse them again takes three times as long
    else:
        parsed = parser.parse_args(rest)
    values = parser.instantiate(parsed)
    own = [name for name in RunConfig.__dataclass_fields__ if name != "extra"]
    config = RunConfig(**{name: values[name] for name in own}, extra={name: values[name] for name in extra_sections()})
    debug = frozenset({"debug"} if values.debug else ())
    given, command_line = names(joined(merged, here)) - {"debug"} | debug, names(here)
    config = _completed(config, [*map(names, sources), command_line], given, complete)
    check_effect(config, command_line)
    if values.debug:
        config = debug_config(config, command_line)
    config.validate(complete)
    return Options(TASKS.get(config.task).with_metric(config), given)


def split_recipes(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The paths of the recipes of a command line, and its other arguments.

    Raises:
        UserError: --config without a file, or a section as an option.
    """
    recipes, rest = [], []
    left = list(arguments)
    while left:
        argument = left.pop(0)
        name, equals, path = argument.partition("=")
        if name.removeprefix("--") in section_names() and name.startswith("--"):
            raise UserError(f"{name[2:]}: it is a section; give its fields one by one, as {name}.NAME VALUE")
        if name != "--config":
            rest.append(argument)
            continue
        if not equals:
            path = left.pop(0) if left and not left[0].startswith("--") else ""
        if not path:
            raise UserError("config: a file is missing; give --config RECIPE, such as one of launch/recipes")
        recipes.append(path)
    return recipes, rest


def flat(parser: CommandParser, values: dict[str, Any]) -> dict[str, Any]:
    """A recipe's values by dotted name, converted to the types of the options."""
    options: dict[str, Any] = vars(parser.parse_object(values, defaults=False).as_flat())
    return options


def names(source: dict[str, Any]) -> frozenset[str]:
    """The fields that a source sets to other than null."""
    return frozenset(name for name, value in source.items() if value is not None)


def joined(earlier: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    """Two sources merged: values of the later one override those of the earlier one."""
    gone = {loser for winner in names(later) for loser in REPLACED.get(winner, ())}
    return {name: value for name, value in earlier.items() if name not in gone or name in later} | later


def _completed(config: RunConfig, sources: list[frozenset[str]], given: frozenset[str], complete: bool) -> RunConfig:
    """The configuration completed by its DeepSpeed JSON, which counts as part of the source that names it."""
    if config.deepspeed_config is None:
        return config
    place = max((index for index, source in enumerate(sources) if "deepspeed_config" in source), default=0)
    later = frozenset().union(*sources[place + 1 :])
    return adopt(config, (sources[place] & given) - later, later, complete=complete)


def check_effect(config: RunConfig, command_line: frozenset[str]) -> None:
    """Refuse options on the command line that would have no effect.

    Raises:
        UserError: data of another task or how it learns from it, options of another optimizer, or dimensions that
            contradict those of the folder to start from.
    """
    of_tasks = {name: ("task", tasks) for name, tasks in tasks_with_field().items()}
    of_optimizers = {name: ("optim.name", optimizers) for name, optimizers in optimizers_with_option().items()}
    for name, (other, allowed) in chain(of_tasks.items(), NEEDS.items(), of_optimizers.items()):
        if name in command_line and value_of(config, other) not in allowed:
            shown, there = value_of(config, name), value_of(config, other)
            remedy = f"give --{other} {' or '.join(allowed)}, or leave it out"
            raise UserError(f"{name}: {shown!r} has no effect while {other} is {there}; {remedy}")
    if config.model.init_from is not None:
        check_dimensions(config.model, command_line)


def value_of(config: RunConfig, name: str) -> Any:
    """The value of a dotted field."""
    section, _, field = name.rpartition(".")
    return getattr(config.part(section) if section else config, field)


def debug_config(config: RunConfig, command_line: frozenset[str] = frozenset()) -> RunConfig:
    """The same run made small and with all checks on, to step through with a debugger.

    Args:
        config: the run.
        command_line: fields that the user gave beside --debug, which keep their values.
    """
    steps = None if "train.epochs" in command_line else min(config.train.steps or 10, 10)
    wanted: dict[str, dict[str, Any]] = {
        "train": {
            "steps": steps,
            "epochs": None,
            "global_batch": min(config.train.global_batch, 8),
            "micro_batch": None,
            "log_interval": 1,
            "eval_samples": 32,
            "save_interval": None,
            "deterministic": True,
            "detect_anomaly": True,
        },
        "model": {} if config.model.init_from or "model.size" in command_line else DEBUG_MODEL,
        "fault": {"hang_timeout": None},
        "data": {"workers": 0},
    }
    parts = {
        part: replace(
            getattr(config, part),
            **{name: value for name, value in values.items() if f"{part}.{name}" not in command_line},
        )
        for part, values in wanted.items()
    }
    return replace(config, **parts)


def parse(arguments: list[str]) -> RunConfig:
    """The validated configuration of a command line, completed by the DeepSpeed JSON that it names.

    Raises:
        UserError: the first wrong field, value or combination.
    """
    return parse_options(arguments).config


def parse_given(arguments: list[str]) -> tuple[RunConfig, frozenset[str]]:
    """The configuration of `parse`, and the dotted fields that the command line and recipes set to other than null."""
    options = parse_options(arguments)
    return options.config, options.given
