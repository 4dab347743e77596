"""A converted model, classifiers and images on disk, and the command line called in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from moh.cli import main

CLASSES = ("ant", "bee", "cow")
ARGUMENTS = {"img_size": 8, "in_chans": 3, "embed_dim": 20, "depth": 2, "num_heads": 5}


@dataclass
class Result:
    """A command's exit code and its lines on standard output and error."""

    code: int
    out: list[str]
    err: list[str]


@pytest.fixture
def moh(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Result]]:
    """`moh("eval", model, ...)` runs a command; argparse's SystemExit becomes its exit code."""
    from transformers.utils import logging

    # As in a new process whose standard error is not a terminal; here transformers is imported already
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.disable_progress_bar()

    def run(*argv: object) -> Result:
        capfd.readouterr()
        try:
            code = main([str(part) for part in argv])
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capfd.readouterr()
        return Result(code, out.splitlines(), err.splitlines())

    yield run
    logging.enable_progress_bar()


@pytest.fixture(scope="session")
def moh_dir(base_dir: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama converted by the command line, with one shared and one active routed head."""
    target = tmp_path_factory.mktemp("converted") / "model"
    heads = ["--shared-heads", "1", "--active-heads", "1"]
    options = ["--files", str(text_file), "--calibration-tokens", "1024"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        assert main(["convert", str(base_dir), str(target), *heads, *options]) == 0
    return target


@pytest.fixture(scope="session")
def classifiers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A MoH classifier and a dense one, on disk."""
    timm = pytest.importorskip("timm")
    import torch

    from moh.data.images.recipe import ImageInput
    from moh.models.timm.loading import describe, save_image_classifier

    found = {}
    torch.manual_seed(0)
    for kind in ("75", "dense"):
        model = timm.create_model(f"moh_vit_micro_patch4_28_{kind}", num_classes=3, **ARGUMENTS)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        describe(model, ImageInput((3, 8, 8), (0.5,) * 3, (0.2,) * 3), CLASSES)
        found[kind] = tmp_path_factory.mktemp("classifier") / kind
        save_image_classifier(model, found[kind], model_args=ARGUMENTS)
    return found


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four images of each class."""
    image, torch = pytest.importorskip("PIL.Image"), pytest.importorskip("torch")
    root = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for name in CLASSES:
        (root / name).mkdir()
        for number in range(4):
            pixels = torch.randint(0, 256, (8, 8, 3), generator=generator, dtype=torch.uint8)
            image.fromarray(pixels.numpy()).save(root / name / f"{number}.png")
    return root
