"""Promise: every command that loads a model places it alike, and `--revision` reaches every file of the named repository.

The hub is its own cache on disk, with a branch `v2` and a `main` that holds other files: each library looks a file up there
by the name of the branch, and reading the name `main` is seen.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="the llm extra is not installed")
pytest.importorskip("timm", reason="the vision extra is not installed")
diffusers = pytest.importorskip("diffusers", reason="the diffusion extra is not installed")

from huggingface_hub import constants  # noqa: E402

from cli.test_images_of_transformers import save_dense  # noqa: E402
from cli.test_options import PARSERS, options  # noqa: E402

SHARED = {"--device", "--dtype", "--device-map", "--revision"}
NO_SHARED = {
    "demo": "a recipe's run places its models",
    "train": "a recipe's fields place its models",
    "export": "a local directory's files are copied",
    "export remote-code": "a local directory's files are copied",
    "convert-published": "a local file is rewritten, not run",
    "lm-eval": "another program's own options",
    "run": "another program's own options",
}
"""Commands without the shared options, and why."""
NO_MAP = {"info": "only the configuration is read, and --device and --dtype are those of a call"}
READS: set[str] = set()
"""Branches whose names were looked up."""


def _see(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and isinstance(arguments[0], str) and "/refs/" in arguments[0]:
        READS.add(Path(arguments[0]).name)


sys.addaudithook(_see)


@pytest.mark.parametrize("name", PARSERS)
def test_commands_that_load_a_model_place_it_alike(name: str) -> None:
    missing = SHARED - options(name)
    assert missing == (SHARED if name in NO_SHARED else {"--device-map"} if name in NO_MAP else set())


@pytest.fixture
def publish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, Path], str]]:
    """`publish("name", directory)` makes a repository whose branch v2 holds the directory's files; returns its hub name."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)

    def make(name: str, directory: Path) -> str:
        place = tmp_path / "cache" / f"models--owner--{name}"
        commits = {"v2": "2" * 40, "main": "1" * 40}
        for branch, commit in commits.items():
            (place / "refs").mkdir(parents=True, exist_ok=True)
            (place / "refs" / branch).write_text(commit)
            shutil.copytree(directory, place / "snapshots" / commit)
        for file in (place / "snapshots" / commits["main"]).rglob("*"):
            if file.is_file():
                file.write_text("of another revision")
        return f"owner/{name}"

    yield make
    READS.clear()


@pytest.fixture
def encoder(base_dir: Path, tmp_path: Path) -> Path:
    """A tiny sentence encoder: BERT with a part that pools."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(base_dir)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens([0])[0]
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    config = transformers.BertConfig(**sizes, vocab_size=len(tokenizer))
    for part in (transformers.BertModel(config), tokenizer):
        part.save_pretrained(tmp_path / "encoder")
    kind = "sentence_transformers.models"
    modules = [("Transformer", ""), ("Pooling", "1_Pooling")]
    listed = [
        {"idx": i, "name": str(i), "path": path, "type": f"{kind}.{name}"} for i, (name, path) in enumerate(modules)
    ]
    (tmp_path / "encoder" / "modules.json").write_text(json.dumps(listed))
    (tmp_path / "encoder" / "1_Pooling").mkdir()
    (tmp_path / "encoder" / "1_Pooling" / "config.json").write_text('{"word_embedding_dimension": 32}')
    return tmp_path / "encoder"


@pytest.fixture
def drawing(tmp_path: Path) -> Path:
    """A tiny pipeline that draws on pixels' latents."""
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8,), down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
        layers_per_block=1, norm_num_groups=4,
    )  # fmt: skip
    sizes = dict(
        num_attention_heads=4, attention_head_dim=8, num_layers=1, sample_size=8, in_channels=4, out_channels=8
    )
    dense = diffusers.DiTTransformer2DModel(**sizes, num_embeds_ada_norm=3)
    pipe = diffusers.DiTPipeline(transformer=dense, vae=vae, scheduler=diffusers.DDIMScheduler())
    pipe.save_pretrained(tmp_path / "drawing")
    return tmp_path / "drawing"


