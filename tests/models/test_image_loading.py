"""Promise: we and timm load a saved classifier unchanged, with its classes and its images' format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch

from moh.data.images.recipe import ImageInput
from moh.models.timm.loading import class_names, describe, image_input, load_image_classifier, save_image_classifier
from moh.training.images.model import build_model
from moh.training.images.recipe import ImageModelRecipe

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


class WritesAFile:
    """A pickle that writes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = str(file)

    def __reduce__(self) -> tuple[object, ...]:
        return open, (self.file, "w")


@pytest.fixture
def never_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm must not be asked: some of its versions would unpickle the file."""
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: pytest.fail("timm was given the model"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pth", "weights.pth.tar"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_of_more_than_tensors_is_not_loaded(
    saved: Path, tmp_path: Path, never_loaded: None, name: str, zipped: bool
) -> None:
    (saved / "model.safetensors").unlink()
    state = {"head.weight": torch.zeros(3, 16), "more": WritesAFile(tmp_path / "written")}
    torch.save(state, saved / name, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=rf"the weights {saved / name} can't be read without running code") as error:
        load_image_classifier(saved)
    assert "\n" not in str(error.value) and not (tmp_path / "written").exists()
    kwargs = {"name": f"local-dir:{saved}", "pretrained": True}
    with pytest.raises(ValueError, match="can't be read without running code"):
        build_model(ImageModelRecipe(**kwargs), ("cat", "dog", "eel"))
    with pytest.raises(ValueError, match="can't be read without running code"):
        build_model(
            ImageModelRecipe("vit_tiny_patch16_224", weights=str(saved / name), kwargs=TINY), ("cat", "dog", "eel")
        )
    assert not (tmp_path / "written").exists()


def test_a_pickle_of_tensors_is_loaded(model, saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    torch.save(model.state_dict(), saved / "pytorch_model.bin")
    images = torch.randn(2, 1, 8, 8)
    assert torch.equal(load_image_classifier(saved)(images), model(images))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "hf-hub:somebody/model"}, "names 'hf-hub:somebody/model', which is not a model of timm"),
        ({"architecture": "local-dir:/elsewhere"}, "names 'local-dir:/elsewhere', which is not a model of timm"),
        ({"model_args": {"checkpoint_path": "evil.pth"}}, "they set checkpoint_path"),
        (
            {"model_args": {"pretrained_cfg": {"file": "evil.pth"}, "cache_dir": "."}},
            "they set cache_dir, pretrained_cfg",
        ),
    ],
)
def test_a_configuration_names_a_model_and_no_other_weights(
    saved: Path, never_loaded: None, change: dict[str, object], message: str
) -> None:
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=message):
        load_image_classifier(saved)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"base": "hf-hub:somebody/model"}, "base must be the name of a model of timm, got 'hf-hub:somebody/model'"),
        ({"base": "local-dir:/elsewhere"}, "base must be the name of a model of timm"),
        ({"base": "vit_tiny_patch16_224", "checkpoint_path": "evil.pth"}, "must not set checkpoint_path"),
        ({"base": "vit_tiny_patch16_224", "pretrained": True}, "must not set pretrained"),
    ],
)
def test_the_base_of_a_converted_model_is_a_name_without_weights(saved: Path, arguments, message: str) -> None:
    config = json.loads((saved / "config.json").read_text())
    config |= {"architecture": "moh_vit", "model_args": {**TINY, "shared_heads": 1, "active_heads": 2, **arguments}}
    (saved / "config.json").write_text(json.dumps(config))
    for load in (load_image_classifier, lambda path: timm.create_model(f"local-dir:{path}", pretrained=True)):
        with pytest.raises((ValueError, TypeError), match=f"{message}|model_args of the model|multiple values"):
            load(saved)
