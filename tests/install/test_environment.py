"""What `make` installs: PyTorch's CPU build where it is offered and no GPU is seen, and the size is said before."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]

FAKE_PIP = """
import json, pathlib, sys
here = pathlib.Path(__file__).parent
offer = json.loads((here / "offer.json").read_text())
words = [word for word in sys.argv[1:] if word != "--disable-pip-version-check"]
if words[:2] == ["index", "versions"]:
    print(f"{words[2]} (9.9)\\nAvailable versions: {', '.join(offer[words[2]])}\\n  INSTALLED: 2.13.0+cpu")
elif "--dry-run" in words:
    if offer.get("plan") == "fails":
        sys.exit(1)
    url = (here / "torch.whl").as_uri()
    packages = [{"metadata": {"name": "torch", "version": "7.7"}, "download_info": {"url": url}}]
    pathlib.Path(words[words.index("--report") + 1]).write_text(json.dumps({"install": packages}))
elif words[0] == "install" and "--constraint" in words:
    constraints = pathlib.Path(words[words.index("--constraint") + 1]).read_text()
    (here / "installed.json").write_text(json.dumps({"words": words, "constraints": constraints.split()}))
"""


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """install/environment.py with a pip that fetches nothing; on Linux, with an empty environment and no GPU."""
    spec = importlib.util.spec_from_file_location("moh_test_environment", ROOT / "install" / "environment.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "pip.py").write_text(FAKE_PIP)
    (tmp_path / "torch.whl").write_bytes(bytes(3_000_000))
    monkeypatch.setattr(module, "PIP", (sys.executable, str(tmp_path / "pip.py")))
    monkeypatch.setattr(module, "sees_nvidia_gpu", lambda: False)
    monkeypatch.setattr(module, "is_kept", lambda pinned: False)
    monkeypatch.setattr(module.platform, "system", lambda: "Linux")
    return module


def offer(folder: Path, **versions: Any) -> None:
    (folder / "offer.json").write_text(json.dumps({"torch": [], "torchvision": [], **versions}))


def installed(folder: Path) -> dict[str, list[str]]:
    return json.loads((folder / "installed.json").read_text())


PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)


@pytest.mark.parametrize(
    ("torch", "torchvision", "both", "chosen"),
    [
        pytest.param(["2.14.1", "2.14.1+cpu", "2.13.0+cpu"], [], False, "2.14.1+cpu", id="the-pinned-release"),
        pytest.param(["2.14.1", "2.9.1+cpu", "2.13.0+cpu"], [], False, "2.13.0+cpu", id="the-newest-older-one"),
        pytest.param(["2.14.1", "2.15.0+cpu"], [], False, None, id="never-a-newer-one"),
        pytest.param(["2.10.0+cpu"], [], False, None, id="nor-one-below-our-lower-bound"),
        pytest.param(["2.14.1", "2.14.1+cu130"], [], False, None, id="none"),
        pytest.param(["2.13.0+cpu"], ["0.28.0"], True, None, id="torchvision's-is-missing"),
        pytest.param(["2.13.0+cpu"], ["0.28.0+cpu"], True, "2.13.0+cpu", id="both"),
    ],
)
def test_the_cpu_build_is_the_pinned_release_or_an_older_one(environment, tmp_path, torch, torchvision, both, chosen):
    offer(tmp_path, torch=torch, torchvision=torchvision)
    build, why_not = environment.cpu_build("2.14.1", [], with_torchvision=both)
    assert build == chosen and (why_not == "") == (chosen is not None)
    assert chosen or "offers no CPU build of torch" in why_not


@pytest.mark.parametrize(
    ("extras", "needs"),
    [
        (["hf"], False),
        (["llm"], False),
        (["docs"], False),
        (["vision"], True),
        (["diffusion"], True),
        (["all", "test"], True),
    ],
)
def test_extras_that_bring_torchvision_are_known(environment, extras, needs):
    assert environment.needs_torchvision(extras) is needs


def test_the_cpu_build_is_installed_and_its_size_said_before(environment, tmp_path, capsys):
    offer(tmp_path, torch=["2.14.1", "2.13.0+cpu"])
    assert environment.main(["llm"]) == 0
    out = capsys.readouterr().out
    assert "the CPU build, 2.13.0+cpu" in out and "1 packages" in out and "3 MB to download" in out
    assert f"transformers=={PINS['transformers']}" in installed(tmp_path)["constraints"]
    # what the plan found is what is installed; torchvision's pin belongs to another torch
    assert "torch==7.7" in installed(tmp_path)["constraints"]
    assert not any(line.startswith("torchvision==") for line in installed(tmp_path)["constraints"])
    assert "--editable" in installed(tmp_path)["words"] and f"{ROOT}[llm]" in installed(tmp_path)["words"]


@pytest.mark.parametrize("extras", [["llm"], ["all", "test", "lint"]])
def test_without_a_cpu_build_the_index_decides_and_the_way_out_is_named(environment, tmp_path, capsys, extras):
    offer(tmp_path, torch=["2.14.1", *(["2.13.0+cpu"] if "all" in extras else [])], plan="fails")
    assert environment.main(extras) == 0
    assert "TORCH_INDEX=https://download.pytorch.org/whl/cpu" in capsys.readouterr().out
    assert f"torch=={PINS['torch']}" in installed(tmp_path)["constraints"]


def test_with_a_gpu_nothing_is_looked_for(environment, tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "sees_nvidia_gpu", lambda: True)
    offer(tmp_path, torch=["2.13.0+cpu"], plan="fails")
    assert environment.main(["llm"]) == 0
    assert f"torch=={PINS['torch']}" in installed(tmp_path)["constraints"]


def test_an_environment_with_the_pinned_cuda_build_stays_as_it_is(environment, tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "is_kept", lambda pinned: True)
    offer(tmp_path, torch=["2.13.0+cpu"], plan="fails")
    assert environment.main(["llm"]) == 0
    assert f"torch=={PINS['torch']}" in installed(tmp_path)["constraints"]


def test_an_environment_that_has_to_be_for_the_cpu_is_refused_otherwise(environment, tmp_path, capsys):
    offer(tmp_path, torch=["2.14.1"])
    assert environment.main(["llm", "--torch", "cpu"]) == 1
    assert "offers no CPU build of torch from 2.11 to" in capsys.readouterr().err
    assert not (tmp_path / "installed.json").exists()


def test_one_more_index_and_pip_s_options_reach_pip(environment, tmp_path):
    offer(tmp_path, torch=["2.14.1+cpu"])
    options = ["--torch-index", "https://example.org/cpu", "--pip-flags=--quiet --no-cache-dir", "--copy"]
    assert environment.main(["llm", *options]) == 0
    words = installed(tmp_path)["words"]
    assert words[words.index("--extra-index-url") + 1] == "https://example.org/cpu"
    assert {"--quiet", "--no-cache-dir"} <= set(words) and "--editable" not in words


@pytest.mark.parametrize(
    ("listed", "sees"), [("GPU 0: NVIDIA H200 (UUID: GPU-1)", True), ("No devices were found", False)]
)
def test_a_gpu_is_what_the_driver_lists(tmp_path, monkeypatch, listed, sees):
    spec = importlib.util.spec_from_file_location("moh_test_environment", ROOT / "install" / "environment.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho '{listed}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert module.sees_nvidia_gpu() is sees


def test_sizes_that_a_server_does_not_say_are_counted_as_unknown(environment, tmp_path):
    files = [
        ("torch", "1", (tmp_path / "torch.whl").as_uri()),
        ("ours", "1", ROOT.as_uri()),
        ("x", "1", "http://[::1]:1/x.whl"),
    ]
    sizes = environment.file_sizes(files)
    assert sizes == [3_000_000, 0, None]
    assert environment.announce(sizes) == "3 MB to download, and 1 files whose size is not known"
