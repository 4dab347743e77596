"""Promise: image classifiers of transformers, dense or converted, are evaluated, inspected and measured like timm's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("timm", reason="the vision extra is not installed")
transformers = pytest.importorskip("transformers", reason="the llm extra is not installed")


from moh.data.images.formats import FolderImages  # noqa: E402

CLASSES = ("ant", "bee", "cow")  # of the fixture `folder`
SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=8, patch_size=2)
NORMALISED = dict(image_mean=[0.4] * 3, image_std=[0.3] * 3)
SMALL = dict(height=8, width=8)
KINDS: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "vit": ("ViT", dict(intermediate_size=48), "ViTImageProcessor", dict(size=SMALL)),
    "deit": (
        "DeiT",
        dict(intermediate_size=48),
        "DeiTImageProcessor",
        dict(size=dict(height=10, width=10), crop_size=SMALL),
    ),
    "dinov2": ("Dinov2", {}, "BitImageProcessor", dict(size=dict(shortest_edge=10), crop_size=SMALL)),
}


def save_dense(kind: str, directory: Path) -> Any:
    """A dense classifier of the folder's classes, with its processor."""
    name, more, processor, how = KINDS[kind]
    labels = dict(enumerate(CLASSES))
    config = getattr(transformers, f"{name}Config")(**SIZES | more, id2label=labels)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForImageClassification")(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(directory)
    getattr(transformers, processor)(**how, **NORMALISED).save_pretrained(directory)
    return model


@pytest.fixture(params=KINDS)
def directories(request, moh, folder: Path, tmp_path: Path) -> dict[str, Path]:
    """The directories of a dense classifier and of what `moh convert` makes of it."""
    found = {"dense": tmp_path / "dense", "MoH": tmp_path / "moh"}
    save_dense(request.param, found["dense"])
    heads = ["--shared-heads", 1, "--active-heads", 1, "--images", folder]
    result = moh("convert", found["dense"], found["MoH"], *heads)
    assert result.code == 0, result.err
    return found


@pytest.fixture
def wide(folder: Path, tmp_path: Path) -> Path:
    """The images, twice as wide: a processor may squeeze them or cut them."""
    for file in folder.glob("*/*.png"):
        target = tmp_path / "wide" / file.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        from PIL import Image

        Image.open(file).resize((24, 12)).save(target)
    return tmp_path / "wide"


