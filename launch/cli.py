"""What every command shares: a parser with one-line errors, and exit codes.

Exit codes: 0 done, or stopped by a signal and saved (the run's folder then holds the file REQUEUE); 1 a failure of ours
or of the machine; 2 a mistake in what the user gave, which another start would only repeat; 75 a rank made no progress
for fault.hang_timeout, or didn't come to the start; 130 interrupted by Ctrl-C, saved if anything was trained.
"""

from __future__ import annotations

import atexit
import contextlib
import difflib
import os
import re
import sys
import threading
import time
import traceback
from argparse import SUPPRESS, Action
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from engine.errors import HANG_EXIT_CODE, LateRanksError, LostRankError, RunError, SharedError, UserError
from launch.helptext import HelpFormatter
from launch.launcher import is_first_rank

#: seconds for a save under way to end once another rank has gone: it succeeds if that rank had done its part
PATIENCE_WITH_SAVES = 10.0

#: options with which a command's standard output is a document, where notes have no place
DOCUMENTS = {"--json", "--print_config", "--dry-run"}

set_parsing_settings(docstring_parse_attribute_docstrings=True)


class CommandParser(ArgumentParser):
    """jsonargparse's parser whose errors are one line that names the field, the value and the remedy."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **{"formatter_class": HelpFormatter, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UserError(explain(message, known_options(self)))

    def parse_args(self, args: Sequence[str] | None = None, *rest: Any, **kwargs: Any) -> Namespace:  # type: ignore[override]
        """The values of a command line; tells of an option that is given twice, of which the last counts.

        Raises:
            UserError: a wrong option; one that takes several values, given twice.
        """
        if kwargs.get("defaults", True):
            self.note_repeated(sys.argv[1:] if args is None else args)
        return super().parse_args(args, *rest, **kwargs)

    def note_repeated(self, args: Sequence[str]) -> None:
        """Tell of options that are given twice, on one rank.

        Raises:
            UserError: one that takes several values, given twice.
        """
        for note in repeated(self, args):
            if is_first_rank(os.environ):
                print(f"note: {note}", file=sys.stderr if DOCUMENTS & set(sys.argv) else sys.stdout, flush=True)


def split_at_dashes(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """A command's own options, and what follows the first --; nothing without one.

    >>> split_at_dashes(["a", "--", "b", "--"]), split_at_dashes(["a"])
    ((['a'], ['b', '--']), (['a'], []))
    """
    given = list(arguments)
    place = given.index("--") if "--" in given else len(given)
    return given[:place], given[place + 1 :]


def check_output(output: str, model: Path | None = None) -> None:
    """Refuse the working directory, and the model's own folder, as the folder to write.

    Raises:
        UserError: it is one of them.
    """
    if not output or output == ".":
        raise UserError("output: '.' is not allowed; name the folder to write")
    if model is not None and Path(output).resolve() == model.resolve():
        raise UserError(f"output: {output!r} is the model itself; give another folder")


def known_options(parser: ArgumentParser) -> list[str]:
    """Every dotted option of a parser that its help shows, without the dashes."""
    shown = [action for action in parser._actions if action.help != SUPPRESS]
    return [name.lstrip("-") for action in shown for name in action.option_strings if name.startswith("--")]


def repeated(parser: ArgumentParser, arguments: Sequence[str]) -> list[str]:
    """What to tell of options that a command line gives twice with different values.

    Raises:
        UserError: an option of several values, whose first ones would be lost.
    """
    actions = {name: action for action in parser._actions for name in action.option_strings}
    given: dict[str, list[str]] = {}
    notes = []
    for index, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        action = actions.get(name)
        if action is None or action.help == SUPPRESS:
            continue
        values = [value] if equals else values_of(action, arguments[index + 1 :])
        before = given.get(action.dest, values)
        shown = name.lstrip("-")
        if before != values and action.nargs in ("+", "*"):
            raise UserError(f"{shown}: given twice, {before} and {values}; write all values after one --{shown}")
        if before != values:
            notes.append(f"{shown} is given twice, as {' '.join(before)} and {' '.join(values)}; the last counts")
        given[action.dest] = values
    return notes


def values_of(action: Action, following: Sequence[str]) -> list[str]:
    """An option's values among the arguments that follow it."""
    end = next((index for index, word in enumerate(following) if word.startswith("--")), len(following))
    if action.nargs in ("+", "*"):
        return list(following[:end])
    return list(following[: 0 if action.nargs == 0 else min(1, end)])


def explain(message: str, options: list[str]) -> str:
    """One plain line from a parser's message, with the nearest option where a name is unknown."""
    absent = re.search(r"argument (\S+): expected (?:one|at least one|\d+) argument", message)
    if absent:
        return f"{absent[1].split('/')[-1].lstrip('-')}: its value is missing; give one after it"
    flag = re.search(r"argument (\S+): ignored explicit argument (.+)", message)
    if flag:
        return f"{flag[1].lstrip('-')}: {flag[2]} is not allowed; it takes no value"
    required = re.search(r"the following arguments are required: (.+)", message)
    if required:
        first, *others = required[1].split(", ")
        return f"{first}: not given{', nor ' + ', '.join(others) if others else ''}; --help tells what it is"
    unknown = re.search(r"unrecognized arguments: (\S+)", message)
    if unknown:
        return unknown_option(unknown[1].split("=")[0].lstrip("-"), options)
    group = re.search(r"Group '([^']+)' does not accept option '([^']+)'", message)
    if group:
        return unknown_option(f"{group[1]}.{group[2]}", options)
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


def unknown_command(field: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a command, or a verb of one, that there isn't."""
    names = list(known)
    near = difflib.get_close_matches(name.lower().replace("_", "-"), names, n=1)
    remedy = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(names)}"
    return UserError(f"{field}: {name!r} is unknown; {remedy}")


def end_now(code: int) -> NoReturn:
    """End the process without its libraries, which would wait for ranks that have gone; saves get a moment."""
    deadline = time.monotonic() + PATIENCE_WITH_SAVES
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join(max(0.0, deadline - time.monotonic()))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def leave(code: int) -> NoReturn:
    """End the process with a code that isn't 0: saves under way end first, but nothing that libraries do at the exit.

    They would wait: for ranks that have gone, for processes, for a connection.
    """
    atexit.register(_vanish, code)
    sys.exit(code)


def _vanish(code: int) -> None:
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def tell(error: Exception) -> None:
    """Print the one line of an error."""
    print(f"error: {error}", file=sys.stderr, flush=True)


def run_command(main: Callable[[list[str]], int], arguments: list[str] | None = None) -> NoReturn:
    """Run a command's `main` and end the process with its exit code.

    A user's mistake prints one line; among the ranks of a run, which all meet it, only rank 0 does, unless the error
    itself says which ranks speak. A defect keeps its traceback, and under a debugger it is the debugger's.
    """
    try:
        code = main(sys.argv[1:] if arguments is None else arguments)
    except LostRankError as error:
        if error.speaks:
            tell(error)
        end_now(1)
    except (UserError, RunError) as error:
        if error.speaks if isinstance(error, SharedError) else is_first_rank(os.environ):
            tell(error)
        code = 2 if isinstance(error, UserError) else HANG_EXIT_CODE if isinstance(error, LateRanksError) else 1
    except KeyboardInterrupt:
        if is_first_rank(os.environ):
            print("interrupted", file=sys.stderr, flush=True)
        code = 130
    except Exception:
        if sys.gettrace() is not None:
            raise
        traceback.print_exc()
        code = 1
    if code == 0:
        sys.exit(0)
    leave(code)
