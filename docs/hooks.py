"""Pages that mkdocs makes from their sources: the configuration from its dataclasses, the commands, the benchmarks."""

from __future__ import annotations

import ast
import contextlib
import html
import importlib
import inspect
import io
import json
import os
import sys
import textwrap
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["COLUMNS"] = "100"  # the width of what --help prints


def field_texts(kind: type) -> dict[str, str]:
    """The text under each field of a dataclass, its bases' too."""
    texts: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if not is_dataclass(base):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, after in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
            ):
                assert isinstance(field.target, ast.Name)
                texts[field.target.id] = " ".join(str(after.value.value).split())
    return texts


def in_words(kind: Any) -> str:
    """A type as a reader of YAML knows it; values that are written as they stand are code."""
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(map(in_words, get_args(kind)))
    if get_origin(kind) is Literal:
        *others, last = (f"`{value}`" for value in get_args(kind))
        return f"{', '.join(others)} or {last}" if others else last
    if get_origin(kind) is tuple:
        return f"[{', '.join(map(in_words, get_args(kind)))}]"
    words = {str: "text", int: "whole number", float: "number", bool: "`true` or `false`", type(None): "`null`"}
    return words.get(kind, str(kind))


def default_of(field: Any) -> str:
    """A default as YAML writes it."""
    value = field.default if field.default is not MISSING else field.default_factory()
    return value if isinstance(value, str) else json.dumps(value)


def table(kind: type, prefix: str, **told: str) -> list[str]:
    """The rows of one part of the configuration; `told` has texts of fields that only a table knows."""
    texts, types = field_texts(kind) | told, get_type_hints(kind)
    rows = ["| option | value | default | what it is |", "|---|---|---|---|"]
    for field in fields(kind):
        if not is_dataclass(types[field.name]) and field.name != "extra":
            name = f"`{prefix}{field.name}`"
            text = html.escape(texts.get(field.name, ""), quote=False)
            cells = (name, in_words(types[field.name]), f"`{default_of(field)}`", text)
            rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return ['<div class="options" markdown>', "", *rows, "", "</div>"]


def configuration() -> str:
    """The page of every option of a run."""
    config = importlib.import_module("engine.config")
    run = config.RunConfig
    lines = [
        "# Configuration",
        "",
        "Every option of `launch/train.py` and `zerobert train`, made from the dataclasses of `engine/config` when "
        "these pages are built. A value comes from the defaults, then from recipes (`--config FILE.yaml`), then from "
        "the command line (`--train.steps 100`); what comes later wins. `--print_config` prints the whole tree.",
        "",
        "## Run",
        "",
        *table(run, "", task=config.task_choices()),
    ]
    for name, kind in get_type_hints(run).items():
        if is_dataclass(kind):
            about = " ".join((inspect.getdoc(kind) or "").split())
            lines += ["", f"## {name}", "", about, "", *table(kind, f"{name}.")]
    return "\n".join(lines) + "\n"


def help_of(*command: str) -> str:
    """What `zerobert COMMAND --help` prints; of a command with verbs, a verb after it."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        importlib.import_module("launch.__main__").dispatch([*command, "--help"])
    return text.getvalue()


def commands() -> str:
    """The page of the commands: what `--help` prints."""
    table = importlib.import_module("launch.__main__").COMMANDS
    lines = [
        "# Commands",
        "",
        "`zerobert --version` prints the version, `zerobert COMMAND --help` what stands below.",
        "",
        "After one of these lines every new shell completes commands, options and their values:",
        "",
        "```",
        "zerobert --print_completion bash > ~/.zerobert.bash && echo '. ~/.zerobert.bash' >> ~/.bashrc",
        'zerobert --print_completion zsh > "${fpath[1]}/_zerobert"',
        "zerobert --print_completion fish > ~/.config/fish/completions/zerobert.fish",
        "```",
        "",
        "| command | what it does |",
        "|---|---|",
    ]
    lines += [f"| [`{name}`](#zerobert-{name}) | {what} |" for name, (_, what) in table.items()]
    for name, (module, _) in table.items():
        told = ["The options are those of the [configuration](configuration.md)."]
        if name != "train":
            told = ["```text", *help_of(name).rstrip().splitlines(), "```"]
        lines += ["", f"## zerobert {name}", "", *told]
        for verb in getattr(importlib.import_module(f"launch.{module}"), "VERBS", {}):
            told = ["```text", *help_of(name, verb).rstrip().splitlines(), "```"]
            lines += ["", f"### zerobert {name} {verb}", "", *told]
    return "\n".join(lines) + "\n"


def benchmarks() -> str:
    """The page of the benchmarks, whose source lies beside their code."""
    return (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made."""
    pages = {"configuration.md": configuration, "commands.md": commands, "benchmarks.md": benchmarks}
    for name, make in pages.items():
        files.append(File.generated(config, name, content=make()))
    return files