@torch.no_grad()
def test_they_are_evaluated_on_what_their_processor_makes_of_the_images(moh, directories, wide: Path) -> None:
    for kind, directory in directories.items():
        processor = transformers.AutoImageProcessor.from_pretrained(directory)
        model = transformers.AutoModelForImageClassification.from_pretrained(directory)
        images = FolderImages(wide)
        pixels = processor([images.image(i) for i in range(12)], return_tensors="pt")["pixel_values"]
        logits = model(pixels).logits
        read = json.loads(moh("eval", directory, "--images", wide, "--json").out[0])
        assert read["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, images.labels)), rel=1e-4)
        assert read["top1"] == pytest.approx(100 * float((logits.argmax(-1) == images.labels).float().mean()))
        assert read["images"] == 12 and set(read["per_class"]) == set(CLASSES)
        assert read["share"] == (None if kind == "dense" else 0.5)


def test_which_heads_they_use_is_inspected(moh, directories, folder: Path, tmp_path: Path) -> None:
    for kind, directory in directories.items():
        out = tmp_path / f"out-{kind}"
        page = tmp_path / f"{kind}.html"
        options = ["--permutations", 9, "--ablate", 4]
        result = moh("inspect", directory, "--images", folder, "--output", out, "--html", page, *options)
        assert result.code == 0, result.err
        assert (out / "summary.md").is_file() and page.stat().st_size > 1000
        expected = "100 % of the heads used; dense" if kind == "dense" else " 50 % of the heads used"
        assert all(expected in line for line in result.out if line.startswith("layer"))


def test_the_curve_of_the_dial_is_drawn(moh, directories, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "curve"
    result = moh("curve", directories["MoH"], "--dense", directories["dense"], "--images", folder, "--output", out)
    assert result.code == 0, result.err
    data = json.loads((out / "curve.json").read_text(encoding="utf-8"))
    assert [point["share"] for point in data["points"]] == [0.25, 0.5, 0.75, 1.0]
    assert data["points"][-1]["top1"] == data["dense"]["top1"]
    result = moh("curve", directories["dense"], "--images", folder, "--output", out)
    assert result.code == 2 and "no layer whose heads are routed" in result.err[-1]


def test_without_a_processor_timms_defaults_are_taken_and_named(moh, folder: Path, tmp_path: Path) -> None:
    save_dense("vit", tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.warns(UserWarning, match=r"no preprocessor_config.json: .*timm's default mean \(0\.485"):
        assert moh("eval", tmp_path, "--images", folder).code == 0
    with pytest.warns(UserWarning, match="no preprocessor_config.json"):
        result = moh("convert", tmp_path, tmp_path / "moh", "--active-heads", 1, "--images", folder)
    assert result.code == 0 and not (tmp_path / "moh" / "preprocessor_config.json").exists()


def test_images_of_other_classes_and_missing_images_are_refused(moh, folder: Path, tmp_path: Path) -> None:
    model = save_dense("vit", tmp_path)
    result = moh("eval", tmp_path)
    assert result.code == 2 and f"--images must be given, because {tmp_path} is an image" in result.err[-1]
    model.config.id2label = {0: "ant", 1: "bee", 2: "emu"}
    model.save_pretrained(tmp_path)
    result = moh("eval", tmp_path, "--images", folder)
    assert result.code == 2 and "lacks 'emu' and also has 'cow'" in result.err[-1]
    model.config.num_labels = 3  # names as transformers makes them are none
    model.config.id2label = {i: f"LABEL_{i}" for i in range(3)}
    model.save_pretrained(tmp_path)
    assert moh("eval", tmp_path, "--images", folder).code == 0


def test_a_backbone_without_classes_is_refused(moh, folder: Path, tmp_path: Path) -> None:
    model = save_dense("dinov2", tmp_path / "classifier")
    model.dinov2.save_pretrained(tmp_path / "bare")
    (tmp_path / "classifier" / "preprocessor_config.json").rename(tmp_path / "bare" / "preprocessor_config.json")
    result = moh("eval", tmp_path / "bare", "--images", folder)
    assert result.code == 2 and "Dinov2Model" in result.err[-1] and "not an image classifier" in result.err[-1]


@pytest.mark.parametrize("has_processor", [True, False])
def test_the_processor_of_a_hub_name_is_looked_for_on_the_hub(tmp_path: Path, monkeypatch, has_processor: bool) -> None:
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    from moh.data.images.augmentation import ProcessorInput
    from moh.models import classifiers

    def download(name: str, file: str, **_: object) -> str:
        if not has_processor:
            raise EntryNotFoundError(file)
        return str(tmp_path / file)

    model = save_dense("vit", tmp_path)
    model.name_or_path = "owner/vit"
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(transformers.AutoImageProcessor, "from_pretrained", lambda name, **_: processor)
    if has_processor:
        assert classifiers.image_input(model) == ProcessorInput(processor, 3)
        return
    with pytest.warns(UserWarning, match="owner/vit has no preprocessor_config.json"):
        assert classifiers.image_input(model).size == (3, 8, 8)


def test_a_hub_name_is_loaded_by_transformers_and_a_plain_one_by_timm(monkeypatch) -> None:
    from moh.models import classifiers

    called: list[object] = []
    model = torch.nn.Linear(1, 1)
    config = transformers.ViTConfig(architectures=["ViTForImageClassification"])
    monkeypatch.setattr("moh.models.transformers.loading.load_config", lambda name, **how: config)
    monkeypatch.setattr("moh.models.transformers.loading.load_as", lambda _, name, **how: called.append(name) or model)
    monkeypatch.setattr(
        "moh.models.timm.loading.load_image_classifier", lambda name, **how: called.append(("timm", name)) or model
    )
    for name in ("owner/vit", "deit3_small_patch16_224", "hf-hub:timm/deit3"):
        classifiers.load_classifier(name)
    assert called == ["owner/vit", ("timm", "deit3_small_patch16_224"), ("timm", "hf-hub:timm/deit3")]
