"""Batches of images for a DataLoader: read, transformed, mixed; damaged images counted.

A damaged training image is replaced with the next readable one, so that batches and their order stay the same; a damaged
evaluation image is not counted (label -100). Damage is found on reading.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence

import torch
from timm.data.mixup import Mixup
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from moh.data.images.augmentation import PixelTransform, ProcessorInput, eval_transform, train_transform
from moh.data.images.recipe import AugmentationRecipe, ImageInput
from moh.data.images.sources import ImageSource, TensorImages, UnreadableImage, next_readable
from moh.data.seeds import generator_of, generators_kept, seed_all

SKIPPED = -100
"""Label of an image that could not be read."""


class RepeatedOrder(Sampler[int]):
    """The order of an epoch with repeated augmentation (`AugmentationRecipe.repeats`): indices for `ImageBatches`.

    The repeats of an image are next to each other, dealt to the processes in turn as in the published recipe. A step of all
    processes reads the same images whatever their number is.

    Args:
        images: what is read; its epoch and seed decide the order.
        processes: number of processes that read a batch each.
        batch_size: images per process and forward pass.
    """

    def __init__(self, images: ImageBatches, *, processes: int, batch_size: int) -> None:
        self.images = images
        self.processes, self.batch_size = processes, batch_size

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[int]:
        n, repeats = len(self), self.images.repeats
        chosen = torch.randperm(n, generator=generator_of(self.images.seed, self.images.epoch))[: -(-n // repeats)]
        order = (chosen[:, None] + n * torch.arange(repeats)).flatten()[:n]  # repeat r of image i is n * r + i
        step = self.processes * self.batch_size
        whole = order[: n // step * step].view(-1, self.batch_size, self.processes).transpose(1, 2)
        yield from torch.cat([whole.flatten(), order[whole.numel() :]]).tolist()


class ImageBatches(Dataset):  # type: ignore[type-arg]
    """A source's images as a model's input, read a batch at a time.

    Give it to a DataLoader with `collate_fn=take`: a batch is a dictionary of `images` `[B, C, H, W]` float32 and
    `labels`, `[B]` int64, or `[B, K]` float32 if images are mixed.

    Args:
        source: the images.
        wanted: the model's input.
        augmentation: for training; None for evaluation.
        seed: for the augmentation.
    """

    def __init__(
        self,
        source: ImageSource,
        wanted: ImageInput | ProcessorInput,
        *,
        augmentation: AugmentationRecipe | None = None,
        seed: int = 0,
    ) -> None:
        self.source = source
        self.training = augmentation is not None
        self.repeats = 1 if augmentation is None else augmentation.repeats
        self.seed = seed
        self.wanted = wanted
        self.pixels: PixelTransform | None = None
        if isinstance(wanted, ProcessorInput) and augmentation is not None:
            raise ValueError("augmentation must be None for an image processor, which is for evaluation")
        if (
            isinstance(source, TensorImages)
            and isinstance(wanted, ImageInput)
            and PixelTransform.fits(source, wanted, augmentation)
        ):
            self.pixels = PixelTransform(source, wanted, augmentation, seed)
        if augmentation is None or isinstance(wanted, ProcessorInput):
            self.transform = eval_transform(wanted)
        else:
            self.transform = train_transform(wanted, augmentation)
        self.mixup = None
        if augmentation is not None and augmentation.mixes:
            self.mixup = Mixup(  # type: ignore[no-untyped-call]
                mixup_alpha=augmentation.mixup,
                cutmix_alpha=augmentation.cutmix,
                prob=augmentation.mix_prob,
                switch_prob=augmentation.mix_switch_prob,
                label_smoothing=augmentation.label_smoothing,
                num_classes=len(source.classes),
            )
        # Shared with the loading processes
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._damaged: Tensor = torch.zeros(len(source.labels), dtype=torch.bool).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch before each pass, so that images are augmented differently in each."""
        self._epoch.fill_(epoch)

    @property
    def epoch(self) -> int:
        """As set last."""
        return int(self._epoch)

    @property
    def damaged(self) -> Tensor:
        """`[n]` bool: which images have turned out unreadable so far."""
        return self._damaged

    def __len__(self) -> int:
        return len(self.source.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One image and its label, not mixed."""
        images, labels = self._read([index])
        return {"images": images[0], "labels": labels[0]}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """A whole batch; the DataLoader calls this if it exists."""
        images, labels = self._read(list(indices))
        if self.mixup is not None:
            with generators_kept():
                seed_all(self.seed, self.epoch, -1 - indices[0])  # negative, so unlike any image's
                images, labels = self.mixup(images, labels)
        return {"images": images, "labels": labels}

    def _read(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        epoch = self.epoch
        if self.pixels is not None:
            return self.pixels(indices, epoch), self.source.labels[[index % len(self) for index in indices]]
        with generators_kept():
            pairs = [self._one(index, epoch) for index in indices]
        return torch.stack([image for image, _ in pairs]), torch.tensor([label for _, label in pairs])

    def _one(self, index: int, epoch: int) -> tuple[Tensor, int]:
        if self.training:
            image, place = next_readable(self.source, index % len(self), self._note)
            seed_all(self.seed, epoch, index)
            return self.transform(image), int(self.source.labels[place])
        try:
            return self.transform(self.source.image(index)), int(self.source.labels[index])
        except UnreadableImage as error:
            self._note(index, error)
            return torch.zeros(self.wanted.size), SKIPPED

    def _note(self, place: int, error: UnreadableImage) -> None:
        self._damaged[place] = True


def readable_batches(
    loader: DataLoader[dict[str, Tensor]], *, desc: str, progress: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """`(images, labels)` of each batch of the loader, without the unreadable ones, under a progress bar."""
    from tqdm.auto import tqdm

    for batch in tqdm(loader, desc=desc, unit="batch", disable=None if progress else True, leave=False):
        readable = batch["labels"] != SKIPPED
        if readable.any():
            yield batch["images"][readable], batch["labels"][readable]


def report_damaged(source: ImageSource, damaged: Tensor, *, what: str) -> tuple[str, ...]:
    """Names of the damaged images; warns with their number and up to five names.

    Args:
        source: the images.
        damaged: `[n]` bool.
        what: what was done with them, for the message, such as "skipped".
    """
    names = tuple(source.name(index) for index in damaged.nonzero().flatten().tolist())
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        warnings.warn(
            f"{len(names)} of {len(damaged)} images can't be read and were {what}: {', '.join(names[:5])}{more}",
            stacklevel=2,
        )
    return names
