"""Promise: features are those of Inception or of a given classifier; errors name what is missing."""

from __future__ import annotations

import hashlib
import urllib.error
from pathlib import Path

import pytest
import timm
import torch
from generation_cases import random_images, save_tiny_classifier, tiny_classifier
from torch_fidelity import FeatureExtractorInceptionV3

from moh.data.images.recipe import ImageInput
from moh.evaluation.generation import ClassifierFeatures, InceptionFeatures, load_classifier
from moh.evaluation.generation import classifier as module


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights for FID's network."""
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *a, **k: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        model = FeatureExtractorInceptionV3("inception", ["2048"])
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.save(model.state_dict(), path)
    return path


def test_inception_gives_what_the_library_gives(inception_file: Path) -> None:
    images = random_images(2, seed=0, height=20, width=30)
    extractor = InceptionFeatures(inception_file)
    found = extractor(images)
    library = FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], str(inception_file))
    maps = []
    library.Mixed_6d.register_forward_hook(lambda module, inputs, output: maps.append(output))
    features, logits = library(images)
    assert torch.equal(found.features, features) and features.shape == (2, 2048)
    assert torch.equal(found.logits, logits) and logits.shape == (2, 1008)
    # the block's output starts with the branch that the ADM suite reads; TensorFlow puts channels last
    assert torch.equal(found.spatial.view(2, 17, 17, 7), maps[0][:, :7].permute(0, 2, 3, 1))
    assert found.spatial.shape == (2, 2023)


@pytest.fixture
def any_file_loads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replaces the network; returns the list of files that it was loaded from."""
    loaded: list[Path] = []
    branch = torch.nn.ModuleDict({"branch1x1": torch.nn.Identity()})
    monkeypatch.setattr(module, "_load", lambda path: loaded.append(path) or torch.nn.ModuleDict({"Mixed_6d": branch}))
    return loaded


def test_only_the_published_weights_give_fid(tmp_path: Path, any_file_loads, monkeypatch) -> None:
    path = tmp_path / "mine.pth"
    path.write_bytes(b"moh")
    digest = hashlib.sha256(b"moh").hexdigest()
    other = InceptionFeatures(path)
    assert not other.is_fid and other.name == "Inception-v3 with the weights of mine.pth"
    monkeypatch.setattr(module, "URL_INCEPTION_V3", f"https://example.org/weights-{digest[:8]}.pth")
    published = InceptionFeatures(path)
    assert published.is_fid and published.name == "Inception-v3"


def test_weights_are_taken_from_the_hubs_folder_or_downloaded_to_it(
    tmp_path: Path, any_file_loads, monkeypatch
) -> None:
    downloads = []

    def download(url: str, dst: str, hash_prefix: str) -> None:
        assert url.endswith(f"weights-inception-2015-12-05-{hash_prefix}.pth")
        downloads.append(dst)
        Path(dst).write_bytes(b"weights")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    InceptionFeatures()
    InceptionFeatures()
    place = tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    assert any_file_loads == [place, place] and downloads == [str(place)]


def test_weights_that_cannot_be_had_are_told_with_every_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(url: str, dst: str, hash_prefix: str) -> None:
        assert url.endswith(f"weights-inception-2015-12-05-{hash_prefix}.pth") and Path(dst).parent.is_dir()
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(FileNotFoundError) as caught:
        InceptionFeatures()
    place = tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    for part in (f"not at {place}", "https://", "no network", "--inception", "--features", "not FID"):
        assert part in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"there is no file with Inception weights at .*nowhere\.pth"):
        InceptionFeatures(tmp_path / "nowhere.pth")


@pytest.mark.parametrize("content", ["text", "other-weights", "code"])
def test_a_file_of_other_things_is_told_and_never_run(tmp_path: Path, content: str) -> None:
    path = tmp_path / "weights.pth"
    if content == "text":
        path.write_text("hello")
    elif content == "other-weights":
        torch.save({"a": torch.zeros(2)}, path)
    else:
        torch.save(Harmful(tmp_path / "ran"), path)
    with pytest.raises(
        ValueError, match=r"weights.pth does not hold the weights of torch-fidelity's Inception network"
    ):
        InceptionFeatures(path)
    assert not (tmp_path / "ran").exists()


class Harmful:
    """Makes a directory when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        import os

        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("kind", ["test_resnet", "test_vit", "test_mambaout"])
