"""Latents of training images: encoded once by a VAE, kept as safetensors, checked against VAE and images when read.

The mean and standard deviation of each image's latent are kept: training draws a new latent each time it sees the image,
as the published recipe does.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers import AutoencoderKL
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from moh._files import replacing_file
from moh.data.images.sources import UnreadableImage
from moh.data.text.corpora import default_cache_dir
from moh.sampling.checkpoint import weights_digest
from moh.training.diffusion.data import Batch, PixelDataset, to_float

_SHARD = 4096  # images per file: an interruption loses minutes of work, and ImageNet takes 300 files
_BATCH = 16  # images encoded at a time


class LatentDataset(Dataset[Batch]):
    """Cached latents.

    Args:
        folder: as filled by `encode_latents`.
        classes: names of the classes.
    """

    def __init__(self, folder: Path, classes: tuple[str, ...]) -> None:
        self.classes = classes
        self._files = sorted(folder.glob("latents-*.safetensors"))
        labels = []
        for file in self._files:
            with safe_open(file, framework="pt") as shard:
                labels.append(shard.get_tensor("labels"))
                shape = shard.get_slice("mean").get_shape()  # [n, 1 or 2, c, h, w]
        self.labels = torch.cat(labels)
        self.sample_shape = tuple(shape[2:])
        self._starts = torch.tensor([0, *map(len, labels)]).cumsum(0)
        self._open: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        return {name: value[0] for name, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int]) -> Batch:
        """A whole batch: `mean` and `std` `[B, 1 or 2, c, h, w]` float16 (2: also mirrored), `labels` and `indices`."""
        rows: dict[str, list[Tensor]] = {"mean": [], "std": []}
        shards = (torch.searchsorted(self._starts, torch.tensor(indices), right=True) - 1).tolist()
        for index, number in zip(indices, shards, strict=True):
            row = index - int(self._starts[number])
            for name, values in rows.items():
                values.append(self._shard(number).get_slice(name)[row : row + 1])
        moments = {name: torch.cat(values) for name, values in rows.items()}
        return {**moments, "labels": self.labels[indices], "indices": torch.tensor(indices)}

    def _shard(self, number: int) -> Any:
        if number not in self._open:  # opened where it is read, so that each worker process has its own handles
            self._open[number] = safe_open(self._files[number], framework="pt")
        return self._open[number]


def encode_latents(
    vae: AutoencoderKL, images: PixelDataset, *, folder: Path | None, flip: bool, cache_dir: str | None = None
) -> LatentDataset:
    """Encode images with a VAE, or reuse what an earlier run encoded; under `torchrun` the processes share the work.

    The latents are scaled by the VAE's configuration to about unit variance. A damaged image is left out with a warning.
    After an interruption only the missing files are encoded.

    Args:
        vae: the encoder, in float32.
        images: what to encode.
        folder: where the latents are kept; None takes a directory in the cache, one per VAE, data set and size.
        flip: also encode the mirrored images.
        cache_dir: the cache; None takes the default.

    Raises:
        ValueError: `folder` holds latents of another VAE or other images, or the VAE does not fit the images.
    """
    channels, size = images.sample_shape[0], images.image_size
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    if channels != vae.config.in_channels:
        raise ValueError(f"data.vae must encode images of {channels} channels, got one for {vae.config.in_channels}")
    if size % factor:
        raise ValueError(f"data.image_size must be a multiple of {factor}, by which the VAE divides it, got {size}")
    identity = {"vae": weights_digest(vae), "images": images.digest, "image_size": size, "flip": flip}
    if folder is None:
        name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        folder = (default_cache_dir() if cache_dir is None else Path(cache_dir)) / "latents" / name
    folder.mkdir(parents=True, exist_ok=True)
    state = PartialState()
    todo = [number for number in range(-(-len(images) // _SHARD)) if not _is_done(_file(folder, number), identity)]
    state.wait_for_everyone()  # all processes have looked before one writes
    vae.to(state.device)
    mine = todo[state.process_index :: state.num_processes]
    for number in tqdm(mine, desc="encoding", unit="file", disable=None if state.is_main_process else True):
        indices = range(number * _SHARD, min((number + 1) * _SHARD, len(images)))
        tensors = _encode(vae, images, indices, flip=flip)
        with replacing_file(_file(folder, number)) as file:
            save_file(tensors, file, metadata={key: json.dumps(value) for key, value in identity.items()})
    vae.to("cpu")
    state.wait_for_everyone()
    return LatentDataset(folder, images.classes)


@torch.inference_mode()
def _encode(vae: AutoencoderKL, images: PixelDataset, indices: range, *, flip: bool) -> dict[str, Tensor]:
    means, stds, labels = [], [], []
    for start in range(indices.start, indices.stop, _BATCH):
        pixels, readable = _readable(images, range(start, min(start + _BATCH, indices.stop)))
        if not readable:
            continue
        x = to_float(pixels).to(vae.device)
        variants = [x, x.flip(-1)] if flip else [x]
        posteriors = [vae.encode(variant).latent_dist for variant in variants]
        shift, scale = vae.config.shift_factor or 0.0, vae.config.scaling_factor
        means.append(torch.stack([(p.mean - shift) * scale for p in posteriors], 1).half().cpu())  # [B, V, c, h, w]
        stds.append(torch.stack([p.std * scale for p in posteriors], 1).half().cpu())
        labels.append(images.labels[readable])
    if not labels:
        raise ValueError(f"none of the images {indices.start} to {indices.stop - 1} can be read")
    return {"mean": torch.cat(means), "std": torch.cat(stds), "labels": torch.cat(labels)}


def _readable(images: PixelDataset, indices: range) -> tuple[Tensor, list[int]]:
    """Pixels and indices of the readable images; warns about the others."""
    try:
        return images.pixels(list(indices)), list(indices)
    except UnreadableImage:
        pixels, readable = [], []
    for index in indices:
        try:
            pixels.append(images.pixels([index]))
            readable.append(index)
        except UnreadableImage as error:
            warnings.warn(f"left out: {error}", stacklevel=2)
    return torch.cat(pixels) if pixels else torch.empty(0), readable


def _is_done(file: Path, identity: dict[str, Any]) -> bool:
    """Whether the file exists.

    Raises:
        ValueError: it can't be read, or holds latents of other images or another VAE.
    """
    if not file.exists():
        return False
    try:
        with safe_open(file, framework="pt") as shard:
            found = {key: json.loads(value) for key, value in (shard.metadata() or {}).items() if key in identity}
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{file} can't be read ({error}): delete it") from None
    words = {"vae": "another VAE", "images": "other images", "image_size": "another size", "flip": "another data.flip"}
    for key, value in identity.items():
        if found.get(key) != value:
            raise ValueError(
                f"data.latents {file.parent} holds latents of {words[key]} ({found.get(key)}, this is {value}): "
                "choose another directory, or delete it"
            )
    return True


def _file(folder: Path, number: int) -> Path:
    return folder / f"latents-{number:05d}.safetensors"
