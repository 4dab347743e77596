"""A batch is a function of seed, epoch and images; damaged images are counted and replaced."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.data import create_transform
from torch.utils.data import DataLoader

from moh.data.images.augmentation import PixelTransform
from moh.data.images.batches import SKIPPED, ImageBatches, RepeatedOrder, report_damaged
from moh.data.images.formats import FolderImages
from moh.data.images.recipe import AugmentationRecipe, ImageInput
from moh.data.images.sources import TensorImages, take
from moh.data.seeds import generators_kept, seed_all

GREY = ImageInput((1, 8, 8), (0.5,), (0.25,))
COLOUR = ImageInput((3, 8, 8), (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
AUGMENTATIONS = {
    "none": AugmentationRecipe(hflip=0.0),
    "windows": AugmentationRecipe(crop_padding=2),
    "erasing": AugmentationRecipe(random_erasing=0.7),
    "crops": AugmentationRecipe(crop_scale=[0.3, 1.0], color_jitter=0.4),
    "policy": AugmentationRecipe(crop_scale=[0.3, 1.0], auto_augment="rand-m9-mstd0.5-inc1", random_erasing=0.5),
    "mixed": AugmentationRecipe(mixup=0.8, cutmix=1.0, label_smoothing=0.1),
}
each_augmentation = pytest.mark.parametrize("augmentation", AUGMENTATIONS.values(), ids=AUGMENTATIONS)


def batch(source, augmentation, indices=(5, 3, 20, 7), *, wanted=GREY, epoch=0, seed=0, workers=0):
    batches = ImageBatches(source, wanted, augmentation=augmentation, seed=seed)
    batches.set_epoch(epoch)
    loader = DataLoader(batches, batch_sampler=[list(indices)], collate_fn=take, num_workers=workers)
    return next(iter(loader))


@each_augmentation
@pytest.mark.parametrize("kind", ["memory", "folder"])
def test_the_same_seed_epoch_and_images_give_the_same_batch(tensors, folders: Path, augmentation, kind) -> None:
    source, wanted = (tensors, GREY) if kind == "memory" else (FolderImages(folders / "train"), COLOUR)
    first = batch(source, augmentation, wanted=wanted)
    torch.rand(7), np.random.rand(3)  # other random draws do not matter
    again = batch(source, augmentation, wanted=wanted)
    assert first["images"].shape == (4, *wanted.size) and first["images"].dtype == torch.float32
    assert torch.equal(first["images"], again["images"]) and torch.equal(first["labels"], again["labels"])
    if augmentation is not AUGMENTATIONS["none"]:
        for other in ({"epoch": 1}, {"seed": 1}):
            assert not torch.equal(batch(source, augmentation, wanted=wanted, **other)["images"], first["images"])


def repeated(source, repeats: int, *, processes: int = 1, batch_size: int = 4, epoch: int = 0, seed: int = 0):
    images = ImageBatches(source, GREY, augmentation=AugmentationRecipe(crop_padding=2, repeats=repeats), seed=seed)
    images.set_epoch(epoch)
    return images, list(RepeatedOrder(images, processes=processes, batch_size=batch_size))


def test_an_epoch_of_repeats_is_as_long_and_has_other_images_each_time(tensors) -> None:
    n = len(tensors.labels)
    orders = [repeated(tensors, 3, epoch=epoch)[1] for epoch in (0, 1)] + [repeated(tensors, 3, seed=1)[1]]
    for order in orders:
        assert len(order) == len(set(order)) == n
        counts = torch.tensor([index % n for index in order]).bincount()
        assert len(counts[counts > 0]) == -(-n // 3) and set(counts[counts > 0].tolist()) <= {3, n % 3 or 3}
    assert len({tuple(order) for order in orders}) == 3


def test_repeats_of_an_image_go_to_the_processes_in_turn(tensors) -> None:
    n, alone = len(tensors.labels), repeated(tensors, 3, batch_size=12)[1]
    images, order = repeated(tensors, 3, processes=3, batch_size=4)
    assert [sorted(order[i : i + 12]) for i in range(0, n - 11, 12)] == [
        sorted(alone[i : i + 12]) for i in range(0, n - 11, 12)
    ]
    for start in range(0, n - 11, 12):  # batch j of a step belongs to process j
        batches = [[index % n for index in order[start + 4 * j : start + 4 * j + 4]] for j in range(3)]
        assert batches[0] == batches[1] == batches[2] and len(set(batches[0])) == 4
    first = [index for index in order if index % n == order[0] % n]
    seen = images.__getitems__(first)
    assert len({int(label) for label in seen["labels"]}) == 1 and seen["labels"][0] == tensors.labels[order[0] % n]
    assert len({tuple(image.flatten().tolist()) for image in seen["images"]}) == 3  # each is augmented in another way


def test_repeats_of_files_are_augmented_and_counted_as_their_image(folders: Path) -> None:
    source = FolderImages(folders / "train")
    n = len(source.labels)
    (Path(source.name(2))).write_bytes(b"no image")
    recipe = AugmentationRecipe(crop_scale=[0.3, 1.0], crop_interpolation="bicubic", repeats=2)
    images = ImageBatches(source, COLOUR, augmentation=recipe)
    once, twice = images[1], images[n + 1]
    assert once["labels"] == twice["labels"] and not torch.equal(once["images"], twice["images"])
    images[n + 2]
    assert images.damaged.nonzero().flatten().tolist() == [2]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_random_crops_are_resized_with_the_recipes_filter(tensors, interpolation: str) -> None:
    recipe = AugmentationRecipe(crop_scale=[0.3, 0.3], hflip=0, crop_interpolation=interpolation)
    got = batch(tensors, recipe, wanted=COLOUR)["images"]
    other = batch(tensors, dataclasses.replace(recipe, crop_interpolation="bilinear"), wanted=COLOUR)["images"]
    assert torch.equal(got, other) == (interpolation == "bilinear")


def test_loading_processes_make_the_same_batches(folders: Path) -> None:
    source, augmentation = FolderImages(folders / "train"), AUGMENTATIONS["policy"]
    alone, loaded = (batch(source, augmentation, wanted=COLOUR, epoch=2, workers=workers) for workers in (0, 1))
    assert torch.equal(alone["images"], loaded["images"])


@pytest.mark.parametrize("name", ["windows", "erasing", "crops", "policy"])
def test_an_image_is_changed_alike_in_any_batch(tensors, name) -> None:
    one = batch(tensors, AUGMENTATIONS[name], (5, 3))["images"]
    other = batch(tensors, AUGMENTATIONS[name], (9, 3, 5))["images"]
    assert torch.equal(one, other[[2, 1]])


@each_augmentation
def test_augmentation_leaves_the_generators_of_the_run_alone(tensors, augmentation) -> None:
    batch(tensors, augmentation)  # a loader draws a random number too
    batches = ImageBatches(tensors, GREY, augmentation=augmentation)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    batches.__getitems__([1, 2])
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == np.random.get_state()[1].tolist()


def test_evaluation_in_memory_is_what_timm_makes_of_the_images(tensors) -> None:
    transform = create_transform(GREY.size, mean=GREY.mean, std=GREY.std, crop_pct=1.0, interpolation="bicubic")
    expected = torch.stack([transform(tensors.image(index)) for index in (5, 3)])
    fast = ImageBatches(tensors, GREY)
    assert fast.pixels is not None
    torch.testing.assert_close(fast.__getitems__([5, 3])["images"], expected)
    assert fast[5]["labels"] == tensors.labels[5] and torch.equal(
        fast[5]["images"], fast.__getitems__([5])["images"][0]
    )


def test_windows_are_those_of_the_padded_image_and_half_are_mirrored(tensors) -> None:
    recipe = AugmentationRecipe(crop_padding=2, hflip=0.5)
    many = TensorImages(tensors.pixels[:1].repeat(400, 1, 1, 1), torch.zeros(400, dtype=torch.long), ("a",))
    images = PixelTransform(many, GREY, recipe, 0)(list(range(400)), 0)
    pixels = ((images * 0.25 + 0.5) * 255).round().to(torch.uint8)[:, 0]
    padded = torch.nn.functional.pad(tensors.pixels[0, 0], (2, 2, 2, 2))
    windows = {
        tuple(padded[top : top + 8, left : left + 8].flatten().tolist()): False for top in range(5) for left in range(5)
    }
    windows |= {
        tuple(padded[top : top + 8, left : left + 8].flip(-1).flatten().tolist()): True
        for top in range(5)
        for left in range(5)
    }
    seen = [windows[tuple(image.flatten().tolist())] for image in pixels]
    assert 150 < sum(seen) < 250
    assert len({tuple(image.flatten().tolist()) for image in pixels}) == 50


def test_erasing_changes_as_many_images_as_asked_for(tensors) -> None:
    many = TensorImages(tensors.pixels[:1].repeat(300, 1, 1, 1), torch.zeros(300, dtype=torch.long), ("a",))
    recipe = AugmentationRecipe(hflip=0, random_erasing=0.25, erasing_mode="const")
    images = PixelTransform(many, GREY, recipe, 0)(list(range(300)), 0)
    changed = (images != PixelTransform(many, GREY, None, 0)(list(range(300)), 0)).flatten(1).any(1)
    assert 45 < int(changed.sum()) < 105


def test_mixing_gives_smoothed_targets_that_sum_to_one(tensors) -> None:
    labels = batch(tensors, AUGMENTATIONS["mixed"])["labels"]
    assert labels.shape == (4, 3)
    torch.testing.assert_close(labels.sum(1), torch.ones(4))
    assert labels.min() >= 0.1 / 3 - 1e-6


@pytest.mark.parametrize("size", [(3, 8, 8), (1, 12, 10)], ids=["grey-as-colour", "resized"])
def test_a_model_may_want_other_images_than_those_in_memory(tensors, size) -> None:
    wanted = ImageInput(size, (0.5,) * size[0], (0.2,) * size[0])
    for augmentation in (None, AUGMENTATIONS["windows"], AUGMENTATIONS["policy"]):
        assert batch(tensors, augmentation, wanted=wanted)["images"].shape == (4, *size)


def test_a_damaged_training_image_is_replaced_by_the_next_and_counted(folders: Path) -> None:
    source = FolderImages(folders / "train")
    for index in (11, 12):  # the last cat, the first dog
        Path(source.paths[index]).write_bytes(b"no image")
    batches = ImageBatches(source, COLOUR, augmentation=AUGMENTATIONS["none"])
    read = batches.__getitems__([11, 13, 0])
    assert read["labels"].tolist() == [1, 1, 0]
    assert torch.equal(read["images"][0], read["images"][1])
    assert batches.damaged.nonzero().flatten().tolist() == [11, 12]
    with pytest.warns(
        UserWarning, match=r"2 of 36 images can't be read and were replaced: .*cat/11.png, .*dog/00.png$"
    ):
        assert report_damaged(source, batches.damaged, what="replaced") == (source.paths[11], source.paths[12])


def test_a_damaged_image_is_counted_by_loading_processes_too(folders: Path) -> None:
    source = FolderImages(folders / "train")
    Path(source.paths[2]).unlink()
    batches = ImageBatches(source, COLOUR)
    labels = [b["labels"] for b in DataLoader(batches, batch_size=4, collate_fn=take, num_workers=1)]
    assert torch.cat(labels).tolist() == [0, 0, SKIPPED] + [0] * 9 + [1] * 12 + [2] * 12
    assert batches.damaged.nonzero().flatten().tolist() == [2]


def test_nothing_but_damaged_training_images_is_an_error(folders: Path) -> None:
    source = FolderImages(folders / "train")
    for path in source.paths:
        Path(path).write_bytes(b"")
    batches = ImageBatches(source, COLOUR, augmentation=AUGMENTATIONS["none"])
    with pytest.raises(RuntimeError, match=r"36 training images in a row can't be read, from .*00.png on"):
        batches.__getitems__([0])


@pytest.mark.parametrize("policy", ["rand-m10-n4-inc1", "rand-m10-n4", "original", "v0", "augmix-m10"])
@pytest.mark.parametrize("channels", [1, 3], ids=["grey", "colour"])
def test_policies_work_at_full_strength_on_every_kind_of_image(tensors, policy: str, channels: int) -> None:
    wanted = ImageInput((channels, 8, 8), (0.5,) * channels, (0.2,) * channels)
    batches = ImageBatches(tensors, wanted, augmentation=AugmentationRecipe(auto_augment=policy))
    for epoch in range(10):
        batches.set_epoch(epoch)
        assert batches.__getitems__(range(24))["images"].isfinite().all()


def test_an_unknown_policy_is_named(tensors) -> None:
    with pytest.raises(ValueError, match=r"augmentation.auto_augment 'nonsense' is not one of timm's"):
        ImageBatches(tensors, GREY, augmentation=AugmentationRecipe(auto_augment="nonsense"))


def test_seeds_tell_every_number_apart() -> None:
    drawn = set()
    for numbers in ((0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 0, -1)):
        for generator in (torch.rand, np.random.rand, lambda _: random.random()):
            with generators_kept():
                seed_all(*numbers)
                first = float(np.asarray(generator(1)).item())
                seed_all(*numbers)
                assert float(np.asarray(generator(1)).item()) == first
            drawn.add(first)
    assert len(drawn) == 12
