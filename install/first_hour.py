"""Each tutorial as a new user has it: an empty environment by pip or by uv, an empty directory, and the commands of the page.

    python install/first_hour.py run --wheel dist/mixture_of_heads-0.1.0-py3-none-any.whl   # all of them
    python install/first_hour.py run --wheel dist/... --only heads --tools uv --steps 1     # its first command
    python install/first_hour.py table                                                      # of docs/install.md

The wheel takes the place of the package's name, and `HUB` that of the model hub, so that no network but the package index is
needed; `REPLACED` lists what else is not run as it stands. A tutorial takes up to half an hour, and up to 10 GB of disk.
Environments are removed afterwards, and files once the whole page has run; what was measured is kept in `--work`. An
interrupted run resumes, and so does one of fewer `--steps`. Needs all extras, and uv as a program.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from dist import pip_settings
from environment import ROOT, cpu_build, needs_torchvision, read_pins
from pages import requirements

from moh._files import write_text

TUTORIALS = ("nanogpt", "heads", "convert", "images", "diffusion")
TOOLS = ("pip", "uv")
REPLACED = {
    "convert": {
        " --share 0.75 --shares": " --calibration-tokens 12288 --share 0.75 --shares",  # instead of 49,152
        " --shares 0.6 0.75 0.9 1 --files texts/": " --shares 0.75 1 --files texts/ --max-tokens 2048 --repeats 1",
        " --push-to-hub you/smollm2-moh": "",  # nobody is logged in
    },
    "images": {  # "a task for a GPU"
        "$ moh train photos.yaml\n": "$ moh train photos.yaml --training.epochs 0 --training.max_steps 1\n"
    },
    "diffusion": {
        "dit/fashion_mnist\n": "dit/fashion_mnist --training.max_steps 100 --training.warmup_steps 10\n"  # of 6,000
    },
}
"""Tutorial -> commands that can't be run as they stand, and what is run instead."""

HUB = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": "the 4-bit weights that the demo takes from the package index",
    "Chat-UniVi/MoH-ViT-B-75": "random weights",
    "timm/deit_small_patch16_224.fb_in1k": "random weights",
    "facebook/DiT-XL-2-256": "random weights, 4 of 28 layers",
}
"""Repository -> what stands in its place."""

RESULTS = ROOT / "docs" / "results" / "first_hour.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "step",
        choices=("install", "run", "table"),
        help="run: install too; table: add what was measured to docs/results, print the tables",
    )
    parser.add_argument("--wheel", type=Path, help="of this package; not needed with --python")
    parser.add_argument("--only", nargs="+", choices=TUTORIALS, default=TUTORIALS)
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("--work", type=Path, default=Path("runs/first_hour"))
    parser.add_argument("--steps", type=int, default=sys.maxsize, help="run only the first STEPS commands of each page")
    parser.add_argument(
        "--python", type=Path, help="run pages with this program and install nothing, where the disk is small"
    )
    options = parser.parse_args()
    work = options.work.resolve()
    if options.step == "table":
        cells = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
        for name in (f"{tutorial}-{tool}" for tutorial in TUTORIALS for tool in TOOLS):
            if found := collect(work, name):
                cells[name] = found
        write_text(RESULTS, json.dumps(dict(sorted(cells.items())), indent=1) + "\n")
        print(table(cells), end="")
        return 0
    if options.python is not None:
        if options.step == "install":
            parser.error("--python must not be given for install, which makes environments of its own")
        if not options.python.is_file():
            parser.error(f"--python must be a program, got {options.python}")
    elif options.wheel is None or not options.wheel.is_file():
        parser.error(f"--wheel must be a file for {options.step}, as `make dist` writes it, got {options.wheel}")
    make_hub(work / "hub")
    for tutorial in options.only:
        for tool in options.tools:
            place = work / f"{tutorial}-{tool}"
            cell, noted = (place.with_name(f"{place.name}{end}.json") for end in ("", "-install"))
            if noted.exists() if options.step == "install" else has_run(cell, options.steps):
                continue
            python = options.python or install(
                tool, place, noted, options.wheel.resolve(), requirements(text_of(tutorial))
            )
            if options.step == "run":
                run_tutorial(tutorial, place, cell, python, options.steps)
            shutil.rmtree(place / "environment", ignore_errors=True)
            if has_run(cell, sys.maxsize) or not (place / "steps.json").exists():
                shutil.rmtree(place)  # else more of the page may be run later
    return 0


def has_run(cell: Path, steps: int) -> bool:
    """Whether this many steps of a page have been measured, or all that it has."""
    found = json.loads(cell.read_text(encoding="utf-8")) if cell.exists() else {}
    return bool(found.get("whole")) or len(found.get("steps", [])) >= steps


def text_of(tutorial: str) -> str:
    """The page as it is run."""
    text = (ROOT / "docs" / "tutorials" / f"{tutorial}.md").read_text(encoding="utf-8")
    for command, replacement in REPLACED.get(tutorial, {}).items():
        assert text.count(command) == 1, command
        text = text.replace(command, replacement)
    return text


