"""The subjects of `moh inspect`: a model of one of the three kinds and its inputs."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from glob import glob, has_magic
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from moh.cli.loading import classifier, device_of, placement, refuse_device_map, revision
from moh.cli.options import read_images, reads_images
from moh.models.hub import kind_at

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from moh.data.images.sources import ImageSource
    from moh.evaluation.curve import Curve
    from moh.inspection import GroupedInputs


_TEXTS = 3  # per group, on a page
_IMAGES_PER_CLASS = 2
_MOST_CLASSES = 10


def family_of(arguments: Namespace) -> type[Subject]:
    """The subject class of the checkpoint.

    Raises:
        ValueError: images are given for a language model, or missing for a classifier.
    """
    if kind_at(arguments.model, **revision(arguments)).task == "diffusion":
        return _Diffusion
    return _Images if reads_images(arguments) else _Texts


class Subject:
    """A loaded model and the inputs given on the command line."""

    model: nn.Module
    notes: tuple[str, ...] = ()

    def __init__(self, arguments: Namespace) -> None:
        self.arguments = arguments

    @staticmethod
    def check(arguments: Namespace) -> None:
        """Raise a ValueError for options that this kind of model does not have."""

    def inputs(self) -> GroupedInputs:
        """All inputs."""
        raise NotImplementedError

    def few(self, count: int) -> GroupedInputs:
        """About `count` inputs, from all groups."""
        raise NotImplementedError

    def curve(self) -> Curve:
        """Quality of the model on the inputs against the share of active heads."""
        raise NotImplementedError

    def write_page(self) -> None:
        raise NotImplementedError


class _Texts(Subject):
    @staticmethod
    def check(arguments: Namespace) -> None:
        if arguments.classes is not None:
            raise ValueError("--classes is for image classifiers: give --images too")

    def __init__(self, arguments: Namespace) -> None:
        from moh.models.transformers.families import is_text_encoder
        from moh.models.transformers.loading import load_text_model, load_tokenizer

        super().__init__(arguments)
        self.texts = _read_groups(arguments)
        self.tokenizer = load_tokenizer(arguments.model, **revision(arguments))
        self.model = load_text_model(arguments.model, **placement(arguments))
        if is_text_encoder(self.model.config) and (arguments.ablate or arguments.curve):
            raise ValueError(
                f"--ablate and --curve need a model that predicts the next token; {arguments.model} is an encoder"
            )
        if len(self.texts) > 1 and any(len(texts) < 2 for texts in self.texts.values()):
            self.notes = (
                "A group has a single text, so the tests exchange passages: a difference is one between these texts, not "
                "between kinds of text.",
            )

    def inputs(self) -> GroupedInputs:
        return self._groups(self.arguments.max_tokens, self.arguments.seq_len)

    def few(self, count: int) -> GroupedInputs:
        seq_len = self.arguments.seq_len
        return self._groups(seq_len * max(1, count // len(self.texts)), seq_len)

    def _groups(self, max_tokens: int, seq_len: int) -> GroupedInputs:
        from moh.inspection import text_groups

        return text_groups(self.model, self.tokenizer, self.texts, seq_len=seq_len, max_tokens=max_tokens)

    def curve(self) -> Curve:
        from moh.evaluation.curve import text_curve
        from moh.training import pack_tokens

        seq_len, texts = self.arguments.seq_len, [text for group in self.texts.values() for text in group]
        blocks = pack_tokens(texts, self.tokenizer, seq_len=seq_len)
        most = max(1, len(self.texts) * self.arguments.max_tokens // seq_len)
        return text_curve(self.model, blocks[:: -(-len(blocks) // most)], repeats=0)

    def write_page(self) -> None:
        _write_text_page(self.arguments, self.model, self.tokenizer, self.texts)


class _OfImages(Subject):
    """A model and labelled images."""

    images: ImageSource

    def inputs(self) -> GroupedInputs:
        return self._groups(self.images)

    def few(self, count: int) -> GroupedInputs:
        from moh.data.images.sources import every_nth

        return self._groups(every_nth(self.images, count))

    def _groups(self, images: ImageSource) -> GroupedInputs:
        raise NotImplementedError


class _Images(_OfImages):
    def __init__(self, arguments: Namespace) -> None:
        super().__init__(arguments)
        self.model = classifier(arguments)
        self.images = read_images(arguments)

    def _groups(self, images: ImageSource) -> GroupedInputs:
        from moh.inspection import image_groups

        options = {"batch_size": self.arguments.batch_size, "workers": self.arguments.workers}
        return image_groups(self.model, images, **options)

    def curve(self) -> Curve:
        from moh.evaluation.curve import image_curve

        options = {"batch_size": self.arguments.batch_size, "workers": self.arguments.workers}
        return image_curve(self.model, self.images, **options)

    def write_page(self) -> None:
        _write_image_page(self.arguments, self.model, self.images)


class _Diffusion(_OfImages):
    @staticmethod
    def check(arguments: Namespace) -> None:
        if arguments.images is None:
            raise ValueError(f"--images must be given, because {arguments.model} is a diffusion model")
        refuse_device_map(arguments, arguments.model)
        if arguments.dtype not in ("auto", "float32"):
            raise ValueError(f"--dtype must be float32 for a diffusion model here, got {arguments.dtype}")
        if arguments.html is not None:
            raise ValueError("--html shows texts and images of classifiers, not noisy images: give --output DIR")
        if arguments.curve:
            raise ValueError("--curve measures perplexity or accuracy, which a diffusion model does not have")

    def __init__(self, arguments: Namespace) -> None:
        from moh.sampling import load_image_model

        super().__init__(arguments)
        diffusion = load_image_model(arguments.model, vae=arguments.vae, **revision(arguments))
        self.diffusion = diffusion.to(device=device_of(arguments))
        self.model = self.diffusion.transformer
        self.images = read_images(arguments)

    def _groups(self, images: ImageSource) -> GroupedInputs:
        from moh.inspection import diffusion_groups

        options = {name: getattr(self.arguments, name) for name in ("by", "bins", "seed", "batch_size")}
        return diffusion_groups(self.diffusion, images, **options)


def _read_groups(arguments: Namespace) -> dict[str, list[str]]:
    """The texts given on the command line, by group."""
    from moh.training import load_corpus, read_texts

    texts: dict[str, list[str]] = {}
    for file in arguments.files:
        texts.setdefault(Path(file).name or Path(file).absolute().name, []).extend(read_texts([file]))
    for given in arguments.group:
        name, equals, source = given.partition("=")
        if not (name and equals and source):
            raise ValueError(f"--group must be NAME=TEXTS, got {given!r}")
        texts.setdefault(name, []).extend(_read(source))
    if not texts:
        texts[arguments.corpus] = load_corpus(arguments.corpus).heldout
    return texts


def _read(source: str) -> list[str]:
    """A corpus's held-out documents, or the files at a path or pattern."""
    from moh.data.text.corpora import CORPORA
    from moh.training import load_corpus, read_texts

    if source in CORPORA and not Path(source).exists():
        return load_corpus(source).heldout
    if Path(source).exists() or not has_magic(source):
        return read_texts([source])
    files = sorted(glob(source, recursive=True))
    if not files:
        raise ValueError(f"--group: no file matches {source!r}")
    return read_texts(files)