CONVERT = ("--share", 0.5, "--router", "query_norm", "-o", "made")
TEXT = ("--files", "{text}", "--max-tokens", 64, "--seq-len", 32)
IMAGES = ("--images", "{folder}")
CASES: dict[str, tuple[str, tuple[Any, ...]]] = {
    "generate": ("moh_dir", ("generate", "{model}", "the head", "--max-new-tokens", 2)),
    "chat": ("moh_dir", ("chat", "{model}")),
    "info": ("moh_dir", ("info", "{model}")),
    "eval text": ("moh_dir", ("eval", "text", "{model}", *TEXT)),
    "eval, a language model": ("moh_dir", ("eval", "{model}", *TEXT)),
    "eval images, of timm": ("timm", ("eval", "images", "{model}", *IMAGES)),
    "eval, a classifier of transformers": ("vit", ("eval", "{model}", *IMAGES)),
    "curve": ("moh_dir", ("curve", "{model}", *TEXT, "--repeats", 0, "-o", "made", "--shares", 1)),
    "curve, of images": ("timm", ("curve", "{model}", *IMAGES, "-o", "made")),
    "inspect": ("moh_dir", ("inspect", "{model}", "--files", "{text}", "--html", "page.html")),
    "inspect, images": ("vit", ("inspect", "{model}", *IMAGES, "-o", "made")),
    "inspect, a diffusion model": ("drawing", ("inspect", "{model}", *IMAGES, "-o", "made")),
    "convert": ("base_dir", ("convert", "{model}", *CONVERT)),
    "convert, a sentence encoder": ("encoder", ("convert", "{model}", *CONVERT)),
    "convert, images": ("vit", ("convert", "{model}", *CONVERT)),
    "convert, of timm": ("timm vit", ("convert", "{model}", *CONVERT)),
    "convert, a diffusion model": ("drawing", ("convert", "{model}", "--share", 0.5, "-o", "made")),
    "convert --plan": ("base_dir", ("convert", "{model}", "--plan")),
    "convert --plan, of timm": ("timm vit", ("convert", "{model}", "--plan")),
    "convert --plan, a diffusion model": ("drawing", ("convert", "{model}", "--plan")),
    "sample": ("drawing", ("sample", "{model}", "--classes", 1, "--steps", 2, "-o", "made")),
    "extend-vocabulary": ("base_dir", ("extend-vocabulary", "{model}", "{base}", "made")),
    "explore": ("moh_dir", ("explore", "{model}")),
    "explore, images": ("vit", ("explore", "{model}")),
    "serve": ("moh_dir", ("serve", "{options}", "{model}", "--port", 8123)),
    "eval lm": ("moh_dir", ("eval", "lm", "{model}", "--tasks", "tiny_fixed", "--include-path", "tasks", "--limit", 2)),
    "eval fid": ("timm", ("eval", "fid", "drawn.npz", "--reference", "drawn.npz", "--features", "{model}")),
}  # fmt: skip


def test_every_command_with_a_revision_has_a_case() -> None:
    named = {case.partition(",")[0].removesuffix(" --plan") for case in CASES}
    assert {name for name in PARSERS if "--revision" in options(name)} - {"eval MODEL"} == named - {"eval"}


@pytest.mark.parametrize("case", CASES)
def test_a_revision_reaches_every_file(case: str, moh, publish, request, monkeypatch, text_file: Path) -> None:
    kind, words = CASES[case]
    where = {
        "text": text_file,
        "folder": request.getfixturevalue("folder"),
        "base": request.getfixturevalue("base_dir"),
    }
    source = Path("source")
    if kind == "vit":
        save_dense("vit", source)
    elif kind == "timm vit":
        _save_timm_vit(source)
    elif kind == "timm":
        source = request.getfixturevalue("classifiers")["75"]
    else:
        source = request.getfixturevalue(kind)
    where["model"] = name = publish("model", source)
    _stand_in(case, monkeypatch)
    revision = ["--revision", "v2"]
    inside = "{options}" in words
    command = [part for word in words for part in (revision if word == "{options}" else [str(word).format(**where)])]
    READS.clear()
    result = moh(*command, *([] if inside else revision))
    assert result.code == 0, result.err
    assert {"v2"} == READS
    if case.startswith("convert") and "--plan" not in case:
        card = Path("made", "README.md").read_text()
        assert f"| base model | `{name}`, revision `v2` |" in card
        assert Path("made", "1_Pooling", "config.json").is_file() == (kind == "encoder")
        assert Path("made", "preprocessor_config.json").is_file() == (kind == "vit")
    READS.clear()
    assert moh(*[word for word in command if word not in revision]).code != 0 and "main" in READS  # the test can fail


def _save_timm_vit(directory: Path) -> None:
    """A dense ViT of timm's own."""
    import timm

    from moh.models.timm.loading import save_image_classifier

    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 4}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, **sizes)
    save_image_classifier(model, directory, model_args=sizes)


def _stand_in(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the command needs besides the model, and what stands for a server."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("/quit\n"))
    if case.startswith("explore"):
        pytest.importorskip("gradio", reason="the app extra is not installed")
        monkeypatch.setattr("moh.explore.interface.serve", lambda *_, **__: None)
    if case == "serve":
        pytest.importorskip("uvicorn", reason="the serve extra is not installed")
        monkeypatch.setattr("transformers.cli.transformers.app", _serve)
    if case == "eval lm":
        pytest.importorskip("lm_eval", reason="the eval extra is not installed")
        from evaluation.harness_cases import write_tasks

        write_tasks(Path("tasks"))
    if case == "eval fid":
        pytest.importorskip("torch_fidelity", reason="the diffusion extra is not installed")
        pixels = torch.randint(0, 256, (12, 8, 8, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        np.savez("drawn.npz", arr_0=pixels.numpy())


def _serve(argv: list[str]) -> None:
    """Load a model as the server does for its first request."""
    from transformers.cli.serving.model_manager import ModelManager

    assert argv[0] == "serve" and argv[-2:] == ["--port", "8123"]
    ModelManager(device="cpu").load_model_and_processor(ModelManager.process_model_name(argv[1]))