def run_tutorial(tutorial: str, place: Path, cell: Path, python: Path, steps: int) -> None:
    """Run the page with this Python in an empty folder below `place`; `cell` gets where at once, then seconds and bytes."""
    work = cell.parent
    folder, report, page = place / "empty", place / "steps.json", place / "page.md"
    if not report.exists():  # else the run was interrupted, and resumes
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        prepare(tutorial, folder)
    page.write_text(text_of(tutorial), encoding="utf-8")
    away = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    away |= {"HF_HOME": str(work / "hub"), "HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(work / "cache")}
    python = python.absolute()  # it runs in another folder; `resolve` would leave its environment
    if not (own := python.is_relative_to(place)):
        away["PYTHONPATH"] = str(ROOT / "src")
    from moh.evaluation import cpu_name

    noted = {"own_environment": own, "machine": cpu_name(), "whole": False}
    write_text(cell, json.dumps(noted))
    program = python, ROOT / "install" / "pages.py", page, report, str(steps)
    subprocess.run(program, cwd=folder, env=away, stdin=subprocess.DEVNULL, check=True)
    measured = json.loads(report.read_text(encoding="utf-8"))
    noted |= {"steps": measured, "whole": len(measured) < steps, "files": allocated(folder)}
    write_text(cell, json.dumps(noted, indent=1))


def install(tool: str, place: Path, noted: Path, wheel: Path, names: list[str]) -> Path:
    """Make the environment as docs/install.md says, unless it is there already; its Python.

    `noted` gets seconds, bytes and versions.
    """
    environment = place / "environment"
    python = environment / "bin" / "python"
    if noted.exists() and python.exists():
        return python
    shutil.rmtree(environment, ignore_errors=True)
    place.mkdir(parents=True, exist_ok=True)
    start = clock()
    extras = re.findall(r"[\w-]+", names[0].partition("[")[2])
    wanted = [f"{wheel}[{','.join(extras)}]", *names[1:]]
    pins = read_pins((ROOT / "constraints.txt").read_text(encoding="utf-8"))
    build, _ = cpu_build(pins["torch"], (), with_torchvision=needs_torchvision(extras))
    torch = f"torch=={build}" if build else "torch"
    if tool == "pip":
        run(sys.executable, "-m", "venv", environment)
        for parts in [torch], wanted:
            run(environment / "bin" / "pip", "install", "--quiet", *parts)
    else:
        options = ["--quiet", "--index-strategy", "unsafe-best-match", *pip_settings()]
        run("uv", "venv", "--quiet", "--python", sys.executable, environment)
        run("uv", "pip", "install", "--python", python, *options, *wanted, torch)
    spent = seconds_since(start)
    measured = dict(install=spent, environment=allocated(environment), packages=packages(environment))
    write_text(noted, json.dumps(measured, indent=1))
    return python


def packages(environment: Path) -> str:
    """What is installed, without what an environment begins with, as "NAME==VERSION ..."."""
    found = {
        f"{package.name.lower().replace('_', '-')}=={package.version}"
        for package in metadata.distributions(
            path=[str(path) for path in environment.glob("lib/python*/site-packages")]
        )
    }
    return " ".join(sorted(name for name in found if name.partition("==")[0] not in ("pip", "setuptools")))


def run(*command: object) -> None:
    subprocess.run([str(part) for part in command], check=True)


def clock() -> tuple[float, float]:
    """Wall time, and processor time of the children that have ended."""
    use = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter(), use.ru_utime + use.ru_stime


def seconds_since(start: tuple[float, float]) -> dict[str, float]:
    wall, cpu = clock()
    return {"wall": wall - start[0], "cpu": cpu - start[1]}


def allocated(folder: Path) -> int:
    """Bytes on disk, as `du` counts them: a file with several names once."""
    found = {(stat.st_dev, stat.st_ino): stat.st_blocks * 512 for stat in (p.lstat() for p in folder.rglob("*"))}
    return sum(found.values())


# What the reader has: files of one's own, and models of the hub


def prepare(tutorial: str, folder: Path) -> None:
    """Write the files that the page expects of its reader."""
    if tutorial == "nanogpt":  # "save nanogpt_moh.py"
        shutil.copy(ROOT / "docs" / "tutorials" / "nanogpt_moh.py", folder)
    elif tutorial == "convert":
        copy(sorted((ROOT / "docs").glob("*.md")), folder / "texts", ".txt")
    elif tutorial == "heads":
        for name in "story", "code":
            shutil.copy(ROOT / "examples" / "texts" / f"{name}.txt", folder)
        split("story", folder / "stories", ".txt")
        split("code", folder / "src", ".py")
    elif tutorial == "images":
        draw_photos(folder / "photos")


def copy(files: list[Path], folder: Path, suffix: str) -> None:
    folder.mkdir()
    for file in files:
        shutil.copy(file, (folder / file.name).with_suffix(suffix))


def split(name: str, folder: Path, suffix: str) -> None:
    """Each paragraph of an example as a file."""
    folder.mkdir()
    paragraphs = (ROOT / "examples" / "texts" / f"{name}.txt").read_text(encoding="utf-8").split("\n\n")
    for number, paragraph in enumerate(paragraphs):
        (folder / f"{number}{suffix}").write_text(paragraph, encoding="utf-8")


def draw_photos(folder: Path, count: int = 20) -> None:
    """Two classes of pictures of noise, dark and bright, 256 x 256."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    for kind, shade in ("cat", 0), ("dog", 128):
        (folder / kind).mkdir(parents=True)
        for number in range(count):
            pixels = random.integers(shade, shade + 128, (256, 256, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / kind / f"{number}.jpg")


def make_hub(home: Path) -> None:
    """A cache of huggingface_hub that holds `HUB`, which libraries read with `HF_HUB_OFFLINE=1`."""
    makers = {name: make_language_model for name in HUB if name.startswith("HuggingFaceTB/")}
    makers |= {
        "Chat-UniVi/MoH-ViT-B-75": make_moh_vit,
        "timm/deit_small_patch16_224.fb_in1k": make_deit,
        "facebook/DiT-XL-2-256": make_dit,
    }
    for name, make in makers.items():
        repository, revision = home / "hub" / f"models--{name.replace('/', '--')}", "0" * 40
        if (snapshot := repository / "snapshots" / revision).exists():
            continue
        shutil.rmtree(scratch := home / "scratch", ignore_errors=True)
        scratch.mkdir(parents=True)
        make(scratch)
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / "main").write_text(revision)
        snapshot.parent.mkdir(exist_ok=True)
        scratch.rename(snapshot)


def make_language_model(folder: Path) -> None:
    import torch

    from moh.demo.base_model import default_base_model
    from moh.models.transformers.loading import load_causal_lm, load_tokenizer

    file = default_base_model()
    load_causal_lm(file, dtype=torch.bfloat16).save_pretrained(folder)
    load_tokenizer(file).save_pretrained(folder)


def make_moh_vit(folder: Path) -> None:
    import timm

    import moh

    name = "moh_transnext_base_75"
    moh.checkpoints.save_published(timm.create_model(name), folder / f"{name}.pth")


def make_deit(folder: Path) -> None:
    import timm
    from safetensors.torch import save_file

    save_file(timm.create_model("deit_small_patch16_224").state_dict(), folder / "model.safetensors")


def make_dit(folder: Path) -> None:
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    transformer = DiTTransformer2DModel(num_layers=4, out_channels=8, norm_type="ada_norm_zero")
    first, *others = (block.norm1.emb for block in transformer.transformer_blocks)
    for other in others:
        other.load_state_dict(first.state_dict())  # as in the published weights
    channels = (128, 256, 512, 512)
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    vae = AutoencoderKL(block_out_channels=channels, **blocks, layers_per_block=2, sample_size=256)
    DiTPipeline(transformer, vae, DDIMScheduler()).save_pretrained(folder)


# The table


def collect(work: Path, name: str) -> dict[str, Any]:
    """What was measured of a tutorial and tool: of the installation, and of the page the steps that have ended."""
    files = (work / f"{name}{end}.json" for end in ("-install", ""))
    found = {key: value for file in files if file.exists() for key, value in json.loads(file.read_text()).items()}
    if "steps" not in found and (report := work / name / "steps.json").exists():
        found["steps"] = json.loads(report.read_text())
    return found


def table(cells: dict[str, Any]) -> str:
    """Markdown: a row for each tutorial."""
    rows = ["| tutorial | by pip | by uv | all commands | the longest | threads | files |", "| --- " * 7 + "|"]
    for tutorial in TUTORIALS:
        found = [cells.get(f"{tutorial}-{tool}", {}) for tool in TOOLS]
        parts = [
            f"{words(cell['install']['wall'])}, {size(cell['environment'])}" if "install" in cell else "–"
            for cell in found
        ]
        ran: dict[str, Any] = max(found, key=lambda cell: len(cell.get("steps", [])))
        if steps := ran.get("steps", []):
            longest = max(steps, key=lambda step: step["cpu"])
            name = "Python" if longest["step"].startswith("Python") else f"`{' '.join(longest['step'].split()[:2])}`"
            parts += [
                words(sum(step["cpu"] for step in steps)) + ("" if ran.get("whole") else ", not all"),
                f"{name}, {words(longest['cpu'])}",
                " and ".join(str(n) for n in sorted({step.get("threads", ran.get("threads", 0)) for step in steps})),
                size(ran["files"]) if "files" in ran else "–",
            ]
        else:
            parts += ["–"] * 4
        rows.append(f"| {' | '.join([f'[{tutorial}](tutorials/{tutorial}.md)', *parts])} |")
    return "\n".join([*rows, ""])


def words(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def size(count: int) -> str:
    return f"{count / 1e9:.2f} GB"


if __name__ == "__main__":
    sys.exit(main())
