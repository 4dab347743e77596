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
