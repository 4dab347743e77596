"""Language models from scratch: dense, MoH at 75 % and at 50 % of the heads, and the ablation of shared heads and stages.

    python experiments/language_from_scratch.py --out docs/results --jobs 2 --minutes 170

All variants have the same sizes, text, tokens, order and seeds; each finished run is kept under `--runs`, so that the script
can be stopped and started again, and an interrupted run resumes from its last checkpoint. Writes
`language_from_scratch.json`, `.md` and pictures. Text: five manuals and books of Debian packages, fetched if they are not
installed. Needs the extra `llm`.
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
from typing import Any

from moh._files import write_text

NAME = "language_from_scratch"
# name -> (label, router or None for dense, shared heads in 12, active routed heads)
VARIANTS: dict[str, tuple[str, str | None, int, int]] = {
    "dense": ("dense", None, 12, 0),
    "moh_75": ("MoH, 75 %", "two_stage", 4, 5),
    "moh_50": ("MoH, 50 %", "two_stage", 4, 2),
    "shared_50": ("shared heads, one stage, 50 %", "single_stage", 4, 2),
    "routed_50": ("no shared heads, 50 %", "two_stage", 0, 6),
}
_TIMED = ("dense", "moh_75", "moh_50", "routed_50")  # what is measured to plan the time
_TIMED_STEPS = 6
_MARGIN = 0.85  # of the time that is planned for training; the rest is loading and measuring


def main() -> None:
    """Run what is missing, then write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--runs", type=Path, default=Path("runs") / NAME, help="finished runs (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--corpora", nargs="+", help="built-in corpora",
                        default=["anarchism", "linux-doc", "python-doc", "postgresql-doc", "debian-handbook"])  # fmt: skip
    parser.add_argument("--minutes", type=float, default=170, help="for all runs together: the steps follow from it")
    parser.add_argument("--steps", type=int, help="of every run, instead of --minutes")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, which share the cores")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=192, help="a multiple of the 12 heads")
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--batch", type=int, default=16, help="sequences of a step")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--heldout-tokens", type=int, default=65_536, help="of each corpus")
    parser.add_argument("--cache-dir", help="for texts and tokens (default: ~/.cache/moh)")
    parser.add_argument("--one", nargs=3, metavar=("VARIANT", "SEED", "STEPS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        variant, seed, steps = options.one
        run_one(variant, int(seed), int(steps), options)
        return
    check_settings(options)
    export_texts(options)
    steps = options.steps or planned_steps(options)
    todo = [(v, s) for s in options.seeds for v in options.variants if not result_file(options.runs, v, s).exists()]
    with ThreadPoolExecutor(options.jobs) as pool:
        for number, (variant, seed) in enumerate(pool.map(lambda job: start(*job, steps, options), todo), 1):
            print(f"{number} of {len(todo)}: {variant}, seed {seed}", flush=True)
    from language_from_scratch_report import report

    report(options)


def check_settings(options: argparse.Namespace) -> None:
    """Runs of other settings must not be mixed with these."""
    names = "corpora layers width vocabulary seq_len batch learning_rate heldout_tokens steps"
    settings = {name: getattr(options, name) for name in names.split()}
    if not options.steps:  # they follow from these; a later start may ask for fewer seeds or variants
        settings["minutes"] = options.minutes
    file = options.runs / "settings.json"
    if not file.exists():
        options.runs.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(settings, indent=1) + "\n")
    elif (before := json.loads(file.read_text(encoding="utf-8"))) != settings:
        raise SystemExit(f"{options.runs} holds runs of other settings ({before}): choose another --runs, or delete it")


def result_file(runs: Path, variant: str, seed: int) -> Path:
    return runs / f"{variant}-{seed}.json"


def start(variant: str, seed: int, steps: int, options: argparse.Namespace) -> tuple[str, int]:
    """Run one model in a process of its own, with its part of the cores."""
    threads = max(1, (os.cpu_count() or 1) // options.jobs)
    command = [sys.executable, __file__, *sys.argv[1:], "--one", variant, str(seed), str(steps)]
    log = options.runs / f"{variant}-{seed}.log"
    with log.open("a", encoding="utf-8") as file:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
    if done.returncode:
        raise SystemExit(f"{variant}, seed {seed} failed: see {log}")
    return variant, seed


def export_texts(options: argparse.Namespace) -> None:
    """Write the corpora as JSON lines, so that not every run parses the pages again."""
    from moh.training import load_corpus

    for name in options.corpora:
        files = {part: options.runs / "text" / f"{name}.{part}.jsonl" for part in ("train", "heldout")}
        if all(file.exists() for file in files.values()):
            continue
        corpus = load_corpus(name, options.cache_dir)
        for part, file in files.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, "".join(json.dumps({"text": text}) + "\n" for text in getattr(corpus, part)))


def planned_steps(options: argparse.Namespace) -> int:
    """How many steps fit `--minutes`, from a few steps of each kind of model, with as many runs at once as jobs."""
    file = options.runs / "steps.json"
    if not file.exists():
        start("dense", -1, 1, options)  # makes tokenizer, tokens and kernels
        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(lambda variant: start(variant, -2, _TIMED_STEPS, options), _TIMED))
        seconds = [json.loads(result_file(options.runs, v, -2).read_text())["seconds_per_step"] for v in _TIMED]
        runs = len(options.variants) * len(options.seeds)
        rounds = -(-runs // options.jobs)
        steps = int(_MARGIN * options.minutes * 60 / rounds / (sum(seconds) / len(seconds)))
        write_text(
            file, json.dumps({"steps": max(10, steps), "seconds_per_step": dict(zip(_TIMED, seconds, strict=True))})
        )
    return int(json.loads(file.read_text())["steps"])


def recipe_of(variant: str, seed: int, steps: int, options: argparse.Namespace) -> Any:
    """The variant's recipe: everything except the heads is the same."""
    from moh.data.text.readers import SourceRecipe
    from moh.training.language.recipe import (
        DataRecipe,
        FromScratchRecipe,
        HeadsRecipe,
        ModelRecipe,
        Recipe,
        TrainingRecipe,
    )

    _, router, shared, active = VARIANTS[variant]
    folder = options.runs / "text"
    train = [folder / f"{name}.train.jsonl" for name in options.corpora]
    return Recipe(
        model=ModelRecipe(
            from_scratch=FromScratchRecipe(
                num_hidden_layers=options.layers,
                hidden_size=options.width,
                intermediate_size=8 * options.width // 3,
                num_attention_heads=12,
                max_position_embeddings=options.seq_len,
                vocab_size=options.vocabulary,
                moh=HeadsRecipe(shared, active, router) if router is not None else None,
            )
        ),
        data=DataRecipe(
            sources=[SourceRecipe(str(file), weight=file.stat().st_size) for file in train],
            heldout_sources=[SourceRecipe(str(folder / f"{name}.heldout.jsonl")) for name in options.corpora],
            seq_len=options.seq_len,
            cache_dir=str(options.runs / "cache"),
        ),
        training=TrainingRecipe(
            output_dir=str(options.runs / f"{variant}-{seed}"),
            max_steps=steps,
            learning_rate=options.learning_rate,
            warmup_steps=0.1,
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs={"min_lr_rate": 0.1},
            adam_beta2=0.95,
            weight_decay=0.1,
            per_device_train_batch_size=options.batch,
            seed=abs(seed),
            precision="fp32",
            logging_steps=10,
            save_steps=100,
            save_total_limit=1,
            balance_loss_coef=0.0 if router is None else 0.01,
            extra={"disable_tqdm": True, "report_to": []},
        ),
    )


def run_one(variant: str, seed: int, steps: int, options: argparse.Namespace) -> None:
    """Train one model, measure it and write its results; negative seeds only measure the time."""
    from language_from_scratch_report import measure
    from transformers.utils.logging import set_verbosity_error

    from moh.data.text.store import StoredBlocks, open_store
    from moh.data.text.tokenising import DocumentTokenizer
    from moh.training import train
    from moh.training.language.data import open_sources

    set_verbosity_error()
    recipe = recipe_of(variant, seed, steps, options)
    begin = time.perf_counter()
    result = train(recipe)
    runtime = [entry["train_runtime"] for entry in result.log_history if "train_runtime" in entry]
    figures: dict[str, Any] = {
        "variant": variant,
        "seed": seed,
        "steps": steps,
        "tokens": steps * options.batch * options.seq_len,
        "parameters": sum(parameter.numel() for parameter in result.model.parameters()),
        "seconds": time.perf_counter() - begin,
        "seconds_per_step": runtime[-1] / steps if runtime else None,  # an interrupted run has no such figure
        "losses": result.losses,
    }
    if seed >= 0:
        documents = DocumentTokenizer(result.tokenizer)
        stores = [
            open_store(source, documents, options.runs / "cache") for source in open_sources(recipe.data, heldout=True)
        ]
        blocks = {n: StoredBlocks(store, options.seq_len) for n, store in zip(options.corpora, stores, strict=True)}
        figures |= measure(result.model, blocks, options.heldout_tokens // options.seq_len)
    write_text(result_file(options.runs, variant, seed), json.dumps(figures) + "\n")


if __name__ == "__main__":
    main()
