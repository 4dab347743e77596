"""Install this checkout into the environment of the interpreter that runs this, as `make` does.

    .venv/bin/python install/environment.py llm            # one extra
    .venv/bin/python install/environment.py all test lint  # several

Versions are those of constraints.txt. Where no NVIDIA GPU is seen, PyTorch's CPU build is installed if the index that
pip is set up for offers one: the environment is then 4 GB smaller. Says how much there is to download before it starts.
Needs nothing but pip.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
import urllib.request
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parents[1]
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")
# Resolves with `--dry-run` from metadata alone; the one that comes with Python 3.11 would download everything for it.
PLANNING_PIP = "pip>=23.3"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PIN = re.compile(r"^\s*([A-Za-z0-9._-]+)\s*==\s*([^\s;#]+)")


def main(argv: Sequence[str] | None = None) -> int:
    """Install; returns pip's exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("extras", nargs="+", help="extras of pyproject.toml")
    parser.add_argument(
        "--torch", choices=("auto", "cpu", "index"), default="auto",
        help="auto: the CPU build if no NVIDIA GPU is seen; cpu: that or nothing; index: what pip takes by itself",
    )  # fmt: skip
    parser.add_argument("--torch-index", default="", metavar="URL", help="one more index, which has PyTorch")
    parser.add_argument("--copy", action="store_true", help="copy the package instead of linking to this checkout")
    parser.add_argument("--pip-flags", default="", help="more options for pip, in one argument: --pip-flags=--quiet")
    arguments = parser.parse_args(argv)

    index = ["--extra-index-url", arguments.torch_index] if arguments.torch_index else []
    target = f"{ROOT}[{','.join(arguments.extras)}]"
    pins = read_pins((ROOT / "constraints.txt").read_text(encoding="utf-8"))
    plans = bring_planning_pip()
    if arguments.torch == "cpu" or (arguments.torch == "auto" and not sees_nvidia_gpu() and not is_kept(pins["torch"])):
        build, why_not = cpu_build(pins["torch"], index, with_torchvision=needs_torchvision(arguments.extras))
        if build is not None:
            print(f"PyTorch: the CPU build, {build}", flush=True)
            if build.partition("+")[0] != pins["torch"]:
                pins.pop("torchvision", None)  # pip finds the one that belongs to this torch
            pins["torch"] = build
        elif arguments.torch == "cpu":
            print(f"{why_not}; name an index that does: --torch-index {CPU_INDEX}", file=sys.stderr)
            return 1
        elif platform.system() == "Linux":  # elsewhere the builds on PyPI are for the CPU
            print(f"PyTorch: {why_not}, so this is the build with CUDA, 4 GB larger; to avoid it, give make an index")
            print(f"that offers one: TORCH_INDEX={CPU_INDEX}", flush=True)
    files = plan(target, pins, index) if plans else None
    if files is None:
        print(
            f"Installing into {sys.prefix}; the first time this downloads PyTorch and takes some minutes.", flush=True
        )
    else:
        pins |= {name: version for name, version, _ in files if name != "mixture-of-heads"}
        print(f"Installing {len(files)} packages into {sys.prefix}: {announce(file_sizes(files))}", flush=True)
    where = [target] if arguments.copy else ["--editable", target]
    with tempfile.TemporaryDirectory() as folder:
        options = [*index, "--constraint", write_pins(pins, folder), *shlex.split(arguments.pip_flags)]
        return subprocess.run([*PIP, "install", *options, *where], check=False).returncode


def read_pins(text: str) -> dict[str, str]:
    """Package -> version, of the lines `package==version` of a constraints file."""
    return {match[1]: match[2] for line in text.splitlines() if (match := PIN.match(line))}


def write_pins(pins: dict[str, str], folder: str) -> str:
    """A constraints file with these versions, in `folder`."""
    path = Path(folder) / "constraints.txt"
    path.write_text("".join(f"{name}=={version}\n" for name, version in pins.items()), encoding="utf-8")
    return str(path)


def sees_nvidia_gpu() -> bool:
    """Whether NVIDIA's driver lists a GPU."""
    if shutil.which("nvidia-smi"):
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
        return listed.returncode == 0 and "GPU" in listed.stdout
    return any(Path("/proc/driver/nvidia/gpus").glob("*"))