def _write_text_page(
    arguments: Namespace,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Mapping[str, Sequence[str]],
) -> None:
    """A page of the first texts of each group."""
    from moh.inspection.page import head_page, text_sample
    from moh.models.transformers.families import most_positions

    limit = min(2_000, arguments.max_tokens, most_positions(model.config) or 2_000)
    shown = [(group, text) for group, members in texts.items() for text in members[:_TEXTS]]
    samples = [
        text_sample(model, tokenizer, text, name=f"{number}: {group}", group=group, max_tokens=limit)
        for number, (group, text) in enumerate(shown, 1)
    ]
    page = head_page(samples, title=f"{Path(arguments.model).name}: which head does what")
    page.save(arguments.html)
    print(
        f"{arguments.html}: {len(samples)} texts, {len(page.html.encode()) / 1e6:.1f} MB",
        file=sys.stderr if arguments.json else sys.stdout,
    )


def _report(arguments: Namespace, line: str) -> None:
    print(line, file=sys.stderr if arguments.json else sys.stdout)  # JSON is all of standard output


def _write_image_page(arguments: Namespace, model: nn.Module, images: ImageSource) -> None:
    """A page of the first images of each class: the given classes, or up to ten; each class is a group."""
    from moh.data.images.augmentation import eval_transform
    from moh.inspection.page import head_page, image_sample
    from moh.models.classifiers import image_input

    chosen = arguments.classes or list(images.classes)[:_MOST_CLASSES]
    if unknown := [name for name in chosen if name not in images.classes]:
        raise ValueError(f"--classes must be among {', '.join(images.classes)}, got {', '.join(unknown)}")
    wanted = image_input(model)
    transform = eval_transform(wanted)
    samples = []
    for name in chosen:
        label = images.classes.index(name)
        readable = _readable(images, (images.labels == label).nonzero().flatten().tolist())
        for index, image in islice(readable, _IMAGES_PER_CLASS):
            samples.append(image_sample(model, image, transform, name=f"{name}, {images.name(index)}", group=name))
    page = head_page(samples, title=f"{Path(arguments.model).name}: which head does what")
    page.save(arguments.html)
    print(
        f"{arguments.html}: {len(samples)} images, {len(page.html.encode()) / 1e6:.1f} MB",
        file=sys.stderr if arguments.json else sys.stdout,
    )


def _readable(images: ImageSource, indices: list[int]) -> Iterator[tuple[int, Image]]:
    """The readable images with their indices; reports the others."""
    from moh.data.images.sources import UnreadableImage

    for index in indices:
        try:
            yield index, images.image(index)
        except UnreadableImage as error:
            print(f"skipped: {error}", file=sys.stderr)
