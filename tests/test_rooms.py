"""The rooms keep their order: each uses only rooms below it, and no files import each other in a circle."""

from __future__ import annotations

import ast
import functools
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src"

# From the ground up; a room may import those before it. docs/architecture.md describes each.
ROOMS = (
    "_extras _lazy _checks _files _modes _processes config routing attention layer data models checkpoints conversion sampling "
    "training evaluation inspection explore demo cli __init__ __main__"
).split()


@functools.cache
def imports() -> list[tuple[str, str, bool]]:
    """(importing module, imported module of ours, whether on import) for every import in the package."""
    files = {".".join(p.relative_to(SOURCE).with_suffix("").parts): p for p in sorted(SOURCE.rglob("*.py"))}
    found = []
    for name, path in files.items():
        for node, eager in walk(ast.parse(path.read_text(encoding="utf-8")), eager=True):
            for target in targets(node):
                while target and target not in files and f"{target}.__init__" not in files:
                    target = target.rpartition(".")[0]  # a name in a module
                target = target if target in files else f"{target}.__init__"
                if target in files and target != name:
                    found.append((name, target, eager))
    return found


def walk(node: ast.AST, eager: bool):
    """The nodes below, each with whether it runs on import: not in functions or under TYPE_CHECKING."""
    for child in ast.iter_child_nodes(node):
        checked = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
        if checked or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from walk(child, eager=False)
        else:
            yield child, eager
            yield from walk(child, eager)


def targets(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [a.name for a in node.names if a.name.split(".")[0] == "moh"]
    if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "moh":
        return [f"{node.module}.{a.name}" for a in node.names]
    return []


def room(module: str) -> str:
    return module.split(".")[1]


def test_every_file_is_in_a_room():
    assert {room(name) for name, _, _ in imports()} <= set(ROOMS)


@pytest.mark.parametrize("name", ROOMS)
def test_a_room_imports_none_above_it(name):
    allowed = set(ROOMS[: ROOMS.index(name) + 1])
    assert {
        (a, b) for a, b, _ in imports() if room(a) == name and room(b) not in allowed and b != "moh.__init__"
    } == set()


def test_no_files_import_each_other_in_a_circle():
    graph: dict[str, set[str]] = {}
    for a, b, eager in imports():
        package = f"{a.rpartition('.')[0]}.__init__"
        if (
            eager and b != package and a != "moh.__init__" and b != "moh.__init__"
        ):  # a package starts loading before its files
            graph.setdefault(a, set()).add(b)
    list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the files
