"""The embedded corpus: prose that every Python installation carries, so a first run needs no network.

Two parts: the language reference in `pydoc_data/topics.py` (one document per topic) and the docstrings of the
standard library (one document per module). Files are parsed with `ast`, nothing of them is executed. The text
differs between Python versions, so nothing may rely on its exact size.
"""

from __future__ import annotations

import ast
import re
import sysconfig
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import chain
from pathlib import Path

from engine.errors import UserError

SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3"}
MIN_PARAGRAPH_WORDS = 6
MIN_DOCUMENT_WORDS = 40
#: least share of letters and spaces in a paragraph of prose; tables, grammars and signatures have less
MIN_LETTERS = 0.85

_BULLET = re.compile(r"^\s*(?:[-*+•]|\d+[.)]|[#.]{1,2}\s)\s+")
_ROLE = re.compile(r":[a-z:+-]+:`~?([^`<]*?)(?:\s*<[^`]*>)?`")
_MARKUP = re.compile(r"``?|\*\*?(?=\w)|(?<=\w)\*\*?(?!\w)")


@lru_cache(maxsize=1)
def embedded_documents() -> tuple[str, ...]:
    """The documents, in an order that depends on the Python installation alone; a few megabytes.

    Repeated paragraphs are dropped, so that held-out documents don't repeat training text.
    """
    root = Path(sysconfig.get_path("stdlib"))
    seen: set[str] = set()
    documents = (_document(texts, seen) for _, texts in _raw_documents(root))
    kept = tuple(text for text in documents if len(text.split()) >= MIN_DOCUMENT_WORDS)
    if not kept:
        raise UserError(f"source: embedded finds no Python source files in {root}; give a file or folder of text")
    return kept


def paragraphs_by_module() -> Iterator[tuple[str, str]]:
    """Distinct (top-level module, paragraph) pairs of the standard library's docstrings."""
    seen: set[str] = set()
    for module, texts in _raw_documents(Path(sysconfig.get_path("stdlib"))):
        for paragraph in chain.from_iterable(map(prose, texts)):
            if paragraph not in seen:
                seen.add(paragraph)
                yield module, paragraph


def _raw_documents(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Top-level module and texts of each document."""
    topics = root / "pydoc_data" / "topics.py"
    for text in _topics(topics) if topics.is_file() else ():
        yield "pydoc_data", [text]
    for path in _library_files(root):
        yield path.relative_to(root).parts[0].removesuffix(".py"), _docstrings(path)


def _library_files(root: Path) -> Iterator[Path]:
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if parts != ("pydoc_data", "topics.py") and not SKIPPED_FOLDERS.intersection(parts[:-1]):
            yield path


def _parse(path: Path) -> ast.Module:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        # some installations ship templates and files for other versions
        return ast.Module(body=[], type_ignores=[])


def _topics(path: Path) -> Iterator[str]:
    for node in ast.walk(_parse(path)):
        if isinstance(node, ast.Dict):
            values = (value.value for value in node.values if isinstance(value, ast.Constant))
            yield from (value for value in values if isinstance(value, str))


def _docstrings(path: Path) -> list[str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = (node for node in _statements(_parse(path)) if isinstance(node, kinds))
    return [text for text in map(ast.get_docstring, nodes) if text]


def _statements(module: ast.Module) -> Iterator[ast.AST]:
    """The nodes of `ast.walk`, in its order, without expressions, which are most of them and hold no definition."""
    queue: deque[ast.AST] = deque([module])
    while queue:
        node = queue.popleft()
        yield node
        for name in node._fields:
            children = getattr(node, name, None)
            if isinstance(children, list):
                queue.extend(
                    child for child in children if isinstance(child, (ast.stmt, ast.excepthandler, ast.match_case))
                )


def _document(texts: Iterable[str], seen: set[str]) -> str:
    kept = []
    for text in texts:
        for paragraph in prose(text):
            if paragraph not in seen:
                seen.add(paragraph)
                kept.append(paragraph)
    return "\n\n".join(kept)


def prose(text: str) -> Iterator[str]:
    """The paragraphs of a docstring that are prose, unwrapped, without the commonest reST markup.

    Headings, doctests, code, tables and fields are dropped by a heuristic: prose is words, mostly of letters.
    """
    for block in re.split(r"\n\s*\n", text):
        for item in _items(block):
            plain = _MARKUP.sub("", _ROLE.sub(r"\1", item)).strip()
            if _is_prose(plain):
                yield plain


def _items(block: str) -> Iterator[str]:
    """The block as one line, or its list items as one line each."""
    item: list[str] = []
    for line in block.splitlines():
        if line.lstrip().startswith((">>>", "... ", ".. ", "@", "$ ")) or not re.search(r"\w", line):
            continue
        if _BULLET.match(line) and item:
            yield " ".join(item)
            item = []
        item.append(_BULLET.sub("", line).strip())
    yield " ".join(item)


def _is_prose(paragraph: str) -> bool:
    if len(paragraph.split()) < MIN_PARAGRAPH_WORDS:
        return False
    letters = sum(character.isalpha() or character == " " for character in paragraph)
    return letters >= MIN_LETTERS * len(paragraph)
