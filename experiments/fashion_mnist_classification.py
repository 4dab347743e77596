"""Image classification from scratch on Fashion-MNIST: MoH at three shares of heads, dense attention, the ablation.

    python experiments/fashion_mnist_classification.py --out docs/results --jobs 2

Every variant is trained with the same data, steps, augmentation and seeds; each finished run is kept under `--runs`, so
that the script can be stopped and started again. Writes `fashion_mnist_classification.json`, `.md` and a picture.
Needs the extra `vision`; about 40 minutes on two slow cores. `--epochs 10 --name NAME` gives
steadier numbers.
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
from moh.data.images.datasets import load_images
from moh.data.images.recipe import ImageDataRecipe

NAME = "fashion_mnist_classification"
HEADS, DEPTH = 10, 4
MODEL = dict(img_size=28, patch_size=7, in_chans=1, embed_dim=80, depth=DEPTH, num_heads=HEADS)

# name -> (label, router or None for dense, shared heads, active routed heads of each layer)
VARIANTS: dict[str, tuple[str, str | None, int, list[int]]] = {
    "dense": ("dense", None, HEADS, [0] * DEPTH),
    "moh_90": ("MoH, 90 %", "two_stage", 2, [7] * DEPTH),
    "moh_75": ("MoH, 75 %", "two_stage", 2, [5, 6, 5, 6]),
    "moh_50": ("MoH, 50 %", "two_stage", 2, [3] * DEPTH),
    "shared_50": ("shared heads, one stage, 50 %", "single_stage", 2, [3] * DEPTH),
    "routed_50": ("no shared heads, 50 %", "two_stage", 0, [5] * DEPTH),
    "gates": ("gates, 100 %", "two_stage", 2, [8] * DEPTH),  # not among the defaults
}
DEFAULT = ("dense", "moh_90", "moh_75", "moh_50", "shared_50", "routed_50")
DEFAULTS: dict[str, Any] = {"variants": list(DEFAULT), "seeds": [0, 1, 2], "epochs": 3.0}  # of what changes results
ABLATION = ("routed_50", "shared_50", "moh_50")


def main() -> None:
    """Run what is missing, then write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--runs", type=Path, default=Path("runs") / NAME, help="finished runs (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=DEFAULTS["seeds"])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=DEFAULTS["variants"], metavar="VARIANT",
                        help=f"{', '.join(VARIANTS)} (default: %(default)s)")  # fmt: skip
    parser.add_argument("--name", help=f"of the results' files (default: {NAME}; needed with other options)")
    parser.add_argument("--epochs", type=float, default=DEFAULTS["epochs"])
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each")
    parser.add_argument("--one", nargs=2, metavar=("VARIANT", "SEED"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.runs /= f"{options.epochs:g}-epochs" if not options.one else ""
    if options.one:
        variant, seed = options.one
        run_one(variant, int(seed), options.epochs, options.runs)
        return
    options.name = results_name(parser, options, DEFAULTS, default=NAME)
    todo = [(v, s) for s in options.seeds for v in options.variants if not result_file(options.runs, v, s).exists()]
    command = [sys.executable, __file__, "--runs", str(options.runs), "--epochs", str(options.epochs), "--one"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = 0
    load_images(ImageDataRecipe("fashion-mnist"))  # fetched once, not by every run

    def run(job: tuple[str, int]) -> None:
        nonlocal done
        subprocess.run([*command, job[0], str(job[1])], check=True, env=environment)
        done += 1
        print(f"{done} of {len(todo)}: {job[0]}, seed {job[1]}", flush=True)

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(run, todo))
    report(options)


def result_file(runs: Path, variant: str, seed: int) -> Path:
    return runs / f"{variant}-{seed}.json"


def run_one(variant: str, seed: int, epochs: float, runs: Path) -> None:
    """Train one model, evaluate it and write its figures."""
    import torch

    from moh.data.images.datasets import load_images
    from moh.data.images.recipe import AugmentationRecipe, ImageDataRecipe
    from moh.evaluation.images import evaluate_images
    from moh.training import train
    from moh.training.images.recipe import ImageModelRecipe, ImageRecipe, ImageTrainingRecipe

    torch.set_num_threads(1)
    _, router, shared, active = VARIANTS[variant]
    if router is None:
        name, heads = "moh_vit_micro_patch4_28_dense", {}
    else:
        name, heads = "moh_vit_micro_patch4_28_50", dict(router=router, shared_heads=shared, active_heads=active)
    recipe = ImageRecipe(
        model=ImageModelRecipe(name, kwargs=MODEL | heads),
        data=ImageDataRecipe("fashion-mnist"),
        augmentation=AugmentationRecipe(crop_padding=2, hflip=0.5, label_smoothing=0.1),
        training=ImageTrainingRecipe(
            output_dir=str(runs / f"{variant}-{seed}"),
            epochs=epochs,
            learning_rate=2e-3,
            warmup_epochs=0.2,
            weight_decay=0.05,
            per_device_train_batch_size=128,
            balance_loss_coef=0.01,
            seed=seed,
            precision="fp32",
            logging_steps=50,
            save_steps=500,
            save_total_limit=1,
            extra={"disable_tqdm": True},
        ),
    )
    start = time.perf_counter()
    trained = train(recipe)
    seconds = time.perf_counter() - start
    _, test = load_images(recipe.data)
    scores = evaluate_images(trained.model, test, progress=False)
    result = {
        "variant": variant,
        "seed": seed,
        "parameters": sum(p.numel() for p in trained.model.parameters()),
        "top1": scores.top1,
        "top5": scores.top5,
        "per_class": scores.per_class,
        "share": scores.share,
        "minutes": seconds / 60,
        "losses": trained.losses,
    }
    write_text(result_file(runs, variant, seed), json.dumps(result))


def report(options: argparse.Namespace) -> None:
    """Write JSON, Markdown and the picture of all runs."""
    import torch

    from moh.evaluation import cpu_name

    runs = {
        name: [json.loads(result_file(options.runs, name, seed).read_text()) for seed in options.seeds]
        for name in options.variants
    }
    settings = {"cpu": cpu_name(), "torch": torch.__version__, "epochs": options.epochs, "seeds": options.seeds}
    options.out.mkdir(parents=True, exist_ok=True)
    write_text(
        options.out / f"{options.name}.json", json.dumps(settings | {"model": MODEL, "runs": runs}, indent=1) + "\n"
    )
    write_text(options.out / f"{options.name}.md", markdown(runs, settings, options.name))
    images = options.out.parent / "images"
    picture(runs, images / f"{options.name}.png")
    if "moh_50" in runs:
        head_picture(options.runs / f"moh_50-{options.seeds[0]}" / "model", images / f"{options.name}_heads.png")
    print(options.out / f"{options.name}.md")


def markdown(runs: dict[str, list[dict[str, Any]]], settings: dict[str, Any], name: str = NAME) -> str:
    """The results page."""
    seeds, first = settings["seeds"], next(iter(runs.values()))[0]
    made = {"variants": list(runs), "seeds": seeds, "epochs": settings["epochs"], "name": name}
    ablation = all(variant in runs for variant in ABLATION)
    steps = first["losses"][-1][0]
    lines = [
        "# Fashion-MNIST: image classification from scratch",
        "",
        f"Made by `{command(f'{NAME}.py', made, DEFAULTS | {'name': NAME})}`. A vision transformer of "
        f"{DEPTH} layers, width {MODEL['embed_dim']}, {HEADS} heads, patches of {MODEL['patch_size']} pixels (16 tokens), "
        f"trained for {settings['epochs']:g} epochs of 60,000 images (about {steps:,} steps of 128) with random shifts, "
        "mirroring and label smoothing 0.1; balance loss 0.01. Data, steps, augmentation and seeds are the same for all; "
        "MoH models also have their routers' parameters. "
        f"{len(seeds)} seeds; {settings['cpu']}, one thread per run, torch {settings['torch']}.",
        "",
        "Top-1 on the 10,000 test images, in percent, mean ± standard deviation over seeds."
        + (" The difference to dense is taken seed by seed." if "dense" in runs else ""),
        "",
        "| model | heads used | parameters | top-1 | difference to dense | top-5 |",
        "| --- | --- | --- | --- | --- | --- |",
        *(row(variant, runs) for variant in runs if not ablation or variant not in ("shared_50", "routed_50")),
    ]
    if ablation:
        lines += [
            "",
            "## The paper's ablation, at 50 % of the heads",
            "",
            "| model | heads used | parameters | top-1 | difference to dense | top-5 |",
            "| --- | --- | --- | --- | --- | --- |",
            *(row(variant, runs) for variant in ABLATION),
        ]
    lines += [
        "",
        f"![Top-1 of every run](../images/{name}.png)",
        "",
        "## Per class",
        "",
        "Correctly classified test images of each class, in percent, mean over seeds.",
        "",
        "| class | " + " | ".join(VARIANTS[variant][0] for variant in runs) + " |",
        "| --- |" + " --- |" * len(runs),
    ]
    for label in first["per_class"]:
        cells = [f"{mean(run['per_class'][label] for run in of_variant):.1f}" for of_variant in runs.values()]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    if "moh_50" in runs:
        lines += [
            "",
            "## Which heads each class uses",
            "",
            "The model with 50 % of the heads, first seed, on the test images (`moh inspect` draws it for any checkpoint).",
            "",
            f"![Head load per class and layer](../images/{name}_heads.png)",
        ]
    return "\n".join(lines) + "\n"


def row(name: str, runs: dict[str, list[dict[str, Any]]]) -> str:
    ours, dense = runs[name], runs.get("dense")
    share = ours[0]["share"]
    difference = "–"
    if name != "dense" and dense is not None:
        difference = plus_minus([a["top1"] - b["top1"] for a, b in zip(ours, dense, strict=True)], sign="+")
    cells = [
        VARIANTS[name][0],
        "100 %" if share is None else f"{100 * share:.0f} %",
        f"{ours[0]['parameters']:,}",
        plus_minus([run["top1"] for run in ours]),
        difference,
        plus_minus([run["top5"] for run in ours]),
    ]
    return "| " + " | ".join(cells) + " |"


def plus_minus(values: list[float], sign: str = "") -> str:
    return f"{mean(values):{sign}.2f} ± {stdev(values):.2f}" if len(values) > 1 else f"{values[0]:{sign}.2f}"


def picture(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Every run as a dot, the mean as a bar."""
    from matplotlib.figure import Figure

    from moh.inspection.plots import save

    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    axes = figure.subplots()
    for index, name in enumerate(runs):
        values = [run["top1"] for run in runs[name]]
        colour = "#555555" if name == "dense" else "#d55e00" if name in ("shared_50", "routed_50") else "#0072b2"
        axes.plot([index] * len(values), values, "o", color=colour, alpha=0.6, markersize=6)
        axes.hlines(mean(values), index - 0.3, index + 0.3, color=colour, linewidth=2.5)
    axes.set_xticks(range(len(runs)), [VARIANTS[name][0].replace(", ", "\n") for name in runs], fontsize=8)
    axes.set_ylabel("top-1 on the test images (%)")
    axes.set_title("Fashion-MNIST: every run (dot) and the mean over seeds (line)", fontsize=10)
    axes.grid(axis="y", alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    save(figure, path)


def head_picture(model_dir: Path, path: Path) -> None:
    """Head load per class and layer of one of the models."""
    from moh.data.images.datasets import load_evaluation_images
    from moh.inspection import image_groups, inspect_groups
    from moh.inspection.group_plots import plot_group_load
    from moh.inspection.plots import save
    from moh.models.timm.loading import load_image_classifier

    model = load_image_classifier(model_dir)
    use = inspect_groups(model, image_groups(model, load_evaluation_images("fashion-mnist")))
    save(plot_group_load(use), path)


if __name__ == "__main__":
    main()
