"""Class-conditional image generation from scratch on Fashion-MNIST: MoH-DiT at two shares of heads against the dense DiT.

    python experiments/fashion_mnist_diffusion.py --out docs/results --jobs 2

Every variant is trained in pixel space with the same data, steps and seeds, then draws images with guidance off and on;
the Frechet distance uses the features of a classifier that this script trains on the same set, so it is not an FID.
Finished runs are kept under `--runs`, so that the script can be stopped and started again. Writes
`fashion_mnist_diffusion.json`, `.md` and a picture of samples. Needs the extra `diffusion`; more `--steps`, with a
`--name` of their own, give better pictures.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from result_names import command, results_name

from moh._files import write_text

NAME = "fashion_mnist_diffusion"
SIZES = dict(num_layers=4, hidden_size=64, num_attention_heads=8, attention_head_dim=8)
GUIDANCE = (1.0, 1.5)
BATCH = 32
LEARNING_RATE = 5e-3  # 1e-3 leaves so narrow a model far from trained after so few steps

# name -> (label, preset, shared heads and active routed heads of each layer; the last layer uses all, as published)
VARIANTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "dense": ("dense", "dit_micro_4", {}),
    "moh_90": ("MoH, 90 %", "moh_dit_micro_4_90", dict(shared_heads=[4, 4, 4, 8], active_heads=[3, 3, 3, 0])),
    "moh_75": ("MoH, 75 %", "moh_dit_micro_4_75", dict(shared_heads=[4, 4, 4, 8], active_heads=[1, 1, 2, 0])),
    # the paper's ablation of shared heads and of the first stage (table 5), not among the defaults
    "shared_75": ("shared heads, one stage, 75 %", "moh_dit_micro_4_75",
                  dict(router="single_stage", shared_heads=[4, 4, 4, 8], active_heads=[1, 1, 2, 0])),
    "routed_75": ("no shared heads, 75 %", "moh_dit_micro_4_75",
                  dict(shared_heads=[0, 0, 0, 8], active_heads=[5, 5, 6, 0])),
}  # fmt: skip
DEFAULT = ("dense", "moh_90", "moh_75")
DEFAULTS: dict[str, Any] = {  # of what changes results
    "variants": list(DEFAULT), "seeds": [0, 1, 2], "steps": 5000, "samples": 5000, "denoising_steps": 15
}  # fmt: skip
CLASSIFIER = "classifier"


def main() -> None:
    """Run what is missing, then write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--runs", type=Path, default=Path("runs") / NAME, help="finished runs (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=DEFAULTS["seeds"])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=DEFAULTS["variants"], metavar="VARIANT",
                        help=f"{', '.join(VARIANTS)} (default: %(default)s)")  # fmt: skip
    parser.add_argument("--name", help=f"of the results' files (default: {NAME}; needed with other options)")
    parser.add_argument(
        "--steps", type=int, default=DEFAULTS["steps"], help=f"optimiser steps of {BATCH} images (default: %(default)s)"
    )
    parser.add_argument(
        "--samples", type=int, default=DEFAULTS["samples"], help="drawn images per model (default: %(default)s)"
    )
    parser.add_argument("--denoising-steps", type=int, default=DEFAULTS["denoising_steps"],
                        help="of DPM-Solver++ (default: %(default)s)")  # fmt: skip
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each")
    parser.add_argument("--one", nargs=2, metavar=("VARIANT", "SEED"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.runs /= f"{options.steps}-steps-{options.samples}x{options.denoising_steps}" if not options.one else ""
    if options.one:
        variant, seed = options.one
        train_classifier(options.runs) if variant == CLASSIFIER else run_one(variant, int(seed), options)
        return
    options.name = results_name(parser, options, DEFAULTS, default=NAME)
    todo = [(v, s) for s in options.seeds for v in options.variants if not result_file(options.runs, v, s).exists()]
    arguments = ["--runs", options.runs, "--steps", options.steps, "--samples", options.samples]
    arguments += ["--denoising-steps", options.denoising_steps, "--one"]
    done = 0

    def run(job: tuple[str, int]) -> None:
        nonlocal done
        command = [sys.executable, __file__, *map(str, arguments), job[0], str(job[1])]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        done += 1
        print(f"{done} of {len(todo)}: {job[0]}, seed {job[1]}", flush=True)

    if not (options.runs / CLASSIFIER / "model").is_dir():
        subprocess.run([sys.executable, __file__, "--runs", str(options.runs), "--one", CLASSIFIER, "0"], check=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(run, todo))
    report(options)


def result_file(runs: Path, variant: str, seed: int) -> Path:
    return runs / f"{variant}-{seed}.json"


def train_classifier(runs: Path) -> None:
    """The classifier whose features the distance is taken on: a small dense vision transformer."""
    from moh.data.images.recipe import AugmentationRecipe, ImageDataRecipe
    from moh.training import train
    from moh.training.images.recipe import ImageModelRecipe, ImageRecipe, ImageTrainingRecipe

    train(
        ImageRecipe(
            model=ImageModelRecipe("moh_vit_micro_patch4_28_dense", kwargs=dict(in_chans=1, patch_size=7, depth=4)),
            data=ImageDataRecipe("fashion-mnist"),
            augmentation=AugmentationRecipe(crop_padding=2, label_smoothing=0.1),
            training=ImageTrainingRecipe(
                output_dir=str(runs / CLASSIFIER),
                epochs=3,
                learning_rate=2e-3,
                warmup_epochs=0.2,
                precision="fp32",
                logging_steps=100,
                extra={"disable_tqdm": True},
            ),
        )
    )


def run_one(variant: str, seed: int, options: argparse.Namespace) -> None:
    """Train one model, draw images with it, score them and write the figures."""
    import torch

    from moh.data.images.datasets import load_evaluation_images
    from moh.evaluation.generation import load_classifier, reference_features, score_images
    from moh.sampling import SamplingSettings, image_grid, sample, write_png
    from moh.training import train
    from moh.training.diffusion.data import PixelDataset
    from moh.training.diffusion.recipe import (
        DiffusionDataRecipe,
        DiffusionModelRecipe,
        DiffusionRecipe,
        DiffusionTrainingRecipe,
    )

    torch.set_num_threads(1)
    _, preset, heads = VARIANTS[variant]
    recipe = DiffusionRecipe(
        model=DiffusionModelRecipe(preset, overrides=SIZES | heads),
        data=DiffusionDataRecipe("fashion-mnist", image_size=28, flip=False),  # shoes point to the left
        training=DiffusionTrainingRecipe(
            output_dir=str(options.runs / f"{variant}-{seed}"),
            max_steps=options.steps,
            learning_rate=LEARNING_RATE,
            warmup_steps=0.05,
            lr_scheduler_type="cosine",
            per_device_train_batch_size=BATCH,
            max_grad_norm=1.0,
            ema_decay=0.999,
            ema_warmup=True,
            seed=seed,
            precision="fp32",
            logging_steps=100,
            save_steps=1000,
            save_total_limit=1,
            extra={"disable_tqdm": True},
        ),
    )
    start = time.perf_counter()
    trained = train(recipe)
    minutes = (time.perf_counter() - start) / 60
    extractor = load_classifier(options.runs / CLASSIFIER / "model")
    extractor.name = "a classifier of Fashion-MNIST"
    test = PixelDataset(load_evaluation_images("fashion-mnist"), 28)
    reference = reference_features(test.pixels(list(range(len(test)))), extractor, progress=False)
    scores = {}
    labels = [i % 10 for i in range(options.samples)]
    for guidance in GUIDANCE:
        settings = SamplingSettings("dpm++", options.denoising_steps, guidance=guidance, seed=seed)
        images = sample(trained.model, labels, settings, batch_size=100)
        scores[str(guidance)] = score_images(images, reference, extractor, progress=False).to_dict()
        write_png(options.runs / f"{variant}-{seed}-{guidance}.png", image_grid(images[:40], columns=10))
    transformer = trained.model.transformer
    result = {
        "variant": variant,
        "seed": seed,
        "parameters": sum(p.numel() for p in transformer.parameters()),
        "share": getattr(transformer, "share", 1.0),
        "minutes": minutes,
        "losses": trained.losses,
        "scores": scores,
    }
    write_text(result_file(options.runs, variant, seed), json.dumps(result))


def report(options: argparse.Namespace) -> None:
    """Write JSON, Markdown and the picture of all runs."""
    import torch

    from moh.evaluation import cpu_name

    runs = {
        name: [json.loads(result_file(options.runs, name, seed).read_text()) for seed in options.seeds]
        for name in options.variants
    }
    settings = {"cpu": cpu_name(), "torch": torch.__version__, "steps": options.steps, "seeds": options.seeds,
                "samples": options.samples, "denoising_steps": options.denoising_steps}  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    write_text(
        options.out / f"{options.name}.json", json.dumps(settings | {"model": SIZES, "runs": runs}, indent=1) + "\n"
    )
    write_text(options.out / f"{options.name}.md", markdown(runs, settings, options.name))
    picture(options.runs, options.variants, options.seeds[0], options.out.parent / "images" / f"{options.name}.png")
    print(options.out / f"{options.name}.md")


def markdown(runs: dict[str, list[dict[str, Any]]], settings: dict[str, Any], name: str = NAME) -> str:
    """The results page."""
    made = {"variants": list(runs), **{key: settings[key] for key in DEFAULTS if key != "variants"}, "name": name}
    lines = [
        "# Fashion-MNIST: image generation from scratch",
        "",
        f"Made by `{command(f'{NAME}.py', made, DEFAULTS | {'name': NAME})}`. A class-conditional DiT in pixel space: "
        f"{SIZES['num_layers']} layers, width {SIZES['hidden_size']}, {SIZES['num_attention_heads']} heads, patches of 4 "
        f"pixels (49 tokens); {settings['steps']:,} steps of {BATCH} images, AdamW with a learning rate that falls from "
        f"{LEARNING_RATE} by a cosine, hybrid loss, label dropout 0.1, moving average of the weights, balance loss 0.01. "
        "Data, steps and seeds are the same for all; MoH models also have their routers' parameters. "
        f"{settings['samples']:,} images per model, DPM-Solver++ with {settings['denoising_steps']} steps. "
        f"{len(settings['seeds'])} seeds; {settings['cpu']}, one thread per run, torch {settings['torch']}.",
        "",
        "Frechet distance on the features of a small classifier of the set, against the 10,000 test images: lower is "
        "better, and it is *not comparable with FID*. Mean ± standard deviation over seeds"
        + ("; the difference to dense is taken seed by seed" if "dense" in runs else "")
        + ". The loss is the mean of the last tenth of the training steps; for MoH models it includes the "
        "balance loss.",
    ]
    for guidance in GUIDANCE:
        lines += [
            "",
            f"## Guidance {guidance}" + (" (off)" if guidance == 1 else ""),
            "",
            "| model | heads used | parameters | training loss | Frechet distance | difference to dense | precision | recall |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
            *(row(variant, runs, str(guidance)) for variant in runs),
        ]
    lines += [
        "",
        "## Samples",
        "",
        "The first seed, one column per class; every model starts from the same noise.",
        "",
        f"![Samples by {'; '.join(VARIANTS[variant][0] for variant in runs)}; guidance off and on](../images/{name}.png)",
    ]
    return "\n".join(lines) + "\n"


def row(name: str, runs: dict[str, list[dict[str, Any]]], guidance: str) -> str:
    def values(of: str, key: str) -> list[float]:
        return [run["scores"][guidance][key] for run in runs[of]]

    distances = values(name, "frechet_distance")
    difference = "–"
    if name != "dense" and "dense" in runs:
        pairs = zip(distances, values("dense", "frechet_distance"), strict=True)
        difference = plus_minus([a - b for a, b in pairs], sign="+")
    losses = [mean(loss for _, loss in run["losses"][-max(1, len(run["losses"]) // 10) :]) for run in runs[name]]
    cells = [
        VARIANTS[name][0],
        f"{100 * runs[name][0]['share']:.0f} %",
        f"{runs[name][0]['parameters']:,}",
        plus_minus(losses, digits=4),
        plus_minus(distances),
        difference,
        plus_minus(values(name, "classifier_precision")),
        plus_minus(values(name, "classifier_recall")),
    ]
    return "| " + " | ".join(cells) + " |"


def plus_minus(values: list[float], sign: str = "", digits: int = 2) -> str:
    average = f"{mean(values):{sign}.{digits}f}"
    return f"{average} ± {stdev(values):.{digits}f}" if len(values) > 1 else average


def picture(runs: Path, variants: list[str], seed: int, path: Path) -> None:
    """The grids of all variants under each other."""
    from matplotlib.figure import Figure
    from matplotlib.image import imread

    from moh.inspection.plots import save

    figure = Figure(figsize=(8, 0.5 + 1.7 * len(variants)), layout="constrained")
    for axes, (name, guidance) in zip(
        figure.subplots(len(variants), len(GUIDANCE)).flat, [(n, g) for n in variants for g in GUIDANCE], strict=True
    ):
        axes.imshow(imread(runs / f"{name}-{seed}-{guidance}.png"), cmap="gray")
        axes.set_title(f"{VARIANTS[name][0]}, guidance {guidance}", fontsize=9)
        axes.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    save(figure, path)


if __name__ == "__main__":
    main()
