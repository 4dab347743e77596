"""Latents are the VAE's, are encoded once, and are never used for another VAE or other images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file

from moh.data.images.formats import FolderImages
from moh.data.images.sources import TensorImages
from moh.sampling import load_vae
from moh.training.diffusion import latents
from moh.training.diffusion.data import PixelDataset, to_float
from moh.training.diffusion.latents import encode_latents


@pytest.fixture
def vae(vae_dir: Path) -> AutoencoderKL:
    return load_vae(vae_dir)


@pytest.fixture
def images() -> PixelDataset:
    pixels = torch.randint(0, 256, (10, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return PixelDataset(TensorImages(pixels, torch.arange(10) % 3, ("a", "b", "c")), 8)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """First image of each encoded file."""
    starts: list[int] = []
    encode = latents._encode

    def recording(vae, images, indices, **options):
        starts.append(indices.start)
        return encode(vae, images, indices, **options)

    monkeypatch.setattr(latents, "_encode", recording)
    monkeypatch.setattr(latents, "_SHARD", 4)
    return starts


@torch.no_grad()
def test_they_are_the_vaes_scaled_and_mirrored_too(vae, images, encoded, tmp_path: Path) -> None:
    vae.register_to_config(scaling_factor=0.5, shift_factor=0.1)
    data = encode_latents(vae, images, folder=tmp_path, flip=True)
    assert encoded == [0, 4, 8] and len(list(tmp_path.iterdir())) == 3
    assert len(data) == 10 and data.sample_shape == (4, 4, 4) and data.labels.tolist() == images.labels.tolist()
    batch = data.__getitems__([9, 0, 5])
    assert batch["indices"].tolist() == [9, 0, 5] and batch["labels"].tolist() == [0, 0, 2]
    x = to_float(images.pixels([9, 0, 5]))
    for variant, pixels in enumerate((x, x.flip(-1))):
        expected = vae.encode(pixels).latent_dist
        torch.testing.assert_close(batch["mean"][:, variant].float(), (expected.mean - 0.1) * 0.5, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(batch["std"][:, variant].float(), expected.std * 0.5, rtol=1e-3, atol=1e-3)
    assert all(torch.equal(data[5][name], batch[name][2]) for name in batch)


def test_without_flip_there_is_one_variant(vae, images, tmp_path: Path) -> None:
    data = encode_latents(vae, images, folder=tmp_path, flip=False)
    assert data[0]["mean"].shape == (1, 4, 4, 4)


def test_only_missing_files_are_encoded(vae, images, encoded, tmp_path: Path) -> None:
    first = encode_latents(vae, images, folder=tmp_path, flip=True)
    (tmp_path / "latents-00001.safetensors").unlink()
    again = encode_latents(vae, images, folder=tmp_path, flip=True)
    assert encoded == [0, 4, 8, 4]
    assert torch.equal(first.__getitems__([3, 4])["mean"], again.__getitems__([3, 4])["mean"])


def test_the_default_directory_is_one_for_each_vae_and_data_set(vae, images, encoded, tmp_path: Path) -> None:
    for _ in range(2):
        encode_latents(vae, images, folder=None, flip=True, cache_dir=str(tmp_path))
    assert encoded == [0, 4, 8]
    with torch.no_grad():
        vae.encoder.conv_in.bias += 0.1
    encode_latents(vae, images, folder=None, flip=True, cache_dir=str(tmp_path))
    assert len(list((tmp_path / "latents").iterdir())) == 2


@pytest.mark.parametrize("change", ["vae", "weights", "images", "size", "flip"])
def test_latents_of_something_else_are_refused(vae, images, tmp_path: Path, change: str) -> None:
    encode_latents(vae, images, folder=tmp_path, flip=True)
    source, size = images.source, 8
    if change == "vae":
        vae.register_to_config(scaling_factor=0.5)
    if change == "weights":
        with torch.no_grad():
            vae.encoder.conv_in.bias += 0.1
    if change == "images":
        source = TensorImages(source.pixels.flip(0), source.labels, source.classes)
    if change == "size":
        size = 16
    message = {
        "vae": "another VAE",
        "weights": "another VAE",
        "images": "other images",
        "size": "another size|other images",
        "flip": "another data.flip",
    }
    with pytest.raises(ValueError, match=rf"data\.latents .* holds latents of ({message[change]}) .*delete it"):
        encode_latents(vae, PixelDataset(source, size), folder=tmp_path, flip=change != "flip")


def test_a_damaged_file_is_named(vae, images, tmp_path: Path) -> None:
    encode_latents(vae, images, folder=tmp_path, flip=False)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"latents-00000\.safetensors can't be read .*: delete it"):
        encode_latents(vae, images, folder=tmp_path, flip=False)


def test_a_damaged_image_is_left_out_with_a_warning(vae, image_dir: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(image_dir / "train", tmp_path / "images")
    (tmp_path / "images" / "cat" / "03.png").write_bytes(b"no image")
    data = PixelDataset(FolderImages(tmp_path / "images"), 8)
    with pytest.warns(UserWarning, match=r"left out: .*03\.png"):
        encoded = encode_latents(vae, data, folder=tmp_path / "latents", flip=False)
    assert encoded.labels.tolist() == [0] * 11 + [1] * 12
    assert load_file(tmp_path / "latents" / "latents-00000.safetensors")["mean"].shape == (23, 1, 4, 4, 4)


def test_images_that_do_not_fit_the_vae_are_told(vae, tmp_path: Path) -> None:
    odd = PixelDataset(TensorImages(torch.zeros(2, 3, 9, 9, dtype=torch.uint8), torch.zeros(2), ("a",)), 9)
    with pytest.raises(
        ValueError, match=r"data\.image_size must be a multiple of 2, by which the VAE divides it, got 9"
    ):
        encode_latents(vae, odd, folder=tmp_path, flip=False)
    grey = PixelDataset(TensorImages(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.zeros(2), ("a",)), 8)
    with pytest.raises(ValueError, match=r"data\.vae must encode images of 1 channels, got one for 3"):
        encode_latents(vae, grey, folder=tmp_path, flip=False)
