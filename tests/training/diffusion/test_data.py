"""Images become tensors of one size; the random draws for an image depend only on seed, step and image."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import center_crop, pil_to_tensor, resize, to_pil_image

from moh.data.images.formats import middle_square
from moh.data.images.sources import TensorImages, UnreadableImage
from moh.training.diffusion.data import PixelDataset, load_source, to_float
from moh.training.diffusion.recipe import DiffusionDataRecipe
from moh.training.diffusion.trainer import draw

CPU = torch.device("cpu")


def grey(size: int, count: int = 3) -> TensorImages:
    pixels = torch.arange(count * size * size).reshape(count, 1, size, size) % 200 + 50
    return TensorImages(pixels.to(torch.uint8), torch.arange(count) % 3, tuple("abc"))


def test_small_images_in_memory_get_a_black_margin() -> None:
    source = grey(6)
    data = PixelDataset(source, 8)
    assert data.sample_shape == (1, 8, 8) and len(data) == 3 and data.classes == ("a", "b", "c")
    batch = data.__getitems__([2, 0])
    assert torch.equal(batch["pixels"][:, :, 1:7, 1:7], source.pixels[[2, 0]])
    assert int(batch["pixels"].sum()) == int(source.pixels[[2, 0]].sum())
    assert batch["labels"].tolist() == [2, 0] and batch["indices"].tolist() == [2, 0]
    assert all(torch.equal(data[2][name], batch[name][0]) for name in batch)


def test_images_of_the_size_stay_as_they_are() -> None:
    source = grey(8)
    assert torch.equal(PixelDataset(source, 8).pixels([0, 1, 2]), source.pixels)


def test_large_images_in_memory_are_resized() -> None:
    source = TensorImages(torch.full((2, 3, 16, 16), 77, dtype=torch.uint8), torch.zeros(2), ("a",))
    assert torch.equal(PixelDataset(source, 8).pixels([0]), torch.full((1, 3, 8, 8), 77, dtype=torch.uint8))


def test_files_are_resized_and_cropped_to_the_middle_square(tmp_path: Path) -> None:
    (tmp_path / "train" / "a").mkdir(parents=True)
    picture = torch.zeros(16, 48, dtype=torch.uint8)
    picture[:, 16:32] = 200  # only the middle is bright
    Image.fromarray(picture.numpy()).save(tmp_path / "train" / "a" / "wide.png")
    data = PixelDataset(load_source(DiffusionDataRecipe(str(tmp_path), 8)), 8)
    pixels = data.pixels([0])
    assert pixels.shape == (1, 3, 8, 8)  # grey files become RGB
    assert (pixels[..., 1:-1].int() - 200).abs().max() < 5  # bicubic edges ring
    (tmp_path / "train" / "a" / "wide.png").write_bytes(b"no image")
    with pytest.raises(UnreadableImage, match=r"wide\.png"):
        data.pixels([0])


@pytest.mark.parametrize("times", [2, 4, 8])
def test_large_images_are_halved_by_means_as_published(times: int) -> None:
    small = torch.randint(256, (3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    large = small.repeat_interleave(times, 1).repeat_interleave(times, 2)
    got = middle_square(to_pil_image(large), 8)
    assert torch.equal(pil_to_tensor(got), small)  # bicubic alone mixes neighbouring blocks


def test_the_middle_of_an_odd_margin_is_the_published_one() -> None:
    wide = torch.arange(7, dtype=torch.uint8).expand(1, 4, 7).contiguous()
    assert pil_to_tensor(middle_square(to_pil_image(wide), 4))[0, 0].tolist() == [1, 2, 3, 4]
    assert middle_square(Image.new("RGB", (10, 17)), 8).size == middle_square(Image.new("L", (3, 2)), 8).size == (8, 8)


def pictures(folder: Path, names: str) -> PixelDataset:
    """One grey picture of 8 x 8 per class."""
    for level, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), (level, level, level)).save(folder / name / "one.png")
    return PixelDataset(load_source(DiffusionDataRecipe(str(folder), 8)), 8)


def test_the_next_image_stands_in_for_a_damaged_one_which_is_named_once(tmp_path: Path) -> None:
    data = pictures(tmp_path, "abcd")
    for name in "bcd":
        (tmp_path / name / "one.png").write_bytes(b"no image")
        if name == "b":
            with pytest.warns(UserWarning, match=r"replaced by the next image: .*b/one\.png") as told:
                batch = data.__getitems__([1, 0, 1])
            assert len(told) == 1
            assert batch["pixels"].amax((1, 2, 3)).tolist() == batch["labels"].tolist() == [2, 0, 2]
            assert batch["indices"].tolist() == [1, 0, 1]
    with pytest.warns(UserWarning, match="replaced"):
        assert int(data[2]["labels"]) == 0
    (tmp_path / "a" / "one.png").unlink()
    with (
        pytest.warns(UserWarning, match=r"a/one\.png"),
        pytest.raises(RuntimeError, match=r"4 training images in a row can't be read, from .*c/one\.png on"),
    ):
        data.__getitems__([2])


@pytest.mark.parametrize("change", ["pixels", "name", "size", "missing"])
def test_the_digest_tells_changed_files(tmp_path: Path, change: str) -> None:
    before = pictures(tmp_path, "ab").digest
    file = tmp_path / "b" / "one.png"
    if change == "pixels":
        Image.new("RGB", (8, 8), (1, 2, 3)).save(file)
    if change == "name":
        file.rename(file.with_name("two.png"))
    if change == "size":
        file.write_bytes(file.read_bytes() + b"more")
    data = pictures(tmp_path, "")
    assert data.digest != before if change != "missing" else data.digest == before
    if change == "missing":
        file.unlink()
        data = PixelDataset(data.source, 8)
        assert data.digest != before


@pytest.mark.parametrize("size", [4, 8, 9])
@pytest.mark.parametrize(
    "other",
    [
        lambda image, size: resize(image, [size, size]),
        lambda image, size: center_crop(resize(image, size), [size, size]),
        lambda image, size: center_crop(image, [size, size]),
    ],
    ids=["squeezed", "not-halved", "not-resized"],
)
def test_the_digest_tells_another_preparation_of_files_even_if_these_files_look_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other, size: int
) -> None:
    source = pictures(tmp_path, "ab").source  # of one colour each
    data = PixelDataset(source, size)
    pixels, before = data.pixels([0, 1]), data.digest
    assert PixelDataset(source, size).digest == before
    monkeypatch.setattr("moh.training.diffusion.data.middle_square", other)
    changed = PixelDataset(source, size)
    assert changed.digest != before
    assert size > 8 or torch.equal(changed.pixels([0, 1]), pixels)


def test_the_digest_of_images_in_memory_is_of_all_pixels() -> None:
    source = grey(8, 40)
    before = PixelDataset(source, 8).digest
    assert PixelDataset(grey(8, 40), 8).digest == before
    source.pixels[7, 0, 3, 3] += 1
    assert PixelDataset(source, 8).digest != before


def test_pixels_become_numbers_from_minus_one_to_one() -> None:
    assert to_float(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1, 1]


def drawn(indices: list[int], **options):
    defaults = dict(seed=0, step=5, train_steps=1000, mirror=True, latents=False, device=CPU)
    return draw(torch.tensor(indices), (1, 8, 8), **defaults | options)


def test_what_is_drawn_for_an_image_does_not_depend_on_its_batch() -> None:
    together, alone = drawn([3, 9, 4], latents=True), drawn([9], latents=True)
    for name in ("t", "noise", "mirrored", "uniform", "latent"):
        assert torch.equal(getattr(together, name)[1:2], getattr(alone, name)), name


def test_seed_step_and_image_change_what_is_drawn() -> None:
    noise = [drawn([1]), drawn([2]), drawn([1], step=6), drawn([1], seed=1)]
    assert len({float(d.noise[0, 0, 0, 0]) for d in noise}) == 4


def test_draws_have_the_right_distributions() -> None:
    d = drawn(list(range(2000)), latents=True, train_steps=10)
    assert d.t.bincount(minlength=10).float().div(2000).sub(0.1).abs().max() < 0.03 and d.t.max() == 9
    assert abs(float(d.mirrored.float().mean()) - 0.5) < 0.04
    assert abs(float(d.uniform.mean()) - 0.5) < 0.02 and d.uniform.min() >= 0 and d.uniform.max() < 1
    for noise in (d.noise, d.latent):
        assert abs(float(noise.mean())) < 0.01 and abs(float(noise.std()) - 1) < 0.01
    for a, b in ((d.noise, d.latent), (d.mirrored, d.uniform), (d.t, d.uniform), (d.noise[:, 0, 0, 0], d.uniform)):
        assert abs(float(torch.corrcoef(torch.stack([a.flatten().float(), b.flatten()]))[0, 1])) < 0.08
    assert not drawn(list(range(50)), mirror=False).mirrored.any()
