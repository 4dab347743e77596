"""Private names of other libraries that the package uses are in the table of docs/architecture.md, where debts are listed."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = (
    "accelerate datasets diffusers huggingface_hub peft safetensors timm torch torchvision transformers vllm".split()
)


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def private_names(tree: ast.AST) -> Iterator[str]:
    """The last name of imports from and of attributes below something private of a library."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in LIBRARIES:
            inside = any(map(is_private, node.module.split(".")))
            yield from (alias.name for alias in node.names if inside or is_private(alias.name))
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            root, _, path = ast.unparse(node).partition(".")
            if root in LIBRARIES and path.replace(".", "").isidentifier():
                yield node.attr


def test_private_names_of_other_libraries_are_listed():
    table = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("## Private names", 1)[1]
    unlisted = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in (ROOT / "src").rglob("*.py")
        for name in private_names(ast.parse(path.read_text(encoding="utf-8")))
        if name not in table
    }
    assert not unlisted


def test_private_names_are_found():
    source = (
        "import torch\nfrom timm.models._features import f\nfrom torch.nn import _a, B\ntorch._C._g()\nself._own.x\n"
    )
    assert set(private_names(ast.parse(source))) == {"f", "_a", "_C", "_g"}
