"""Do shared heads hold what is common? Shared against routed heads, each removed or frozen alone, group by group.

    python experiments/shared_heads.py

A MoH-ViT trained on Fashion-MNIST for 3 epochs (50 % of the heads, one model per seed) with classes as groups; and SmolLM2-135M
as `moh convert` makes it (75 % of the heads), with kinds of text as groups; there a seed draws the heads to compare, one of
either kind in every third routed layer. A head is removed (its gate is 0) or frozen (its mean output over all groups in its
place, for the tokens that use it). One file per seed, so that the script can be stopped and started again. Writes
`shared_heads.json` and `.md`. Needs the extras `vision` and `llm`; about half an hour on one core.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from fashion_mnist_classification import run_one
from result_names import command, results_name

import moh
from moh._files import write_text
from moh.config import MoHConfig
from moh.evaluation import cpu_name
from moh.inspection import GroupedInputs, HeadAblation, ablate_heads, image_groups, token_groups
from moh.inspection.tables import Row
from moh.inspection.trace import attention_layers

NAME = "shared_heads"
VARIANT, EPOCHS = "moh_50", 3.0
SEQ_LEN = 128
DRAWS = 1_000
DEFAULTS: dict[str, Any] = {  # of what changes results
    "models": ["images", "texts"], "seeds": [0, 1], "images": 1_000, "passages": 2,
    "texts": ["django-docs", "anarchism", "debian-handbook"],
}  # fmt: skip
LABELS = {
    "images": "MoH-ViT, 2 shared and 3 of 8 routed heads per layer, all heads of all 4 layers",
    "texts": "SmolLM2-135M, 2 shared heads of 9 per layer, 75 % in use, one head of either kind in every third routed layer",
}


def main() -> None:
    """Measure what is missing, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=LABELS, default=DEFAULTS["models"])
    parser.add_argument("--seeds", type=int, nargs="+", default=DEFAULTS["seeds"])
    parser.add_argument("--images", type=int, default=DEFAULTS["images"], help="test images (default: %(default)s)")
    parser.add_argument("--texts", nargs="+", default=DEFAULTS["texts"], help="held-out parts of corpora")
    parser.add_argument("--passages", type=int, default=DEFAULTS["passages"], help=f"of {SEQ_LEN} tokens, per text")
    parser.add_argument("--work", type=Path, default=Path("runs") / NAME, help="for models and seeds")
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--only", choices=("page",), help="write the page of what is finished")
    parser.add_argument("--name", help=f"of the results' files (default: {NAME}; needed with other options)")
    options = parser.parse_args()
    options.name = results_name(parser, options, DEFAULTS, default=NAME)
    options.work.mkdir(parents=True, exist_ok=True)
    for name in options.models:
        for seed in options.seeds:
            file = cell_file(options, name, seed)
            if not file.exists() and options.only != "page":
                write_text(file, json.dumps(measure(options, name, seed)) + "\n")
                print(file, flush=True)
    write(options)


def cell_file(options: argparse.Namespace, name: str, seed: int) -> Path:
    words = [options.images] if name == "images" else [options.passages, *options.texts]
    folder: Path = options.work
    return folder / ("-".join(map(str, [name, seed, *words])) + ".json")


