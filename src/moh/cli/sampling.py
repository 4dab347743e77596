"""`moh sample`: draw images with a diffusion model."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moh.cli.loading import add_loading, device_of, refuse_device_map, revision
from moh.cli.options import add_command, add_json, add_output, print_result

if TYPE_CHECKING:
    from moh.cli.options import Commands

_HELP = "Draw images of given classes with a diffusion model; under torchrun the processes share the work."


def add_parser(sub: Commands) -> None:
    """Add `sample` to the commands."""
    parser = add_command(sub, "sample", _HELP, run)
    parser.add_argument(
        "model",
        metavar="CHECKPOINT",
        help="directory or hub name: model/ of a run, one of its checkpoints, or a diffusers model",
    )
    parser.add_argument("--classes", nargs="+", metavar="CLASS", default=[], help="names or ids (default: all)")
    parser.add_argument("--num", type=int, help="images in total, cycling through the classes (default: one per class)")
    parser.add_argument(
        "--random-classes",
        action="store_true",
        help="draw the class of every image at random, as published, not in turn",
    )
    add_output(parser, "write grid.png and images/*.png here", old="--out")
    parser.add_argument(
        "--npz", metavar="FILE", help="write all images as arrays, in the format of ADM's evaluation suite"
    )
    parser.add_argument("--guidance", type=float, default=1.0, help="scale; 1 is off (default: %(default)s)")
    parser.add_argument(
        "--guided-channels",
        type=int,
        metavar="N",
        help="guide the first N channels alone, as published: 3 of 4 latents",
    )
    parser.add_argument("--steps", type=int, default=50, help="denoising steps (default: %(default)s)")
    parser.add_argument(
        "--scheduler", choices=("ddim", "ddpm", "dpm++"), default="ddim", help="sampler (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="image i of a seed is always the same (default: %(default)s)"
    )
    parser.add_argument(
        "--batch-size", type=int, default=64, help="images at a time per process (default: %(default)s)"
    )
    parser.add_argument(
        "--vae", metavar="DIR", help="AutoencoderKL that decodes latents (default: the checkpoint's own)"
    )
    add_json(parser)
    add_loading(parser, dtype="of the transformer")


def run(arguments: Namespace) -> None:
    from moh._files import check_writable

    out = None if arguments.output is None else Path(arguments.output)
    npz = None if arguments.npz is None else Path(arguments.npz)
    if out is None and npz is None:
        raise ValueError("--output DIR or --npz FILE must be given for the images")
    for name, target in (("--output", out), ("--npz", npz if npz is None else npz.parent)):
        if target is not None:
            check_writable(target, name=name)
    if arguments.num is not None and arguments.num < 1:
        raise ValueError(f"--num must be at least 1, got {arguments.num}")

    import torch

    from moh._processes import processes
    from moh.data.seeds import generator_of
    from moh.sampling import SamplingSettings, load_image_model, sample_to_files

    settings = SamplingSettings(
        scheduler=arguments.scheduler,
        steps=arguments.steps,
        guidance=arguments.guidance,
        seed=arguments.seed,
        guided_channels=arguments.guided_channels,
    )
    refuse_device_map(arguments, arguments.model)
    model = load_image_model(arguments.model, vae=arguments.vae, **revision(arguments))
    classes = model.class_ids(arguments.classes) if arguments.classes else list(range(model.num_classes))
    count = len(classes) if arguments.num is None else arguments.num
    places: Sequence[int] = range(count)
    if arguments.random_classes:
        places = torch.randint(len(classes), (count,), generator=generator_of(arguments.seed, -1)).tolist()
    labels = [classes[i % len(classes)] for i in places]
    dtype = None if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    with processes() as state:
        model.to(device=state.device if arguments.device is None else device_of(arguments), dtype=dtype)
        sample_to_files(model, labels, settings, out=out, npz=npz, batch_size=arguments.batch_size)
        if state.is_main_process:
            written = {"output": out, "npz": npz}
            figures = {name: None if path is None else str(path) for name, path in written.items()}
            text = f"{' and '.join(path for path in figures.values() if path is not None)}: {count:,} images"
            print_result(arguments, {**figures, "images": count}, [text])
