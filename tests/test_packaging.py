"""What the package declares is what it uses: extras against imports, one version, and files that name it."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import moh

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "moh"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

EXTRA_OF = {  # a folder or file -> the extra that is enough for it; the longest match counts, "" is the package without any
    "": "",
    "_processes.py": "hf",
    "conversion": "hf",
    "conversion/timm.py": "vision",
    "conversion/diffusers.py": "diffusion",
    "data": "hf",
    "data/images": "vision",
    "models/card.py": "hf",
    "models/classifiers.py": "vision",
    "models/exported.py": "hf",
    "models/runtimes.py": "hf",
    "models/hub.py": "hf",
    "models/published.py": "hf",
    "models/transformers": "hf",
    "models/vllm": "hf",
    "models/timm": "vision",
    "models/diffusers": "diffusion",
    "sampling": "diffusion",
    "training": "train",
    "training/images": "vision",
    "training/diffusion": "diffusion",
    "evaluation": "hf",
    "evaluation/curve_plots.py": "plot",
    "evaluation/images.py": "vision",
    "evaluation/generation": "diffusion",
    "evaluation/harness": "eval",
    "inspection": "hf",
    "inspection/images.py": "vision",
    "inspection/diffusion.py": "diffusion",
    "inspection/page/samples.py": "vision",
    "explore": "app",
    "explore/images.py": "all",
    "demo": "llm",
    "cli": "llm",
    "cli/inspect_subjects.py": "vision",
    "cli/programs.py": "eval",
    "cli/scores.py": "diffusion",
}
WITH_TORCH = {"triton"}  # its build with CUDA brings it; the backends ask whether it is there
HOSTS = {"vllm"}  # imports the files that import it
RUNTIMES = {"onnxruntime"}  # of an export that is loaded; an error names what to install
MODULES = {"huggingface-hub": "huggingface_hub", "lm-eval": "lm_eval", "pillow": "PIL", "pyyaml": "yaml"}
MODULES["torch-fidelity"] = "torch_fidelity"


def provided(extra: str) -> set[str]:
    """The modules that the package with this extra declares, directly or by another extra."""
    lines = list(PROJECT["dependencies"]) + (list(PROJECT["optional-dependencies"][extra]) if extra else [])
    found = set()
    for line in lines:
        name, extras = re.match(r"([\w.-]+)(?:\[([\w,-]+)\])?", line).groups()
        if name == PROJECT["name"]:
            for other in extras.split(","):
                found |= provided(other)
        else:
            found.add(MODULES.get(name.lower().replace("_", "-"), name))
    return found


def foreign(node: ast.AST) -> Iterator[tuple[str, str | None]]:
    """(package, extra of `require` or None) for each import that is neither ours nor Python's, nor for type checkers alone."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        names: list[str] = []
        extra = None
        if isinstance(child, ast.Import):
            names = [alias.name for alias in child.names]
        elif isinstance(child, ast.ImportFrom) and child.module and child.level == 0:
            names = [child.module]
        elif isinstance(child, ast.Call) and ast.unparse(child.func) == "require":
            values = [child.args[0], child.keywords[0].value]
            if all(isinstance(value, ast.Constant) for value in values):
                names, extra = [values[0].value], values[1].value
        for name in names:
            top = name.partition(".")[0]
            if top not in ("moh", *sys.stdlib_module_names):
                yield top, extra
        yield from foreign(child)


def enough_for(file: str) -> str:
    """The extra that a file may rely on."""
    return EXTRA_OF[max((key for key in EXTRA_OF if file == key or key == "" or file.startswith(f"{key}/")), key=len)]


FILES = [path.relative_to(SOURCE).as_posix() for path in sorted(SOURCE.rglob("*.py"))]


@pytest.mark.parametrize("folder", sorted({file.rpartition("/")[0] for file in FILES}))
def test_every_import_is_declared_in_the_extra_of_its_room(folder: str) -> None:
    undeclared = []
    for file in (file for file in FILES if file.rpartition("/")[0] == folder):
        for package, extra in foreign(ast.parse((SOURCE / file).read_text(encoding="utf-8"))):
            enough = enough_for(file) if extra is None else extra
            if package not in provided(enough) | WITH_TORCH | HOSTS | RUNTIMES:
                undeclared.append(f"{file} imports {package}, which the extra {enough!r} does not install")
    assert undeclared == []


@pytest.mark.parametrize("key", [key for key in EXTRA_OF if key])
def test_every_entry_of_the_table_is_a_place(key: str) -> None:
    assert (SOURCE / key).exists()


def test_llm_is_the_three_small_extras_together() -> None:
    assert provided("llm") == provided("hf") | provided("train") | provided("plot")
    before = "accelerate datasets gguf matplotlib pandas yaml rich safetensors tensorboard tqdm transformers".split()
    assert {*before} <= provided("llm") <= provided("all")


def test_extras_that_errors_name_exist() -> None:
    named = re.findall(r'extra="(\w+)"', "".join((SOURCE / file).read_text(encoding="utf-8") for file in FILES))
    assert set(named) <= set(PROJECT["optional-dependencies"])


def test_the_version_has_one_source_and_the_citation_has_it_too() -> None:
    assert "version" not in PROJECT and PROJECT["dynamic"] == ["version"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (citation["version"], citation["license"]) == (moh.__version__, PROJECT["license"])
    assert citation["preferred-citation"]["identifiers"][0]["value"] == "arXiv:2410.11842"


def test_our_pages_install_the_package_by_its_name_on_pypi() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "recipes").rglob("*.md")]
    for page in pages:
        for command in re.findall(
            r"^\s*\$?\s*((?:uv )?pip install .*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE
        ):
            assert not re.search(r"install (?:-\S+ )*[\"']?moh\b", command), (
                f"{page}: {command}: another project on PyPI"
            )


@pytest.mark.parametrize("file", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda file: file.name)
def test_files_of_the_hosting_service_are_yaml(file: Path) -> None:
    assert isinstance(yaml.safe_load(file.read_text(encoding="utf-8")), dict)