def measure(options: argparse.Namespace, name: str, seed: int) -> dict[str, Any]:
    """Both ablations of one seed: the rise of each head in each group, and the load of the head."""
    model, inputs = (classifier if name == "images" else language_model)(options, seed)
    layers = attention_layers(model)
    heads = drawn([layer.config for layer in layers], seed if name == "texts" else None)
    loads: dict[str, list[torch.Tensor]] = {}
    for batch in inputs.batches():  # all of the same size
        with moh.record_routing(model) as routing, torch.no_grad():
            batch.run()
        for router, info in routing:
            loads.setdefault(router.removesuffix(".router"), []).append(info.active.float().flatten(0, -2).mean(0))
    load = {place: torch.stack(loads[layers[place].name]).mean(0).tolist() for place, _ in heads}
    found = {
        kind: ablate_heads(model, inputs, heads=heads, freeze=kind == "frozen", progress=False)
        for kind in ("removed", "frozen")
    }
    return {
        "seed": seed,
        "groups": list(inputs.names),
        "loss": found["removed"].loss,
        "units": found["removed"].units,
        "heads": [head_figures(found, layer, head, load[layer][head]) for layer, head in heads],
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def drawn(layers: Sequence[MoHConfig | None], seed: int | None) -> list[tuple[int, int]]:
    """(layer, head): all heads of layers that have both kinds; with a seed one of either kind in every third such layer."""
    both = [
        (place, layer)
        for place, layer in enumerate(layers)
        if layer is not None and layer.num_shared and layer.active_heads < layer.num_routed
    ]
    if seed is None:
        return [(place, head) for place, layer in both for head in range(layer.num_heads)]
    generator = torch.Generator().manual_seed(seed)
    return [
        (place, kind[int(torch.randint(len(kind), (), generator=generator))])
        for place, layer in both[::3]
        for kind in (layer.shared_indices, layer.routed_indices)
    ]


def head_figures(found: dict[str, HeadAblation], layer: int, head: int, load: float) -> Row:
    kind = found["removed"].layers[layer].kind(head)
    rises = {name: ablation.of_groups[layer][:, head].tolist() for name, ablation in found.items()}
    return {"layer": layer, "head": head, "kind": kind, "load": load, **rises}  # type: ignore[dict-item]


def classifier(options: argparse.Namespace, seed: int) -> tuple[Any, GroupedInputs]:
    """The trained MoH-ViT of a seed, and test images by class."""
    from moh.data.images.datasets import load_evaluation_images
    from moh.data.images.sources import every_nth
    from moh.models.timm.loading import load_image_classifier

    path = options.work / f"{VARIANT}-{seed}" / "model"
    if not path.is_dir():
        run_one(VARIANT, seed, EPOCHS, options.work)
    model = load_image_classifier(path).eval()
    images = every_nth(load_evaluation_images("fashion-mnist"), options.images)
    return model, image_groups(model, images, batch_size=500)


def language_model(options: argparse.Namespace, seed: int) -> tuple[Any, GroupedInputs]:
    """SmolLM2 converted by the command, without training, and held-out passages of each text; the same for all seeds."""
    from transformers import AutoModelForCausalLM

    from moh.cli.main import main as moh_command
    from moh.data.text.blocks import evenly_spread
    from moh.demo.base_model import default_base_model
    from moh.models.transformers.loading import load_tokenizer
    from moh.training import load_corpus, pack_tokens

    path = options.work / "SmolLM2"
    if not path.is_dir():
        moh_command(["convert", str(default_base_model()), str(path)])
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path).eval(), load_tokenizer(path)
    corpora = {name: load_corpus(name) for name in options.texts}
    packed_heldout = {name: pack_tokens(c.heldout, tokenizer, seq_len=SEQ_LEN) for name, c in corpora.items()}
    blocks = {name: evenly_spread(b, options.passages) for name, b in packed_heldout.items()}
    return model, token_groups(model, blocks, batch_size=2)


def write(options: argparse.Namespace) -> None:
    """Write the figures and the page of the seeds that are finished."""
    files = {name: [cell_file(options, name, seed) for seed in options.seeds] for name in options.models}
    cells = {
        name: [json.loads(file.read_text(encoding="utf-8")) for file in of_model if file.exists()]
        for name, of_model in files.items()
        if any(file.exists() for file in of_model)
    }
    if not cells:
        raise SystemExit(f"no seed is finished in {options.work} yet")
    options.out.mkdir(parents=True, exist_ok=True)
    write_text(options.out / f"{options.name}.json", json.dumps(cells) + "\n")
    made = {name: getattr(options, name) for name in DEFAULTS} | {"name": options.name}
    write_text(options.out / f"{options.name}.md", "\n".join(page(cells, made)) + "\n")
    print(options.out / f"{options.name}.md")


