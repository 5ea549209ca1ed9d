"""What every command shares: a parser with one-line errors, and exit codes.

Exit codes: 0 done, or stopped by a signal and saved (the run's folder then holds the file REQUEUE); 1 a failure of ours
or of the machine; 2 a mistake in what the user gave, which another start would only repeat; 75 a rank made no progress
for fault.hang_timeout; 130 interrupted by Ctrl-C, saved if anything was trained.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, set_parsing_settings

from engine.errors import LostRankError, NodeError, RunError, UserError
from launch.launcher import is_first_rank

#: seconds for a save under way to end once another rank has gone: it succeeds if that rank had done its part
PATIENCE_WITH_SAVES = 10.0

set_parsing_settings(docstring_parse_attribute_docstrings=True)


class CommandParser(ArgumentParser):
    """jsonargparse's parser whose errors are one line that names the field, the value and the remedy."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UserError(explain(message, known_options(self)))


def known_options(parser: ArgumentParser) -> list[str]:
    """Every dotted option of a parser, without the dashes."""
    return [name.lstrip("-") for action in parser._actions for name in action.option_strings if name.startswith("--")]


def explain(message: str, options: list[str]) -> str:
    """One plain line from a parser's message, with the nearest option where a name is unknown."""
    unknown = re.search(r"unrecognized arguments: (\S+)", message)
    if unknown:
        return unknown_option(unknown[1].split("=")[0].lstrip("-"), options)
    group = re.search(r"Group '([^']+)' does not accept option '([^']+)'", message)
    if group:
        return unknown_option(f"{group[1]}.{group[2]}", options)
    broken = re.search(r"Problems parsing config: (.+)", message, re.DOTALL)
    if broken:
        return f"config: the recipe is not YAML ({' '.join(broken[1].split())}); correct it"
    top = re.search(r"Option '([^']+)' is not accepted", message)
    if top:
        return unknown_option(top[1], options)
    field = re.search(r'(?:Parser key|key) "([^"]+)":', message)
    if not field:
        return message
    value = re.findall(r"(?:Got value|Given value|value): (.+)", message)
    expected = re.findall(r"Expected an? (<class '\w+'>|typing\.Literal\[[^\]]+\]|\S+?)(?:[.\n]|$)", message)
    if not value or not expected:
        return f"{field[1]}: {message.split(':', 1)[1].strip()}"
    return f"{field[1]}: {value[-1].strip()!r} is not allowed; give {' or '.join(map(plain_type, expected))}"


def plain_type(annotation: str) -> str:
    """A type annotation in words."""
    names = {"int": "a whole number", "float": "a number", "str": "text", "bool": "true or false", "NoneType": "null"}
    inner = re.sub(r"^<class '(\w+)'>$", r"\1", annotation)
    if inner.startswith("typing.Literal"):
        return "one of " + inner[len("typing.Literal[") : -1].replace("'", "")
    return names.get(inner, {"tuple": "a list such as [0.9, 0.999]"}.get(inner, inner))


def unknown_option(name: str, options: list[str]) -> str:
    """The message for an unknown field, with the nearest known one."""
    near = difflib.get_close_matches(name, options, n=1)
    remedy = f"did you mean {near[0]}?" if near else "see --help for the fields"
    return f"{name}: no such field; {remedy}"


def end_now(code: int) -> NoReturn:
    """End the process without its libraries, which would wait for ranks that have gone; saves get a moment."""
    deadline = time.monotonic() + PATIENCE_WITH_SAVES
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join(max(0.0, deadline - time.monotonic()))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_command(main: Callable[[list[str]], int], arguments: list[str] | None = None) -> NoReturn:
    """Run a command's `main` and end the process with its exit code.

    A user's mistake prints one line; among the ranks of a run, which all meet it, only rank 0 does. What only the ranks
    of a node meet its first one tells.
    """
    try:
        code = main(sys.argv[1:] if arguments is None else arguments)
    except LostRankError as error:
        if error.speaks:
            print(f"error: {error}", file=sys.stderr, flush=True)
        end_now(1)
    except (UserError, RunError) as error:
        alone = isinstance(error, NodeError)
        if os.environ.get("LOCAL_RANK", "0") == "0" if alone else is_first_rank(os.environ):
            print(f"error: {error}", file=sys.stderr, flush=True)
        code = 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        code = 130
    sys.exit(code)
