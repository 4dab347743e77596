"""Promise: accuracy is that of a direct count in the checkpoint's class order; unreadable images are reported."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from torch.nn import functional as F

import moh  # noqa: F401  registers its models with timm
from moh.data.images.formats import FolderImages
from moh.data.images.recipe import ImageInput
from moh.data.images.sources import TensorImages
from moh.evaluation import evaluate_images
from moh.models.timm.loading import describe

CLASSES = ("ant", "bee", "cow", "doe", "elk", "fox", "gnu")
SEEN = ImageInput((1, 8, 8), (0.5,), (0.25,))
TINY = dict(img_size=8, patch_size=4, in_chans=1, embed_dim=16, depth=2, num_heads=4)


@pytest.fixture
def model() -> torch.nn.Module:
    made = timm.create_model("vit_tiny_patch16_224", num_classes=7, **TINY)
    torch.nn.init.normal_(made.head.weight)
    describe(made, SEEN, CLASSES)
    return made


@pytest.fixture
def images() -> TensorImages:
    labels = torch.tensor([0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5, 0])  # no gnu among them
    return TensorImages(torch.randint(0, 256, (13, 1, 8, 8), dtype=torch.uint8), labels, CLASSES)


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_the_numbers_are_those_of_a_direct_count(model, images: TensorImages, batch_size: int) -> None:
    result = evaluate_images(model, images, batch_size=batch_size)
    logits = model.eval()((images.pixels.float() / 255 - 0.5) / 0.25)
    order = logits.argsort(-1, descending=True)
    right = order[:, 0] == images.labels
    assert result.top1 == pytest.approx(100 * right.double().mean().item())
    assert result.top5 == pytest.approx(100 * (order[:, :5] == images.labels[:, None]).any(1).double().mean().item())
    assert result.loss == pytest.approx(F.cross_entropy(logits, images.labels).item(), rel=1e-5)
    assert list(result.per_class) == list(CLASSES) and result.per_class["gnu"] is None
    for label, name in enumerate(CLASSES[:6]):
        assert result.per_class[name] == pytest.approx(100 * right[images.labels == label].double().mean().item())
    assert (result.images, result.skipped, result.share) == (13, (), None)
    assert result.images_per_second > 0


def test_top5_of_few_classes_is_all_of_them(images: TensorImages) -> None:
    small = timm.create_model("vit_tiny_patch16_224", num_classes=3, **TINY)
    few = TensorImages(images.pixels, images.labels % 3, ("x", "y", "z"))
    assert evaluate_images(small, few, wanted=SEEN).top5 == pytest.approx(100)


def test_classes_are_matched_by_name_not_by_place(model, images: TensorImages) -> None:
    turned = TensorImages(images.pixels, 6 - images.labels, CLASSES[::-1])
    there, here = evaluate_images(model, turned), evaluate_images(model, images)
    assert (there.top1, there.loss, there.per_class) == (here.top1, here.loss, here.per_class)


def test_classes_that_differ_from_the_checkpoints_are_named(model, images: TensorImages) -> None:
    other = TensorImages(images.pixels, images.labels, (*CLASSES[:6], "yak"))
    with pytest.raises(
        ValueError, match=r"images must have the 7 classes of the model, but lacks 'gnu' and also has 'yak'"
    ):
        evaluate_images(model, other)
    unnamed = timm.create_model("vit_tiny_patch16_224", num_classes=5, **TINY)
    with pytest.raises(ValueError, match="the images must have the 5 classes of the model, but have 7"):
        evaluate_images(unnamed, images)


def test_damaged_images_are_left_out_and_told(model, images: TensorImages, tmp_path: Path) -> None:
    for index, label in enumerate([*images.labels.tolist(), 6]):
        folder = tmp_path / CLASSES[label]
        folder.mkdir(exist_ok=True)
        Image.fromarray(images.pixels[index % 13, 0].numpy()).save(folder / f"{index:02d}.png")
    whole = evaluate_images(model, FolderImages(tmp_path))
    (tmp_path / "gnu" / "13.png").write_bytes(b"no image")
    with pytest.warns(UserWarning, match="1 of 14 images can't be read and were skipped: .*gnu/13.png"):
        result = evaluate_images(model, FolderImages(tmp_path), batch_size=1, workers=1)
    assert result.images == 13 and result.skipped == (str(tmp_path / "gnu" / "13.png"),)
    assert result.per_class == {**whole.per_class, "gnu": None}
    assert result.top1 == pytest.approx(evaluate_images(model, images).top1)
    for path in tmp_path.rglob("*.png"):
        path.write_bytes(b"")
    with (
        pytest.warns(UserWarning, match="14 of 14"),
        pytest.raises(ValueError, match="none of the 14 images can be read"),
    ):
        evaluate_images(model, FolderImages(tmp_path))


def test_the_share_of_heads_is_counted_and_the_mode_kept(images: TensorImages) -> None:
    sparse = timm.create_model(
        "moh_vit", base="vit_tiny_patch16_224", shared_heads=1, active_heads=[1, 3], num_classes=7, **TINY
    )
    for training in (True, False):
        sparse.train(training)
        assert evaluate_images(sparse, images, wanted=SEEN).share == pytest.approx((2 / 4 + 4 / 4) / 2)
        assert sparse.training is training


@pytest.mark.parametrize("count", [0, -1])
def test_a_batch_size_below_one_is_refused(model, images: TensorImages, count: int) -> None:
    with pytest.raises(ValueError, match=f"batch_size must be at least 1, got {count}"):
        evaluate_images(model, images, batch_size=count)
    empty = TensorImages(images.pixels[:0], images.labels[:0], CLASSES)
    with pytest.raises(ValueError, match="dataset must hold at least one image, got none"):
        evaluate_images(model, empty)