def is_kept(pinned: str) -> bool:
    """Whether the pinned torch is installed and not the CPU build: `make demo` after `make test` leaves it alone."""
    try:
        installed = metadata.version("torch")
    except metadata.PackageNotFoundError:
        return False
    return installed.partition("+")[0] == pinned and not installed.endswith("+cpu")


def bring_planning_pip() -> bool:
    """Update the environment's pip where it is too old to plan; whether it can plan."""
    command = [*PIP, "install", "--quiet", PLANNING_PIP]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def needs_torchvision(extras: Iterable[str]) -> bool:
    """Whether one of these extras installs torchvision, directly or by another extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    open_, seen = list(extras), set()
    while open_:
        name = open_.pop()
        if name in seen:
            continue
        seen.add(name)
        for requirement in project["optional-dependencies"][name]:
            if requirement.startswith("torchvision"):
                return True
            if match := re.match(rf"{project['name']}\[([\w,-]+)\]", requirement):
                open_ += match[1].split(",")
    return False


def cpu_build(pinned: str, index: Sequence[str], *, with_torchvision: bool) -> tuple[str | None, str]:
    """The version of PyTorch's CPU build to install, for example "2.14.1+cpu": the pinned release's, or an older one's.

    torchvision's CUDA build does not load with PyTorch's CPU build, so that one alone is not enough where both are needed.

    Returns:
        the version and "", or None and why there is none.
    """
    if with_torchvision and not cpu_versions("torchvision", index):
        return None, "pip's index offers no CPU build of torchvision"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    oldest = next(line.partition(">=")[2] for line in project["dependencies"] if line.startswith("torch>="))
    fitting = [v for v in cpu_versions("torch", index) if numbers(oldest) <= numbers(v) <= numbers(pinned)]
    if not fitting:
        return None, f"pip's index offers no CPU build of torch from {oldest} to {pinned}"
    return max(fitting, key=numbers), ""


def cpu_versions(package: str, index: Sequence[str]) -> list[str]:
    """The versions of a package with the label "+cpu" that pip finds for this interpreter."""
    listed = subprocess.run([*PIP, "index", "versions", package, *index], capture_output=True, text=True, check=False)
    offered = re.search(r"^Available versions: (.*)$", listed.stdout, re.MULTILINE)
    return [version for version in (offered[1].split(", ") if offered else []) if version.endswith("+cpu")]


def numbers(version: str) -> tuple[int, ...]:
    """2.14.1+cpu -> (2, 14, 1)."""
    return tuple(int(part) for part in version.partition("+")[0].split(".") if part.isdigit())


def plan(target: str, pins: dict[str, str], index: Sequence[str]) -> list[tuple[str, str, str]] | None:
    """(name, version, address) of what pip is going to install; None where it can't say."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        options = [*index, "--constraint", write_pins(pins, folder), "--report", str(report)]
        command = [*PIP, "install", "--dry-run", "--quiet", *options, target]
        if subprocess.run(command, capture_output=True, check=False).returncode != 0:
            return None  # the installation itself then reports what is wrong
        found = json.loads(report.read_text(encoding="utf-8"))["install"]
    return [(p["metadata"]["name"], p["metadata"]["version"], p["download_info"]["url"]) for p in found]


def file_sizes(files: Sequence[tuple[str, str, str]]) -> list[int | None]:
    """Bytes of each file that is fetched; 0 for our own, None where its server does not say."""

    def size(address: str) -> int | None:
        parts = urlsplit(address)
        if parts.scheme == "file":
            path = Path(unquote(parts.path))
            return path.stat().st_size if path.is_file() else 0
        try:
            with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=10) as answer:
                return int(answer.headers["Content-Length"])
        except (OSError, TypeError, ValueError):  # no answer, or an answer without a length
            return None

    with ThreadPoolExecutor(max_workers=8) as pool:
        return list(pool.map(size, (address for _, _, address in files)))


def announce(sizes: Sequence[int | None]) -> str:
    """The size of a download in words; files that pip has in its cache are counted too."""
    known = sum(size for size in sizes if size is not None)
    unknown = sum(size is None for size in sizes)
    text = f"{known / 1e6:,.0f} MB to download"
    return f"{text}, and {unknown} files whose size is not known" if unknown else text


if __name__ == "__main__":
    os.environ.setdefault("PIP_NO_INPUT", "1")
    sys.exit(main())
