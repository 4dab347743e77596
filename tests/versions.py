"""Run the models' tests with the oldest and the newest published versions of the libraries, in an environment each.

    python tests/versions.py                               # both; `make test-versions` does this
    python tests/versions.py --only newest -- -k decoding  # one of them, with options for pytest

The oldest are the lower bounds in pyproject.toml. The newest are what pip finds if upper bounds are left out, so that a
release that came after them shows up here first. An environment is kept, and brought up to date on the next run.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

from environments import ROOT, Environment, run

VERSIONS = ("oldest", "newest")
EXTRAS = ("hf", "train", "plot", "vision", "diffusion", "test")
LEFT_OUT = {  # deepspeed and playwright: large, and no test of a model needs them
    # TRL and the quantisers need newer libraries than we do; their tests are skipped
    "oldest": ("deepspeed", "playwright", "trl", "bitsandbytes", "torchao"),
    "newest": ("deepspeed", "playwright"),
}
LIBRARIES = (
    "torch",
    "transformers",
    "timm",
    "diffusers",
    "accelerate",
    "peft",
    "trl",
    "bitsandbytes",
    "torchao",
    "safetensors",
    "torchvision",
    "numpy",
)
TESTS = (
    *("tests/test_imports.py", "tests/models", "tests/conversion", "tests/cli/test_serving.py"),
    *(f"tests/training/test_{name}.py" for name in ("lora", "run", "trl")),
)
REQUIREMENT = re.compile(r"(?P<name>[\w.-]+(?:\[[\w,-]+\])?)(?:>=(?P<lowest>[\w.]+))?[^;]*")


def requirements(versions: str) -> list[str]:
    """What pip is to install for "oldest" or "newest" versions."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(line for extra in EXTRAS for line in project["optional-dependencies"][extra])]
    found = []
    for line in lines:
        match = REQUIREMENT.match(line)
        assert match is not None, line
        name, lowest = match["name"], match["lowest"]
        if name.partition("[")[0] not in (project["name"], *LEFT_OUT[versions]):
            found.append(f"{name}=={lowest}" if versions == "oldest" else name)
    return found


def install(versions: str, environment: Path) -> Path:
    """The environment's interpreter, with these versions installed."""
    python = environment / "bin" / "python"
    if not python.exists():
        venv.create(environment, with_pip=True)
    upgrade = ["--upgrade", "--upgrade-strategy", "eager"] if versions == "newest" else []
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *upgrade, *requirements(versions)], check=True)
    return python


def installed(python: Path) -> dict[str, str]:
    """Library -> its version in an environment."""
    command = [python, "-m", "pip", "list", "--format=json", "--disable-pip-version-check"]
    listed = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return {package["name"]: package["version"] for package in listed if package["name"] in LIBRARIES}


def make(name: str, directory: Path) -> Environment:
    """The environment with these versions."""
    print(f"{name}: installing into {directory}", flush=True)
    python = install(name, directory)
    holds = ", ".join(f"{library} {version}" for library, version in installed(python).items())
    print(f"{name}: {holds}", flush=True)
    return Environment(python, TESTS, holds=holds)


if __name__ == "__main__":
    sys.exit(run(__doc__, VERSIONS, make))
