"""Build the sdist and the wheel, install the wheel into an empty environment with uv, and run README.md's snippets there.

    python install/dist.py --output dist    # `make dist`

Snippets run unchanged in an empty folder in which a tiny random model has the place of the one that they load. uv takes
packages from where pip is set up to take them. PyTorch is the CPU build if that is offered.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
import venv
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from environment import PIP, ROOT, cpu_build, read_pins

STAND_INS = """
from pathlib import Path
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

folder = Path("HuggingFaceTB/SmolLM2-135M")  # 9 heads in 3 groups, as the model has that it stands for
text = "\\n\\n".join(f"Paragraph {i} says that {i} and {i} are {2 * i}, and that {i} times {i} is {i * i}." for i in range(300))
Path("some_text.txt").write_text(text)
words = Tokenizer(models.BPE(unk_token="<unk>"))
words.pre_tokenizer = pre_tokenizers.ByteLevel()
words.train_from_iterator([text], trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<eos>"]))
PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", unk_token="<unk>").save_pretrained(folder)
config = LlamaConfig(vocab_size=len(words.get_vocab()), hidden_size=72, intermediate_size=96, num_hidden_layers=2,
                     num_attention_heads=9, num_key_value_heads=3, eos_token_id=1, bos_token_id=None)
LlamaForCausalLM(config).save_pretrained(folder)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="directory of the two files")
    parser.add_argument("--torch-index", default="", metavar="URL", help="one more index, which has PyTorch")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="moh-dist-") as folder:
        work = Path(folder)
        tools = make_tools(work / "tools")
        wheel = build(tools, arguments.output.resolve())
        check_wheel(wheel)
        python = install(tools, work / "environment", wheel, arguments.torch_index)
        run_snippets(python, work / "empty")
    return 0


def make_tools(environment: Path) -> Path:
    """An environment with uv; returns its programs' directory."""
    with step("uv"):
        venv.create(environment, with_pip=True)
        programs = environment / "bin"
        run(programs / "python", *PIP[1:], "install", "--quiet", "uv>=0.9")
    return programs


def build(tools: Path, output: Path) -> Path:
    """The wheel, built from the sdist and next to it; earlier files of ours in `output` are removed."""
    for earlier in [*output.glob("mixture_of_heads-*.whl"), *output.glob("mixture_of_heads-*.tar.gz")]:
        earlier.unlink()
    with step("sdist and wheel"):
        run(tools / "uv", "build", "--quiet", "--python", sys.executable, "--out-dir", output, ROOT)
    (wheel,) = output.glob("mixture_of_heads-*.whl")
    return wheel


def check_wheel(wheel: Path) -> None:
    """Check that the wheel has what the checkout has: every source file and every recipe.

    Raises:
        SystemExit: a file is missing.
    """
    tracked = ROOT / "src" / "moh", ROOT / "recipes"
    here = {
        f"moh/{'recipes/' if top.name == 'recipes' else ''}{path.relative_to(top).as_posix()}"
        for top in tracked
        for path in top.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    missing = here - set(zipfile.ZipFile(wheel).namelist())
    if missing:
        raise SystemExit(f"{wheel.name} lacks {', '.join(sorted(missing))}")
    print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, {len(here)} files", flush=True)


def install(tools: Path, environment: Path, wheel: Path, torch_index: str) -> Path:
    """The interpreter of a new environment with the wheel and its extra `hf`."""
    index = ["--extra-index-url", torch_index] if torch_index else []
    build_, why_not = cpu_build(
        read_pins((ROOT / "constraints.txt").read_text())["torch"], index, with_torchvision=False
    )
    print(f"PyTorch: {build_ or why_not}", flush=True)
    torch = [f"torch=={build_}"] if build_ else []
    with step("installation by uv"):
        run(tools / "uv", "venv", "--quiet", "--python", sys.executable, environment)
        options = ["--quiet", "--index-strategy", "unsafe-best-match", *pip_settings(), *index]
        run(
            tools / "uv", "pip", "install", "--python", environment / "bin" / "python", *options, f"{wheel}[hf]", *torch
        )
    return environment / "bin" / "python"


def pip_settings() -> list[str]:
    """Options for uv that make it look where pip looks."""
    listed = subprocess.run([*PIP, "config", "list"], capture_output=True, text=True, check=True).stdout
    found = []
    for name, values in re.findall(
        r"^(?:global|install|:env:)\.(index-url|extra-index-url|find-links)='(.*)'$", listed, re.M
    ):
        found += [part for value in values.split() if is_there(value) for part in (f"--{name}", value)]
    return found


def is_there(address: str) -> bool:
    """False for a directory that does not exist: pip ignores it, for uv it is an error."""
    path = address.removeprefix("file://")
    return "://" in path or Path(path).exists()


def run_snippets(python: Path, folder: Path) -> None:
    """Run each Python snippet of README.md in `folder`, and the command."""
    folder.mkdir()
    away = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    with step("the stand-ins"):
        run(python, "-c", STAND_INS, cwd=folder, env=away)
    snippets = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    if not snippets:
        raise SystemExit("README.md has no Python snippet")
    for number, snippet in enumerate(snippets, 1):
        with step(f"snippet {number} of README.md"):
            run(python, "-c", f"import moh, torch\n{snippet}", cwd=folder, env=away)
    with step("moh info, moh train --list"):
        run(python.parent / "moh", "info", cwd=folder, env=away)
        run(python.parent / "moh", "train", "--list", cwd=folder, env=away, stdout=subprocess.DEVNULL)


@contextmanager
def step(name: str) -> Iterator[None]:
    """Prints how long a step took."""
    start = time.perf_counter()
    yield
    print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)


def run(*command: object, **options: object) -> None:
    """Run a command whose failure ends the program with its exit code."""
    try:
        subprocess.run([str(part) for part in command], check=True, **options)
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"{' '.join(map(str, command))[:200]} failed with exit code {error.returncode}") from None


if __name__ == "__main__":
    sys.exit(main())
