"""Does a gradient for inactive heads help? The paper's straight-through gradient against ours, on SmolLM2-135M.

    python experiments/inactive_gates.py

The paper's router (norms of the queries, 4 shared heads and 3 of the 5 others); only the projections of queries, by which it
routes, and of outputs are tuned, on the same tokens in the same order for both. With `--router linear` the router of
`moh.convert`, which is tuned too. One file per run, so that the script can be stopped and started again; a run in between resumes
from its last checkpoint. Writes `inactive_gates.json` and `.md`. Needs the extra `llm`; about 8 minutes per run on one core.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from result_names import command, results_name
from torch import Tensor
from transformers.utils.logging import set_verbosity_error

import moh
from moh._files import write_text
from moh.data.text.blocks import evenly_spread
from moh.demo.base_model import default_base_model
from moh.evaluation import cpu_name, perplexity
from moh.models.transformers.loading import load_causal_lm, load_tokenizer
from moh.training import load_corpus, pack_tokens, train
from moh.training.language.recipe import ConversionRecipe, ModelRecipe, Recipe, TrainingRecipe

NAME = "inactive_gates"
GRADIENTS = ("zero", "dense")
SHARED, ACTIVE = 4, 3
TUNED = ("q_proj", "o_proj", "router")
SEQ_LEN, BATCH = 512, 1
DEFAULTS: dict[str, Any] = {  # of what changes results
    "router": "query_norm", "seeds": [0, 1, 2], "steps": 100, "learning_rate": 3e-4,
    "texts": ["django-docs", "anarchism"], "heldout_tokens": 4_096,
}  # fmt: skip


def main() -> None:
    """Run what is missing, then write the page of all seeds that have both runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--router", choices=("query_norm", "linear"), default=DEFAULTS["router"])
    parser.add_argument("--seeds", type=int, nargs="+", default=DEFAULTS["seeds"])
    parser.add_argument("--steps", type=int, default=DEFAULTS["steps"], help=f"of {BATCH} x {SEQ_LEN} tokens")
    parser.add_argument("--learning-rate", type=float, default=DEFAULTS["learning_rate"])
    parser.add_argument("--texts", nargs=2, default=DEFAULTS["texts"], help="the first is tuned on, both are measured")
    parser.add_argument("--heldout-tokens", type=int, default=DEFAULTS["heldout_tokens"], help="of each text")
    parser.add_argument("--work", type=Path, default=Path("runs") / NAME, help="finished runs (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--name", help=f"of the results' files (default: {NAME}; needed with other options)")
    options = parser.parse_args()
    options.name = results_name(parser, options, DEFAULTS, default=NAME)
    set_verbosity_error()
    for seed in options.seeds:
        for gradient in GRADIENTS:
            file = cell_file(options, gradient, seed)
            if not file.exists():
                write_text(file, json.dumps(run(options, gradient, seed)) + "\n")
            print(file, flush=True)
    write(options)


def cell_file(options: argparse.Namespace, gradient: str, seed: int) -> Path:
    words = (options.router, gradient, seed, options.steps, f"{options.learning_rate:g}", options.heldout_tokens)
    folder: Path = options.work
    return folder / ("-".join(map(str, (*words, *options.texts))) + ".json")


