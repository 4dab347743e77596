"""Promises of the commands for diffusion models: a pipeline stays one when it is converted, and hub names are taken."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="the diffusion extra is not installed")
huggingface_hub = pytest.importorskip("huggingface_hub")

from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError  # noqa: E402

HEADS = ["--shared-heads", 1, "--active-heads", 1]
NAMES = {0: "tench, Tinca tinca", 1: "goldfish", 2: "ray", 3: "cock", 4: "hen"}


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """A dense pipeline of diffusers' own, with VAE, a scheduler of unusual settings and class names."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
    )
    dense = diffusers.DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        num_layers=2,
        sample_size=8,
        in_channels=4,
        out_channels=8,
        num_embeds_ada_norm=5,
    )
    for block in dense.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(dense.transformer_blocks[0].norm1.emb.state_dict())
    scheduler = diffusers.DPMSolverMultistepScheduler(beta_end=0.03)
    diffusers.DiTPipeline(transformer=dense, vae=vae, scheduler=scheduler).save_pretrained(tmp_path / "dense")
    index = tmp_path / "dense" / "model_index.json"  # as in the published DiT; diffusers reads names and writes none
    index.write_text(json.dumps(json.loads(index.read_text()) | {"id2label": NAMES}))
    return tmp_path / "dense"


def check_parts(source: Path, target: Path) -> None:
    """Everything but the transformer is that of the source, and diffusers loads the whole."""
    from moh.models.diffusers import MoHDiTTransformer2DModel

    pipes = [diffusers.DiTPipeline.from_pretrained(path) for path in (source, target)]
    assert type(pipes[1].transformer) is MoHDiTTransformer2DModel and pipes[1].transformer.share == 0.5
    assert type(pipes[1].scheduler) is diffusers.DPMSolverMultistepScheduler
    assert pipes[1].labels == pipes[0].labels and pipes[1].labels["Tinca tinca"] == 0
    for part in ("scheduler/scheduler_config.json", "vae/config.json"):
        assert (target / part).read_text() == (source / part).read_text()
    theirs, ours = (pipe.vae.state_dict() for pipe in pipes)
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in theirs)


def test_a_converted_pipeline_is_a_pipeline_with_the_same_parts(moh, pipeline: Path, tmp_path: Path) -> None:
    target = tmp_path / "moh"
    result = moh("convert", pipeline, target, *HEADS)
    assert result.code == 0, result.err
    assert result.out[-1] == f"{target}: MoH model, each token uses 50 % of the heads"
    check_parts(pipeline, target)
    drawn = moh("sample", target, "--classes", "goldfish", "--steps", 2, "--output", tmp_path / "drawn")
    assert drawn.code == 0, drawn.err


def test_an_earlier_pipeline_is_replaced_unless_it_holds_more(moh, pipeline: Path, tmp_path: Path, monkeypatch) -> None:
    target = tmp_path / "moh"
    assert moh("convert", pipeline, target, *HEADS).code == 0
    monkeypatch.setattr("moh._files._written", set())  # as in another process
    assert moh("convert", pipeline, target, *HEADS).code == 0
    (target / "thesis.tex").write_text("words")
    monkeypatch.setattr("moh._files._written", set())
    result = moh("convert", pipeline, target, *HEADS)
    assert result.code == 2 and "such as thesis.tex" in result.err[-1]
    theirs = tmp_path / "theirs"
    shutil.copytree(pipeline, theirs)
    result = moh("convert", pipeline, theirs, *HEADS)
    assert result.code == 2 and "must be new, empty or a model's directory that this package wrote" in result.err[-1]


def test_a_vae_of_pickled_weights_is_written_as_safetensors(moh, pipeline: Path, tmp_path: Path) -> None:
    vae = diffusers.AutoencoderKL.from_pretrained(pipeline / "vae")
    (pipeline / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    vae.save_pretrained(pipeline / "vae", safe_serialization=False)
    assert moh("convert", pipeline, tmp_path / "moh", *HEADS).code == 0
    assert (tmp_path / "moh" / "vae" / "diffusion_pytorch_model.safetensors").is_file()
    assert not list((tmp_path / "moh" / "vae").glob("*.bin"))
    written = diffusers.AutoencoderKL.from_pretrained(tmp_path / "moh" / "vae").state_dict()
    assert all(torch.equal(tensor, written[name]) for name, tensor in vae.state_dict().items())


@pytest.fixture
def repositories(monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Name on the hub -> directory; names that are missing can't be fetched."""
    found: dict[str, Path] = {}

    def download(name: str, file: str, **_: object) -> str:
        if name not in found:
            raise LocalEntryNotFoundError("no connection")
        if not (found[name] / file).is_file():
            raise EntryNotFoundError(file)
        return str(found[name] / file)

    def snapshot(name: str, **_: object) -> str:
        if name not in found:
            raise LocalEntryNotFoundError("no connection")
        return str(found[name])

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    return found


def test_pipelines_are_converted_and_drawn_with_by_their_hub_names(
    moh, pipeline: Path, repositories, tmp_path: Path
) -> None:
    repositories["owner/dit"] = pipeline
    result = moh("convert", "owner/dit", tmp_path / "moh", *HEADS)
    assert result.code == 0, result.err
    check_parts(pipeline, tmp_path / "moh")
    repositories["owner/moh-dit"] = tmp_path / "moh"
    for name in repositories:
        drawn = moh("sample", name, "--classes", "ray", "--steps", 2, "--output", tmp_path / name)
        assert drawn.code == 0, drawn.err
    result = moh("sample", "owner/none", "--output", tmp_path / "none")
    assert result.code == 2 and "checkpoint 'owner/none' can't be fetched: no connection" in result.err[-1]


def test_a_transformer_alone_is_taken_by_its_hub_name(moh, pipeline: Path, repositories, tmp_path: Path) -> None:
    repositories["owner/alone"] = pipeline / "transformer"
    result = moh("convert", "owner/alone", tmp_path / "moh", *HEADS)
    assert result.code == 0, result.err
    assert json.loads((tmp_path / "moh" / "config.json").read_text())["_class_name"] == "MoHDiTTransformer2DModel"
    drawn = moh("sample", "owner/alone", "--vae", pipeline / "vae", "--steps", 2, "--output", tmp_path / "drawn")
    assert drawn.code == 0, drawn.err


def test_features_come_from_a_classifier_of_the_hub(
    moh, classifiers, folder: Path, repositories, tmp_path: Path, monkeypatch
) -> None:
    from moh.models.timm import loading

    repositories["owner/classifier"], load, asked = classifiers["dense"], loading.load_image_classifier, []

    def from_hub(name: str, **options: object) -> object:
        asked.append(name)
        return load(classifiers["dense"], **options)

    monkeypatch.setattr(loading, "load_image_classifier", from_hub)
    images = tmp_path / "all"
    images.mkdir()
    for number, file in enumerate(sorted(folder.glob("*/*.png"))):
        (images / f"{number}.png").write_bytes(file.read_bytes())
    result = moh("eval", "fid", images, "--reference", images, "--features", "owner/classifier", "--json")
    assert result.code == 0, result.err
    assert asked == ["hf-hub:owner/classifier"]