@pytest.mark.parametrize("channels", [1, 3], ids=["grey", "colour"])
def test_a_classifiers_features_are_what_its_last_layer_reads(kind: str, channels: int) -> None:
    model = tiny_classifier(channels=channels, kind=kind)
    extractor = ClassifierFeatures(model, name="mine")
    images = random_images(3, seed=5, channels=channels, height=32, width=32)
    found = extractor(images)
    config = timm.data.resolve_model_data_config(model)
    mean, std = (torch.tensor(config[key]).view(-1, 1, 1) for key in ("mean", "std"))
    x = (images / 255 - mean) / std
    with torch.no_grad():
        torch.testing.assert_close(found.logits, model(x))
        torch.testing.assert_close(model.get_classifier()(found.features), found.logits)
        maps = model.forward_features(x)
    first = maps[:, :7] if kind == "test_resnet" else maps[..., :7]  # NCHW; tokens; NHWC
    assert torch.equal(found.spatial, first.flatten(1))


@pytest.mark.parametrize("size", [(16, 16), (50, 70)], ids=["smaller", "larger"])
@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_a_classifier_sees_the_whole_image_at_its_own_size(size: tuple[int, int], mode: str) -> None:
    model = tiny_classifier()
    wanted = ImageInput((3, 32, 32), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), interpolation=mode)
    found = ClassifierFeatures(model, name="mine", wanted=wanted)(
        random_images(2, seed=5, height=size[0], width=size[1])
    )
    x = random_images(2, seed=5, height=size[0], width=size[1]) / 255
    x = torch.nn.functional.interpolate(x, (32, 32), mode=mode, antialias=True).clamp(0, 1)
    with torch.no_grad():
        expected = model(
            (x - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)
        )
    torch.testing.assert_close(found.logits, expected)


def test_a_model_without_classes_has_no_logits() -> None:
    extractor = ClassifierFeatures(tiny_classifier(classes=0), name="mine")
    assert extractor(random_images(2, seed=0)).logits is None


def test_the_fingerprint_changes_with_the_weights() -> None:
    model = tiny_classifier()
    before = ClassifierFeatures(model, name="a").fingerprint
    assert ClassifierFeatures(tiny_classifier(), name="b").fingerprint == before
    with torch.no_grad():
        next(model.parameters())[0, 0, 0, 0] += 1e-6
    assert ClassifierFeatures(model, name="a").fingerprint != before


def test_a_classifier_is_read_from_its_directory(tmp_path: Path) -> None:
    folder = save_tiny_classifier(tmp_path / "mine")
    extractor = load_classifier(folder)
    assert extractor.name == str(folder) and not extractor.is_fid and extractor.channels == 3
    assert extractor(random_images(2, seed=0)).logits.shape == (2, 5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere_at_all", "model 'nowhere_at_all' can't be loaded: "),
        (
            "no/such/place",
            "model must be a directory, a hub name or one that timm knows, but there is no 'no/such/place'",
        ),
        ("broken", "model 'broken' can't be loaded: "),
    ],
)
def test_a_classifier_that_is_not_there_is_told(
    tmp_path: Path, name: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (save_tiny_classifier(tmp_path / "broken") / "model.safetensors").write_text("x")
    with pytest.raises(ValueError, match=message):
        load_classifier(name)


def test_models_that_do_not_serve_are_told() -> None:
    with pytest.raises(ValueError, match="must have timm's forward_features and forward_head, Linear does not"):
        ClassifierFeatures(torch.nn.Linear(2, 2), name="mine")
    with pytest.raises(ValueError, match="images of 1 or 3 channels, mine takes 4"):
        ClassifierFeatures(tiny_classifier(channels=4), name="mine")
    wanted = ImageInput((1, 32, 32), (0.4, 0.4, 0.4), (0.2,))
    with pytest.raises(ValueError, match=r"mean and std must have 1 numbers each, got \(0.4, 0.4, 0.4\) and \(0.2,\)"):
        ClassifierFeatures(tiny_classifier(channels=1), name="mine", wanted=wanted)


def test_dinov2_of_timm_gives_its_features(monkeypatch: pytest.MonkeyPatch) -> None:
    name, create = "vit_small_patch14_dinov2.lvd142m", timm.create_model
    small = dict(img_size=28, embed_dim=32, depth=2, num_heads=4, pretrained_cfg_overlay={"input_size": (3, 28, 28)})
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: create(name, pretrained=False, **small))
    extractor = load_classifier(name)
    images = random_images(2, seed=0, height=40, width=40)
    found = extractor(images)
    assert found.features.shape == (2, 32) and found.logits is None and not extractor.is_fid
    assert extractor.name == name
