"""Describes the package in one JSON file, to show that a change of layout changed nothing else.

    python tests/fingerprint.py before.json          # before the change
    python tests/fingerprint.py --compare before.json  # after it; prints what differs, exit code 1 if anything does

Holds a hash of every definition (without docstrings, imports and file name); configuration and names, shapes and dtypes
of the weights of every preset and family; the `--help` of every command; every recipe as it is read; and the schemas
of our operators.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import hashlib
import importlib
import io
import json
import pkgutil
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import moh

ROOT = Path(__file__).resolve().parents[1]


def definitions(root: Path) -> list[str]:
    """`NAME HASH` of every function, class and constant of the files under `root`, sorted; names may repeat."""
    found = []
    for path in sorted(root.rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            for name in _names(node):
                found.append(f"{name} {_digest(node)}")
    return sorted(found)


def _names(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            if isinstance(target, ast.Name) and target.id != "__all__":
                yield target.id


class _Bare(ast.NodeTransformer):
    """Removes docstrings and imports."""

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        return None if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str) else node

    def visit_Import(self, node: ast.Import) -> None:
        return None

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        return None


def _digest(node: ast.stmt) -> str:
    return hashlib.sha256(ast.dump(_Bare().visit(node)).encode()).hexdigest()[:12]


def models() -> dict[str, Any]:
    """Configuration and layout of every named model of timm, diffusers and transformers."""
    import timm
    from transformers import AutoConfig
    from transformers.models.auto import modeling_auto

    from moh.models.diffusers import DIT_NAMES, create_dit

    found: dict[str, Any] = {}
    with torch.device("meta"):
        for name in timm.list_models("*moh_*_*"):  # not plain `moh_vit`, which needs arguments
            model = timm.create_model(name)
            found[name] = {"config": model.pretrained_cfg, "layout": _layout(model)}
        for name in DIT_NAMES:
            model = create_dit(name)
            # the order of _use_default_values varies
            config = {key: value for key, value in model.config.items() if key != "_use_default_values"}
            found[name] = {"config": config, "layout": _layout(model)}
        for auto in sorted(n for n in vars(modeling_auto) if n.startswith("AutoModel")):
            kind = getattr(modeling_auto, auto)
            for config_class in list(getattr(kind, "_model_mapping", {})):
                model_type = config_class.model_type
                if model_type.startswith("moh_"):
                    model = kind.from_config(AutoConfig.for_model(model_type, num_hidden_layers=2))
                    found[f"{model_type} {type(model).__name__}"] = {"layout": _layout(model)}
                    found[model_type] = {"config": model.config.to_dict()}
    return found


def _layout(model: torch.nn.Module) -> str:
    lines = [f"{name} {tuple(t.shape)} {t.dtype}" for name, t in sorted(model.state_dict().items())]
    return f"{len(lines)} tensors, {hashlib.sha256(chr(10).join(lines).encode()).hexdigest()[:12]}"


def helps() -> dict[str, str]:
    """Command -> its `--help`."""
    from moh.cli.main import build_parser, main

    commands = next(a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction)).choices
    found = {}
    for command in ["", *commands, "eval lm", "eval fid"]:
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
            main([*command.split(), "--help"])
        found[f"moh {command}"] = " ".join(out.getvalue().split())
    return found


def recipes() -> dict[str, str]:
    """Recipe -> what `load_recipe` makes of it, as `dump_recipe` writes it."""
    from moh.training.recipes import dump_recipe, load_recipe

    found = {}
    for path in sorted((ROOT / "recipes").rglob("*.yaml")):
        if path.parent.name != "accelerate":
            found[str(path.relative_to(ROOT))] = dump_recipe(load_recipe(path))
    return found


def operators() -> list[str]:
    """Schemas of the operators in the namespace `moh`, C++ and Triton."""
    for module in pkgutil.walk_packages(moh.attention.__path__, "moh.attention."):
        if not module.name.endswith("__main__"):
            with contextlib.suppress(ImportError):  # without Triton
                importlib.import_module(module.name)
    from moh.attention import cpu

    cpu.unavailable()  # loads them
    schemas = torch._C._jit_get_all_schemas()
    return sorted({str(schema) for schema in schemas if schema.name.startswith("moh::")})


def fingerprint() -> dict[str, Any]:
    return {
        "definitions": definitions(ROOT / "src" / "moh"),
        "models": models(),
        "helps": helps(),
        "recipes": recipes(),
        "operators": operators(),
    }


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """One line per entry that only one of the two has."""
    lines = []
    for part, old in before.items():
        new = after[part]
        if isinstance(old, list):
            gone, come = Counter(old) - Counter(new), Counter(new) - Counter(old)
            lines += [f"{part}: - {entry}" for entry in sorted(gone.elements())]
            lines += [f"{part}: + {entry}" for entry in sorted(come.elements())]
        else:
            for key in sorted(old.keys() | new.keys()):
                if old.get(key) != new.get(key):
                    lines += [f"{part}: {key}", f"  - {old.get(key)}", f"  + {new.get(key)}"]
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description="Write or compare the fingerprint of the package.")
    parser.add_argument("file", type=Path, help="where to write it, or what to compare with")
    parser.add_argument("--compare", action="store_true", help="compare the package as it is with the file")
    arguments = parser.parse_args()
    now = json.loads(json.dumps(fingerprint(), default=str))
    if not arguments.compare:
        arguments.file.write_text(json.dumps(now, indent=1), encoding="utf-8")
        return 0
    lines = differences(json.loads(arguments.file.read_text(encoding="utf-8")), now)
    print("\n".join(lines) or "nothing differs")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
