"""`moh eval fid`: score generated images against reference images."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moh.cli.loading import add_loading, device_of_images, revision
from moh.cli.options import add_command, add_json, print_result

if TYPE_CHECKING:
    from PIL import Image

    from moh.cli.options import Commands
    from moh.data.images.sources import ImageSource

_HELP = "FID, sFID, KID, inception score, precision and recall of generated images, or the same on a named classifier."


def add_parser(sub: Commands) -> None:
    """Add `eval fid` to the commands of `eval`."""
    parser = add_command(sub, "fid", _HELP, run, within="eval")
    parser.add_argument("samples", help="generated images: a directory, or an .npz file with arr_0")
    parser.add_argument(
        "--reference", required=True, metavar="PATH",
        help="real images, likewise; or their statistics (.npz with mu and sigma, or from --save-reference); or the name of a "
        "data set that `moh eval --images` takes, such as fashion-mnist, for its held-out images",
    )  # fmt: skip
    network = parser.add_mutually_exclusive_group()
    network.add_argument("--inception", metavar="FILE", help="weights of FID's network (default: fetched if necessary)")
    network.add_argument(
        "--features",
        metavar="CHECKPOINT",
        help="compare features of this classifier of timm's (directory or hub name); the distance is then not FID",
    )
    parser.add_argument("--size", type=int, help="crop the middle square of each image and resize it to this side")
    parser.add_argument("--batch-size", type=int, default=50, help="images per forward pass (default: %(default)s)")
    parser.add_argument("--save-reference", metavar="FILE", help="also write the reference's statistics (.safetensors)")
    add_json(parser)
    add_loading(
        parser,
        dtype="of the network's weights; float32 alone",
        auto="float32",
        named="--features, if that is named on the hub",
    )


def run(arguments: Namespace) -> None:
    from moh._files import check_writable
    from moh.evaluation.generation import (
        InceptionFeatures,
        load_classifier,
        open_images,
        reference_features,
        save_features,
        score_images,
    )

    target = None if arguments.save_reference is None else Path(arguments.save_reference)
    if target is not None:
        if target.suffix != ".safetensors":
            raise ValueError(f"--save-reference must be a file that ends in .safetensors, got {target}")
        check_writable(target.parent, name="--save-reference")
    open_images(arguments.samples, size=arguments.size)  # errors now, not after the reference has been read
    named = _named_images(arguments.reference)
    if arguments.features is None:
        if arguments.revision is not None:
            raise ValueError(f"--revision needs --features, whose revision it is, got {arguments.revision!r}")
        device = device_of_images(arguments, "FID's network")
        extractor: Any = InceptionFeatures(arguments.inception, device=device)
    else:
        device = device_of_images(arguments, arguments.features)
        extractor = load_classifier(arguments.features, device=device, **revision(arguments, arguments.features))
    options = {"size": arguments.size, "batch_size": arguments.batch_size}
    reference = reference_features(arguments.reference if named is None else named, extractor, **options)
    if named is not None:
        reference = dataclasses.replace(reference, name=arguments.reference)
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
        save_features(target, reference, extractor)
    result = score_images(arguments.samples, reference, extractor, **options)
    print_result(arguments, result.to_dict(), result.lines())


class _Pictures:
    """The images of a source, without labels."""

    def __init__(self, source: ImageSource) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source.labels)

    def __getitem__(self, index: int) -> Image.Image:
        return self.source.image(index)


def _named_images(reference: str) -> _Pictures | None:
    """The held-out images of the data set of that name; None for a file or a directory."""
    if Path(reference).exists() or Path(reference).suffix in (".npz", ".safetensors"):
        return None
    from moh.data.images.datasets import load_evaluation_images

    try:
        return _Pictures(load_evaluation_images(reference))
    except ValueError as error:
        raise ValueError(str(error).replace("data.dataset", "--reference", 1)) from None
