"""`zerobert --print_completion SHELL`: a script with which the shell completes commands, options and their values."""

from __future__ import annotations

import importlib
from argparse import Action, _SubParsersAction
from collections.abc import Mapping
from types import NoneType
from typing import get_args

import shtab
from jsonargparse import SUPPRESS, ArgumentParser

from engine.errors import UserError
from launch.cli import CommandParser


def completion_script(commands: Mapping[str, tuple[str, str]], shell: str) -> str:
    """The script of a shell.

    Args:
        commands: name -> module below `launch` that has a `build_parser`, and perhaps `add_verbs`, and what it does.

    Raises:
        UserError: no such shell.
    """
    if shell not in shtab.SUPPORTED_SHELLS:
        shells = ", ".join(shtab.SUPPORTED_SHELLS)
        raise UserError(f"print_completion: {shell!r} is not a known shell; choose one of {shells}")
    parser = ArgumentParser(prog="zerobert")
    parser.add_argument("--version", action="store_true", help="print the version")
    subcommands = parser.add_subcommands()
    for name, (module, what) in commands.items():
        source = importlib.import_module(f"launch.{module}")
        command: CommandParser = source.build_parser()
        command.usage, command.description = None, what  # zsh and fish show it beside the name
        subcommands.add_subcommand(name, command, help=what)
        if hasattr(source, "add_verbs"):
            source.add_verbs(command)
        complete_files(command)
    script: str = parser.get_completion_script(f"shtab-{shell}")
    return script


def complete_files(parser: ArgumentParser) -> None:
    """Let values that may be paths complete as such, in the parsers of a command's verbs too."""
    for action in parser._actions:
        if isinstance(action, _SubParsersAction):
            for verb in action.choices.values():
                complete_files(verb)
        elif takes_text(action):
            action.complete = shtab.FILE  # type: ignore[attr-defined]


def takes_text(action: Action) -> bool:
    """Whether an option's value is any text, which may be a path."""
    hint = getattr(action, "_typehint", None) or action.type
    shown = action.help != SUPPRESS and action.nargs != 0 and not action.choices
    return shown and (hint is None or set(get_args(hint) or (hint,)) in ({str}, {str, NoneType}))
