"""The images' steps are those of install/container.sh, which runs here without Docker; `make dist` works."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_an_image_runs_the_script_and_copies_what_it_needs(kind: str) -> None:
    text = (ROOT / "install" / f"Dockerfile.{kind}").read_text()
    assert f"install/container.sh {kind} /opt/moh $EXTRAS" in text and 'ENTRYPOINT ["moh"]' in text
    assert "g++" in text and "MOH_CACHE_DIR=/opt/moh-cache PATH=/opt/moh/bin:$PATH" in text
    assert {word for word in re.findall(r"^[A-Z]+", text, re.MULTILINE)} <= set(
        "FROM RUN USER ENV ARG COPY WORKDIR ENTRYPOINT".split()
    )


def instructions(kind: str) -> list[str]:
    lines = (ROOT / "install" / f"Dockerfile.{kind}").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_the_images_differ_in_pytorch_alone() -> None:
    cpu, cuda = instructions("cpu"), instructions("cuda")
    own = {
        "ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu": None,
        'RUN TORCH_INDEX="$TORCH_INDEX" /home/moh/source/install/container.sh cpu /opt/moh $EXTRAS': cuda[-3],
    }
    assert [line for line in (own.get(line, line) for line in cpu) if line] == [
        line for line in cuda if not line.startswith("ENV NVIDIA_")
    ]


PYTHON = """#!/bin/sh
echo "$0 $*" >> "$LOG"
if [ "$2" = venv ]; then
    mkdir -p "$3/bin"
    cp "$0" "$3/bin/python"
    cp "$0" "$3/bin/moh"
fi
"""
"""Stands for Python and for `moh`: notes how it was called, and `-m venv` copies it."""


@pytest.mark.parametrize(("kind", "torch"), [("cpu", "cpu"), ("cuda", "index")])
def test_the_steps_of_an_image_in_order(kind: str, torch: str, tmp_path: Path) -> None:
    python, log = tmp_path / "python3", tmp_path / "log"
    python.write_text(PYTHON)
    python.chmod(0o755)
    away = os.environ | {"PYTHON": str(python), "LOG": str(log), "TORCH_INDEX": "https://one"}
    script = ROOT / "install" / "container.sh"
    subprocess.run([script, kind, tmp_path / "made", "hf", "plot"], env=away, check=True)
    made = tmp_path / "made" / "bin"
    venv, install, check, info = log.read_text().splitlines()
    assert venv == f"{python} -m venv {tmp_path / 'made'}"
    assert install.startswith(f"{made / 'python'} {script.parent}/../install/environment.py --copy --torch {torch} ")
    assert install.endswith("--torch-index https://one --pip-flags=--quiet --no-cache-dir hf plot")
    assert (check, info) == (f"{made / 'python'} -", f"{made / 'moh'} info")


def test_the_images_are_not_sent_without_what_is_installed() -> None:
    ignored = {
        line.strip("/") for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")
    }
    needed = {"src", "recipes", "install", "README.md", "LICENSE", "pyproject.toml", "constraints.txt"}
    assert not ignored & needed and all((ROOT / name).exists() for name in needed)


def test_another_kind_of_image_is_refused() -> None:
    result = subprocess.run(
        [ROOT / "install" / "container.sh", "tpu", "x"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2 and "must be cpu or cuda, got tpu" in result.stderr


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_steps_of_the_cpu_image_make_an_environment_with_kernels(tmp_path: Path) -> None:
    away = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    away |= {"MOH_CACHE_DIR": str(tmp_path / "cache"), "PYTHON": sys.executable}
    command = [ROOT / "install" / "container.sh", "cpu", tmp_path / "environment", "hf"]
    result = subprocess.run(command, cwd=tmp_path, env=away, capture_output=True, text=True, check=False)
    if "pip's index offers no CPU build" in result.stderr:
        pytest.skip("pip's index offers no CPU build of torch")
    assert result.returncode == 0, result.stderr
    assert list((tmp_path / "cache" / "cpu").glob("*/moh_cpu.so"))
    assert "MB to download" in result.stdout and "+cpu" in result.stdout


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_built_wheel_runs_the_readme_in_an_empty_environment(tmp_path: Path) -> None:
    away = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, ROOT / "install" / "dist.py", "--output", tmp_path]
    result = subprocess.run(command, cwd=tmp_path, env=away, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert {file.suffix for file in tmp_path.iterdir()} == {".whl", ".gz"}
