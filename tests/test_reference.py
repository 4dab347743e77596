"""The reference pages say what the code says."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_page_of_commands_is_that_of_the_parsers() -> None:
    path = ROOT / "docs" / "generate_cli.py"
    spec = importlib.util.spec_from_file_location("generate_cli", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text(encoding="utf-8") == module.page(), f"out of date: run python {path.relative_to(ROOT)}"


def test_every_environment_variable_of_the_package_is_documented() -> None:
    page = (ROOT / "docs" / "reference" / "environment.md").read_text(encoding="utf-8")
    sources = (path.read_text(encoding="utf-8") for path in (ROOT / "src" / "moh").rglob("*.py"))
    read = {name for source in sources for name in re.findall(r"\bMOH_[A-Z_]+\b", source)}
    assert read
    assert read == set(re.findall(r"\bMOH_[A-Z_]+\b", page))