def run(options: argparse.Namespace, gradient: str, seed: int) -> dict[str, Any]:
    """Convert, measure, tune and measure again."""
    path = default_base_model()
    tokenizer = load_tokenizer(path)
    corpora = {name: load_corpus(name) for name in options.texts}
    blocks = pack_tokens(corpora[options.texts[0]].train, tokenizer, seq_len=SEQ_LEN)
    heldout = {
        name: evenly_spread(pack_tokens(c.heldout, tokenizer, seq_len=SEQ_LEN), options.heldout_tokens // SEQ_LEN)
        for name, c in corpora.items()
    }
    model = convert(options.router, load_causal_lm(path, dtype=torch.float32), blocks)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name.split(".") for part in TUNED))
    folder = cell_file(options, gradient, seed).with_suffix("")
    begun = (folder / "untuned.json").exists()
    folder.mkdir(parents=True, exist_ok=True)
    if not begun:
        write_text(folder / "untuned.json", json.dumps(losses(model, heldout)))
    recipe = Recipe(
        model=ModelRecipe(str(path)),
        conversion=ConversionRecipe(
            router=options.router, shared_heads=SHARED, active_heads=ACTIVE, inactive_gate_gradient=gradient
        ),
        training=TrainingRecipe(
            output_dir=str(folder / "run"),
            max_steps=options.steps,
            learning_rate=options.learning_rate,
            warmup_steps=0.05,
            per_device_train_batch_size=BATCH,
            precision="fp32",
            balance_loss_coef=0.01,
            seed=seed,
            save_steps=20,
            save_total_limit=1,
            extra={"disable_tqdm": True, "report_to": []},
        ),
    )
    start = time.process_time()
    result = train(recipe, model=model, tokenizer=tokenizer, train_blocks=blocks)
    seconds = time.process_time() - start
    cell = {
        "gradient": gradient,
        "seed": seed,
        "untuned": json.loads((folder / "untuned.json").read_text(encoding="utf-8")),
        "tuned": losses(result.model, heldout),
        "cpu_seconds": None if result.resumed_from else seconds,  # a resumed run's first part is not in it
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    shutil.rmtree(folder)
    return cell


def convert(router: str, dense: Any, blocks: Tensor) -> Any:
    """The MoH model that is tuned: the paper's rule needs no calibration, `linear` is fitted to some of the text."""
    kwargs: dict[str, Any] = dict(router=router, shared_heads=SHARED, active_heads=ACTIVE, allocation="even")
    if router != "query_norm":
        kwargs["calibration"] = evenly_spread(blocks, 24)
    return moh.convert(dense, **kwargs)


def losses(model: Any, heldout: dict[str, Tensor]) -> dict[str, list[float]]:
    """Loss of each held-out block."""
    return {name: list(perplexity(model, b, batch_size=2, progress=False).block_losses) for name, b in heldout.items()}


def write(options: argparse.Namespace) -> None:
    """Write the table of the seeds that have both runs."""
    files = {seed: [cell_file(options, gradient, seed) for gradient in GRADIENTS] for seed in options.seeds}
    cells = {
        seed: [json.loads(f.read_text(encoding="utf-8")) for f in found]
        for seed, found in files.items()
        if all(f.exists() for f in found)
    }
    options.out.mkdir(parents=True, exist_ok=True)
    write_text(options.out / f"{options.name}.json", json.dumps(list(cells.values()), indent=1) + "\n")
    made = {name: getattr(options, name) for name in DEFAULTS} | {"seeds": list(cells), "name": options.name}
    write_text(options.out / f"{options.name}.md", "\n".join(page(cells, made)) + "\n")
    print(options.out / f"{options.name}.md")


def page(cells: dict[int, list[dict[str, Any]]], made: dict[str, Any]) -> list[str]:
    """The page, of both runs of each seed."""
    first = next(iter(cells.values()))[0]
    texts, blocks = list(first["tuned"]), len(next(iter(first["tuned"].values())))
    seconds = [[cell["cpu_seconds"] for cell in pair] for pair in cells.values()]
    whole = [dense / zero for zero, dense in seconds if zero and dense]
    lines = [
        "# Does a gradient for inactive heads help?",
        "",
        f"Made by `{command(f'{NAME}.py', made, DEFAULTS | {'name': NAME})}`. SmolLM2-135M, router `{made['router']}`, "
        f"{SHARED} shared heads and {ACTIVE} of the 5 others; the projections of queries and outputs"
        + (" and the router" if made["router"] != "query_norm" else "")
        + f" are tuned for {made['steps']} steps of {BATCH * SEQ_LEN} tokens of {texts[0]} (learning rate "
        f"{made['learning_rate']:g}, float32, balance loss 0.01), the same tokens in the same order for both. Held-out "
        f"perplexity on {blocks * SEQ_LEN:,} tokens of each text; {first['cpu']}, {first['threads']} thread, torch "
        f"{first['torch']}.",
        "",
        "`zero` leaves inactive heads out of the backward pass, the default; `dense` computes them in training and gives "
        "their gates the gradient that they would have if active ([the equations](../method.md#the-straight-through-gradient)).",
        "",
        "| seed | gradient | " + " | ".join(texts) + " |",
        "| --- | --- |" + " --- |" * len(texts),
        "| – | untuned | " + " | ".join(_perplexity(first["untuned"][text]) for text in texts) + " |",
    ]
    for seed, pair in cells.items():
        for cell in pair:
            row = " | ".join(_perplexity(cell["tuned"][text]) for text in texts)
            lines.append(f"| {seed} | {cell['gradient']} | {row} |")
    lines += [
        "",
        "Loss with `dense` minus loss with `zero`, in percent of the perplexity: of each seed with its standard error over the "
        "blocks, and the mean of the seeds with its standard error over the seeds.",
        "",
        "| seed | " + " | ".join(texts) + " |",
        "| --- |" + " --- |" * len(texts),
    ]
    found: dict[str, list[float]] = {text: [] for text in texts}
    for seed, (zero, dense) in cells.items():
        row = []
        for text in texts:
            rises = [100 * (b - a) for a, b in zip(zero["tuned"][text], dense["tuned"][text], strict=True)]
            found[text].append(mean(rises))
            row.append(_with_error(rises))
        lines.append(f"| {seed} | " + " | ".join(row) + " |")
    if len(cells) > 1:
        lines.append("| mean | " + " | ".join(_with_error(found[text]) for text in texts) + " |")
    if whole:
        lines += [
            "",
            f"A step with `dense` took {mean(whole):.2f} times the processor time ({len(whole)} of the seeds).",
        ]
    return lines


def _perplexity(values: list[float]) -> str:
    return f"{torch.tensor(values).mean().exp():.2f}"


def _with_error(values: list[float]) -> str:
    return f"{mean(values):+.2f} ± {stdev(values) / len(values) ** 0.5:.2f}"


if __name__ == "__main__":
    main()
