"""Promise: we and timm load a saved classifier unchanged, with its classes and its images' format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch

from moh.data.images.recipe import ImageInput
from moh.models.timm.loading import class_names, describe, image_input, load_image_classifier, save_image_classifier

TINY = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 2, "num_heads": 4}
SEEN = ImageInput((1, 8, 8), (0.4,), (0.3,), 0.9, "bilinear")


@pytest.fixture
def model() -> torch.nn.Module:
    made = timm.create_model("vit_tiny_patch16_224", num_classes=3, **TINY).eval()
    describe(made, SEEN, ("cat", "dog", "eel"))
    return made


@pytest.fixture
def saved(model, tmp_path: Path) -> Path:
    save_image_classifier(model, tmp_path / "model", model_args=TINY)
    return tmp_path / "model"


def test_a_saved_model_is_read_as_it_was(model, saved: Path) -> None:
    loaded = load_image_classifier(saved)
    images = torch.randn(2, 1, 8, 8)
    assert torch.equal(loaded(images), model(images)) and not loaded.training
    assert class_names(loaded) == ("cat", "dog", "eel")
    assert image_input(loaded) == SEEN
    assert torch.equal(timm.create_model(f"local-dir:{saved}", pretrained=True).eval()(images), model(images))
    assert class_names(load_image_classifier(str(saved))) == ("cat", "dog", "eel")


def test_a_model_that_does_not_know_its_classes_says_so() -> None:
    plain = timm.create_model("vit_tiny_patch16_224", num_classes=3, **TINY)
    assert class_names(plain) is None
    describe(plain, SEEN, ("cat", "dog", "eel"))
    plain.reset_classifier(5)
    assert class_names(plain) is None  # they belong to another classifier


def test_grey_images_are_normalised_with_the_mean_of_the_colours(model) -> None:
    model.pretrained_cfg |= {"mean": (0.485, 0.456, 0.406), "std": (0.2, 0.3, 0.4)}
    assert image_input(model).mean == pytest.approx((0.449,)) and image_input(model).std == pytest.approx((0.3,))


def test_only_a_config_with_an_architecture_makes_a_classifier(tmp_path: Path, base_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"is not an image classifier: config\.json names no architecture of timm"):
        load_image_classifier(base_dir)
    with pytest.raises(ValueError, match="has no configuration that can be read"):
        load_image_classifier(tmp_path)


@pytest.mark.parametrize("damage", ["weights", "name", "sizes"])
def test_a_damaged_model_is_named(saved: Path, damage: str) -> None:
    config = json.loads((saved / "config.json").read_text())
    if damage == "weights":
        (saved / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes()[:-50])
    elif damage == "name":
        config["architecture"] = "no_such_model"
    else:
        config["model_args"]["embed_dim"] = 20
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"model '{saved}' can't be loaded: ") as error:
        load_image_classifier(saved)
    assert "\n" not in str(error.value)


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    for name in (tmp_path / "nowhere", f"{tmp_path}/nowhere"):
        with pytest.raises(ValueError, match="model must be a directory or a name that timm knows, but there is no"):
            load_image_classifier(name)
    with pytest.raises(ValueError, match="model 'no_such_model' can't be loaded: Unknown model"):
        load_image_classifier("no_such_model")
