"""Labelled paragraphs for the demo: each documents one part of Python, which is its label."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from engine.data.text.embedded import paragraphs_by_module

#: top-level modules of the standard library by what they are for; modules of other versions are simply absent
PARTS = {
    "language": "pydoc_data",
    "graphics": "tkinter idlelib turtle turtledemo",
    "internet": "email http urllib smtplib imaplib xmlrpc wsgiref ftplib mailbox nntplib telnetlib socketserver ssl "
    "poplib socket cgi webbrowser ipaddress",
    "concurrency": "asyncio multiprocessing threading concurrent subprocess selectors queue",
    "testing": "unittest doctest pdb bdb traceback trace profile cProfile",
    "numbers": "_pydecimal statistics random fractions numbers datetime _pydatetime calendar",
    "imports": "importlib distutils pkgutil venv site ensurepip zipimport runpy modulefinder",
}
TEST_SHARE = 0.2


def labelled_paragraphs() -> list[tuple[str, str]]:
    """Distinct (paragraph, part) pairs in the library's order."""
    part_of = {module: part for part, modules in PARTS.items() for module in modules.split()}
    return [(text, part_of[module]) for module, text in paragraphs_by_module() if module in part_of]


def is_test(text: str) -> bool:
    """A fixed fifth of all paragraphs, by hash."""
    return hashlib.sha256(text.encode()).digest()[0] < 256 * TEST_SHARE


def write_topics(folder: Path) -> tuple[Path, Path]:
    """Write train.jsonl and test.jsonl and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = labelled_paragraphs()
    train = write_jsonl(folder / "train.jsonl", (pair for pair in pairs if not is_test(pair[0])))
    test = write_jsonl(folder / "test.jsonl", (pair for pair in pairs if is_test(pair[0])))
    return train, test


def write_jsonl(path: Path, pairs: Iterable[tuple[str, str]]) -> Path:
    """One {"text", "part"} object a line."""
    path.write_text("".join(json.dumps({"text": text, "part": part}) + "\n" for text, part in pairs))
    return path
