"""`moh eval` for image classifiers, and how any command is told on which images. Imports what it needs when it runs."""

from __future__ import annotations

import argparse
import json
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moh.training.images.sources import ImageSource


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that say on which images, and how."""
    group = parser.add_argument_group("image classifiers")
    group.add_argument(
        "--images", metavar="DATASET",
        help="fashion-mnist, a directory of class folders (or one with val/), or a Hugging Face data set's name",
    )  # fmt: skip
    group.add_argument("--split", help="of a Hugging Face data set (default: validation or test)")
    group.add_argument("--image-column", help="of a Hugging Face data set (default: the one that holds images)")
    group.add_argument("--label-column", help="of a Hugging Face data set (default: the one that holds class labels)")
    group.add_argument("--max-images", type=int, help="at most so many images, evenly spread (default: all)")
    group.add_argument("--batch-size", type=int, default=64, help="images per forward pass (default: %(default)s)")
    group.add_argument("--workers", type=int, default=0, help="processes that load images (default: %(default)s)")


def is_classifier(arguments: Namespace) -> bool:
    """Whether the command is about an image classifier: a directory's config.json says so, a name by `--images`.

    Raises:
        ValueError: there is a classifier without images, images for another model, or images and text.
    """
    from moh.models.image_loading import is_image_classifier

    if arguments.images is not None and arguments.files:
        raise ValueError("--images and --files must not both be given")
    path = Path(arguments.model).expanduser()
    if not path.is_dir():
        return arguments.images is not None
    classifier = is_image_classifier(path)
    if classifier and arguments.images is None:
        raise ValueError(f"--images must say on which images, because {arguments.model} is an image classifier")
    if not classifier and arguments.images is not None:
        raise ValueError(f"--images needs an image classifier in timm's format, and {arguments.model} is none")
    return classifier


def read_images(arguments: Namespace) -> ImageSource:
    """The images that a command line names."""
    from moh.training.images.datasets import load_evaluation_images
    from moh.training.images.sources import every_nth

    columns = {"image_column": arguments.image_column, "label_column": arguments.label_column}
    images = load_evaluation_images(arguments.images, eval_split=arguments.split, **columns)
    return every_nth(images, arguments.max_images)


def run_eval(arguments: Namespace) -> None:
    """Top-1 and more of a classifier."""
    from moh.evaluation import evaluate_images
    from moh.models.image_loading import load_image_classifier
    from moh.models.transformers.loading import default_device

    model = load_image_classifier(arguments.model, device=default_device())
    images = read_images(arguments)
    result = evaluate_images(model, images, batch_size=arguments.batch_size, workers=arguments.workers)
    if arguments.json:
        print(json.dumps({
            "top1": result.top1, "top5": result.top5, "loss": result.loss, "images": result.images,
            "skipped": len(result.skipped), "images_per_second": result.images_per_second, "share": result.share,
            "per_class": result.per_class,
        }))  # fmt: skip
        return
    print(
        f"top-1 {result.top1:.2f} %, top-5 {result.top5:.2f} %, loss {result.loss:.4f} "
        f"({result.images:,} images, {len(result.skipped)} skipped)"
    )
    heads = (
        "dense: every token uses all heads" if result.share is None else f"{100 * result.share:.0f} % of the heads used"
    )
    print(f"{result.images_per_second:,.0f} images/s; {heads}")
    known = sorted((value, name) for name, value in result.per_class.items() if value is not None)
    named = ", ".join(f"{name} {value:.1f} %" for value, name in known[:5])
    print(f"least recognised: {named}")
