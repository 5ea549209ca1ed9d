"""What machines enforce of the architecture: one-way imports, one module of collectives, readable sizes."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

#: rooms from the ground up; a room imports from its own and lower floors only
FLOORS = [
    {"errors", "registry", "config", "dist", "durable", "hub", "lfs", "precision"},
    {"kernels"},
    {"data", "model"},
    {"optim"},
    {"zero"},
    {"tasks"},
    {"train"},
    {"average", "compress", "evaluate", "export", "onnx", "predict", "scaling"},
    {"launch"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
SOURCES = sorted(path for package in ("engine", "launch") for path in (ROOT / package).rglob("*.py"))


def room(module: str) -> str | None:
    """The room of a dotted module of ours; None for others and for the package `engine` itself."""
    parts = module.split(".")
    if parts[0] == "launch":
        return "launch"
    return parts[1] if parts[0] == "engine" and len(parts) > 1 else None


def statements(tree: ast.AST, *, annotations: bool) -> Iterator[ast.AST]:
    """All nodes; without those of annotations, none of `if TYPE_CHECKING`, which never runs."""
    if not annotations and isinstance(tree, ast.If) and ast.unparse(tree.test) == "TYPE_CHECKING":
        return
    yield tree
    for child in ast.iter_child_nodes(tree):
        yield from statements(child, annotations=annotations)


def imports(path: Path, *, annotations: bool = True) -> Iterator[str]:
    """The dotted names that a module imports, wherever in it, with what it takes from them."""
    for node in statements(ast.parse(path.read_text()), annotations=annotations):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    own = room(".".join(path.relative_to(ROOT).with_suffix("").parts))
    for module in imports(path):
        imported = room(module)
        if own and own != "__init__" and imported:
            assert FLOOR[imported] <= FLOOR[own], f"{own} imports {module}"


def modules() -> dict[str, Path]:
    """Dotted names of all of our modules."""
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in SOURCES}


def arrows(known: dict[str, Path]) -> Iterator[tuple[str, str]]:
    """From each module to those that it imports for more than annotations."""
    for name, path in known.items():
        for imported in imports(path, annotations=False):
            yield name, imported if imported in known else imported.rpartition(".")[0]


def circles(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """What is left of a graph after all that leads nowhere, or that nothing leads to, is taken away."""
    left = {name: set(targets) for name, targets in graph.items()}
    while True:
        reached = set().union(*left.values())
        kept = {name: {to for to in targets if to in left} for name, targets in left.items() if name in reached}
        kept = {name: targets for name, targets in kept.items() if targets}
        if kept == left:
            return kept
        left = kept


def test_no_folder_imports_itself_around_a_corner() -> None:
    """Single files count as folders of their own, so that a package and its parts may share a parent."""
    known = modules()
    packages = {name for name, path in known.items() if path.name == "__init__.py"}

    def folder(name: str) -> str:
        parent = name.rpartition(".")[0]
        leaf = parent in packages and not any(other.startswith(f"{parent}.") for other in packages)
        return parent if leaf and name not in packages else name

    graph: dict[str, set[str]] = {}
    for name, imported in arrows(known):
        if imported in known and folder(name) != folder(imported):
            graph.setdefault(folder(name), set()).add(folder(imported))
    assert circles(graph) == {}


def test_no_folder_holds_more_than_fourteen_modules() -> None:
    counts = Counter(path.parent for path in SOURCES if path.name != "__init__.py")
    assert {str(folder): count for folder, count in counts.items() if count > 14} == {}


def test_only_one_module_calls_collectives() -> None:
    calls = ["all_reduce(", "all_gather", "all_to_all", "broadcast_object_list(", "torch_dist.barrier("]
    calls.append("reduce_scatter(")
    users = {str(path.relative_to(ROOT)) for path in SOURCES if any(call in path.read_text() for call in calls)}
    assert users == {"engine/dist.py"}


def test_only_one_module_starts_deepspeed() -> None:
    users = {str(path.relative_to(ROOT)) for path in SOURCES if "deepspeed.initialize(" in path.read_text()}
    assert users == {"engine/zero/engine.py"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_readable(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


def test_a_command_line_is_checked_without_importing_torch() -> None:
    """A typo is answered at once, and preparation never loads a training library."""
    code = (
        "import sys, launch.prepare, launch.train; print({'torch', 'deepspeed', 'transformers'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
