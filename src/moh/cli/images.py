"""`moh eval` and `moh inspect` for image classifiers. Imports what it needs when it runs."""

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


def _images(arguments: Namespace) -> ImageSource:
    from moh.training.images.datasets import load_evaluation_images
    from moh.training.images.sources import every_nth

    columns = {"image_column": arguments.image_column, "label_column": arguments.label_column}
    images = load_evaluation_images(arguments.images, eval_split=arguments.split, **columns)
    return every_nth(images, arguments.max_images)


def run_eval(arguments: Namespace) -> None:
    """Top-1 and more of a classifier."""
    from moh.evaluation import evaluate_images
    from moh.models.image_loading import load_image_classifier
    from moh.models.loading import default_device

    model = load_image_classifier(arguments.model, device=default_device())
    images = _images(arguments)
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


def run_inspect(arguments: Namespace) -> None:
    """Head load per class: table and pictures."""
    from moh.cli.commands import check_targets
    from moh.cli.pages import write_image_page
    from moh.inspection import class_head_load
    from moh.inspection.class_plots import plot_class_load
    from moh.inspection.plots import plot_head_load, save
    from moh.models.image_loading import load_image_classifier
    from moh.models.loading import default_device

    check_targets(arguments)
    model = load_image_classifier(arguments.model, device=default_device())
    images = _images(arguments)
    if arguments.html is not None:
        write_image_page(arguments, model, images)
    if arguments.out is None:
        return
    out = Path(arguments.out)
    load = class_head_load(model, images, batch_size=arguments.batch_size, workers=arguments.workers)
    figure = plot_class_load(load, classes=arguments.classes)
    mean = load.mean()
    out.mkdir(parents=True, exist_ok=True)
    load.save_csv(out / "class_head_load.csv")
    mean.save_csv(out / "head_load.csv")
    for suffix in ("png", "svg"):
        save(figure, out / f"class_head_load.{suffix}")
        save(plot_head_load(mean, title="Head load, mean over classes"), out / f"head_load.{suffix}")
    for layer, (share, config) in enumerate(zip(mean.share, mean.layers, strict=True)):
        routed = load.load[layer][load.images > 0][:, list(config.routed_indices)]
        spread = (
            f"a class's load of a routed head {routed.min():.2f} to {routed.max():.2f}"
            if routed.numel()
            else "all shared"
        )
        print(f"layer {layer:3d}: {100 * share:3.0f} % of the heads used; {spread}")
    print(f"{out}: class_head_load and head_load, each as .csv, .png and .svg ({int(load.images.sum()):,} images)")