def page(cells: dict[str, list[dict[str, Any]]], made: dict[str, Any]) -> list[str]:
    """The page: a table per model, of the heads of all of its seeds."""
    first = next(iter(cells.values()))[0]
    seeds = {name: [cell["seed"] for cell in of_model] for name, of_model in cells.items()}
    left = [f"{name} {seed}" for name in made["models"] for seed in made["seeds"] if seed not in seeds.get(name, [])]
    unfinished = f" (not finished: {', '.join(left)})" if left else ""
    lines = [
        "# Do shared heads hold what is common?",
        "",
        f"Made by `{command(f'{NAME}.py', made, DEFAULTS | {'name': NAME})}`"
        f"{unfinished}; {first['cpu']}, {first['threads']} thread, torch "
        f"{first['torch']}. Each head is removed, or frozen at its mean output over all groups, alone; the rise of the loss is "
        "measured in every group ([how](../inspection.md#what-the-numbers-are)). ± is the standard error over heads (bootstrap).",
        "",
        "- *rise*: loss without the head minus loss, 1/1000 nats, mean over groups. *per use*: the same divided by the head's "
        "load, as a routed head that few tokens use can't cost much.",
        "- *constant*: the part of the rise that a frozen head does not have, sums over heads: what its mean output alone is "
        "worth, the same for all inputs.",
        "- *uneven*: standard deviation of the rise over the groups, relative to its mean, sums over heads: 0 if every group "
        "needs the head alike. The groups' few inputs add to it.",
    ]
    for name, seeds in cells.items():
        about = f"Groups: {', '.join(seeds[0]['groups'])}; {seeds[0]['units']:,} inputs"
        done = ", ".join(str(cell["seed"]) for cell in seeds)
        lines += ["", f"## {LABELS[name]}", "", f"{about}; seed{'s' * (len(seeds) > 1)} {done}.", ""]
        lines += ["| heads | rise | per use | constant | uneven |", "| --- | --- | --- | --- | --- |"]
        figures = {}
        for kind in ("shared", "routed"):
            own = [head for head in different(name, seeds) if head["kind"] == kind and head["load"] > 0]
            figures[kind] = list(zip(summary(own), errors(own), strict=True))
            lines.append(f"| {kind}, {len(own)} | " + " | ".join(f"{v:.2f} ± {e:.2f}" for v, e in figures[kind]) + " |")
        pairs = zip(*figures.values(), strict=True)
        differences = [f"{a - b:+.2f} ± {math.hypot(da, db):.2f}" for (a, da), (b, db) in pairs]
        lines.append("| shared − routed | " + " | ".join(differences) + " |")
    return lines


def different(name: str, seeds: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The heads of all seeds, each of them once: a seed of the texts draws from the same model, and may draw a head again."""
    found: dict[tuple[int, ...], dict[str, Any]] = {}
    for cell in seeds:
        for head in cell["heads"]:
            found.setdefault((cell["seed"] if name == "images" else 0, head["layer"], head["head"]), head)
    return list(found.values())


def summary(heads: Sequence[dict[str, Any]]) -> list[float]:
    """Rise, rise per use, constant and uneven part of some heads."""
    rises = [mean(head["removed"]) for head in heads]
    uses = [rise / head["load"] for rise, head in zip(rises, heads, strict=True)]
    frozen = sum(mean(head["frozen"]) for head in heads)
    spread = sum(stdev(head["removed"]) for head in heads)
    return [1000 * mean(rises), 1000 * mean(uses), 1 - frozen / sum(rises), spread / sum(rises)]


def errors(heads: Sequence[dict[str, Any]]) -> list[float]:
    """Standard error of each figure of `summary`, over heads drawn again with replacement.

    Half of the width of the middle 68 % of the draws: a sum of rises near 0 makes single draws of a part huge.
    """
    generator = random.Random(0)
    draws = [summary(generator.choices(heads, k=len(heads))) for _ in range(DRAWS)]
    middle = [
        (sorted(values)[int(0.16 * DRAWS)], sorted(values)[int(0.84 * DRAWS)]) for values in zip(*draws, strict=True)
    ]
    return [(high - low) / 2 for low, high in middle]


if __name__ == "__main__":
    main()
