"""The paper's claims, one at a time: gates without routing, fewer heads without routing, and both, on equal tokens.

    python experiments/claims.py                      # all runs that are missing, then the page
    python experiments/claims.py --minutes 9          # a piece of it; the same command resumes
    python experiments/claims.py --only page          # page and picture again, from the committed results

Language models from scratch on the built-in texts, the same tokens in the same order for every arm of a seed. A run is known
by its recipe and kept in `--work` when it is finished; one that was stopped resumes from its last checkpoint. Several
processes may share `--work`. Until all runs are finished, those that are lie in a directory next to the page too: once that is
committed, another machine goes on from there. `--size large` is for a GPU, with `tiny` a run takes some minutes. `--arms
moh_9_2` is any other split: 9 of 12 heads used, 2 of them shared (the paper's tables 6 and H, with a `--name` of their own).
Needs the extra `llm`, and Debian 12's packages.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from claims_report import collect, write_page
from language_from_scratch import export_texts
from result_names import results_name

from moh._files import LockedError, locked, write_text

HEADS = 12


class Arm(NamedTuple):
    """What an arm's layers are; all else is the same for every arm.

    Attributes:
        label: on the page.
        heads: that exist, each of width C / 12.
        router: None for plain attention.
        shared: heads that every token uses.
        active: routed heads that each token chooses.
    """

    label: str
    heads: int
    router: str | None = None
    shared: int = 0
    active: int = 0


# A mask that is the same for every token makes the function of a model with fewer heads: what it hides has no gradient.
# "static" is that model, and "static, gates" weighs its heads as MoH does: the same heads for every token either way.
ARMS = {
    "dense": Arm("dense", HEADS),
    "gates": Arm("gates, 100 %", HEADS, "two_stage", 4, 8),
    "moh_75": Arm("MoH, 75 %", HEADS, "two_stage", 4, 5),
    "static_75": Arm("static, 75 %", 9),
    "static_gates_75": Arm("static, gates, 75 %", 9, "two_stage", 4, 5),
    "moh_50": Arm("MoH, 50 %", HEADS, "two_stage", 4, 2),
    "static_50": Arm("static, 50 %", 6),
}
# Sizes that fit a CPU and a GPU; every field can be given on the command line too.
SIZES: dict[str, dict[str, Any]] = {
    "small": dict(layers=4, width=192, vocabulary=4_096, seq_len=256, batch=16, tokens=10_485_760, learning_rate=2e-3),
    # for the paper's tables of shares at a size where all arms take minutes
    "tiny": dict(layers=2, width=96, vocabulary=1_024, seq_len=128, batch=16, tokens=524_288, learning_rate=3e-3),
    "large": dict(layers=8, width=576, vocabulary=8_192, seq_len=512, batch=64, tokens=41_943_040, learning_rate=1e-3),
}
NAMES = {"small": "claims", "tiny": "claims_tiny", "large": "claims_large"}
CORPORA = "django-docs botchan debian-handbook anarchism postgresql-doc python-doc linux-doc".split()
_POINTS = 10  # of the held-out curve
_SAVE_STEPS = 100
_LEAST_MINUTES = 0.5  # a run is not begun with less time left


def main() -> None:
    """Run what is missing, then write the page of all arms that are complete."""
    options = parse()
    if options.only == "page":
        write_page(options.out, options.name)
        return
    options.work.mkdir(parents=True, exist_ok=True)
    with locked(options.work / "text"):
        export_texts(argparse.Namespace(runs=options.work, corpora=options.corpora, cache_dir=options.cache_dir))
    deadline = time.monotonic() + 60 * options.minutes if options.minutes else None
    cells = [(name, seed) for name in options.arms for seed in options.seeds]
    share_finished(cells, options)
    for name, seed in cells:
        file = cell_file(name, seed, options)
        if file.exists():
            continue
        if deadline is not None and deadline - time.monotonic() < 60 * _LEAST_MINUTES:
            break
        try:
            with locked(file, waits=False):
                if not file.exists():  # another process may have finished it just now
                    run(name, seed, options, deadline)
        except LockedError:
            print(f"{file.stem}: another process is at it", flush=True)
    share_finished(cells, options)
    done = sum(cell_file(*cell, options).exists() for cell in cells)
    print(f"{done} of {len(cells)} runs are finished in {options.work}", flush=True)
    if options.only is None and collect(options):
        write_page(options.out, options.name)


def share_finished(cells: Sequence[tuple[str, int]], options: argparse.Namespace) -> None:
    """Copy finished runs from `--work` to a directory next to the page, and back; it goes when all are finished."""
    folder = options.out / options.name
    files = [cell_file(*cell, options) for cell in cells]
    for file in files:
        if not file.exists() and (shared := folder / file.name).exists():
            write_text(file, shared.read_text(encoding="utf-8"))
    finished = [file for file in files if file.exists()]
    if len(finished) < len(files):
        for file in finished:
            if not (shared := folder / file.name).exists():
                folder.mkdir(parents=True, exist_ok=True)
                write_text(shared, file.read_text(encoding="utf-8"))
    elif folder.exists():
        for file in files:
            (folder / file.name).unlink(missing_ok=True)
        if not any(folder.iterdir()):
            folder.rmdir()


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options; sizes that are not given are those of `--size`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", type=_arm_name, default=list(ARMS), help=", ".join(ARMS) + ", moh_A_S")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--size", choices=SIZES, default="small")
    for name, kind in dict.fromkeys(SIZES["small"], int).items():
        kind = float if name == "learning_rate" else kind
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=kind, help=f"default: {SIZES['small'][name]:,} if small"
        )
    parser.add_argument("--corpora", nargs="+", default=CORPORA)
    parser.add_argument("--heldout-tokens", type=int, default=32_768, help="of each text")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="default: bf16 on a GPU or with AMX, else fp32")
    parser.add_argument(
        "--compile", action="store_true", help="the model: a minute per run, and steps a seventh to a third shorter"
    )
    parser.add_argument("--minutes", type=float, help="stop after this time, in the middle of a run if need be")
    parser.add_argument("--only", choices=("runs", "page"))
    parser.add_argument("--name", help="of the results' files (default: claims, or claims_large)")
    parser.add_argument("--work", type=Path, default=Path("runs") / "claims", help="for runs and tokens")
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--cache-dir", help="for texts (default: ~/.cache/moh)")
    options = parser.parse_args(arguments)
    measured = ("arms", "seeds", *SIZES["small"], "corpora", "heldout_tokens")
    fields = measured if options.only is None else ()  # otherwise nothing is written, or what is there is written again
    options.name = results_name(parser, options, fields, default=NAMES[options.size])
    for name, value in SIZES[options.size].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.tokens % (options.batch * options.seq_len):
        parser.error(f"--tokens must be a multiple of --batch x --seq-len = {options.batch * options.seq_len}")
    if options.precision is None:
        import torch

        # without tiles bfloat16 was slower than float32
        tiles = torch.cpu.get_capabilities().get("amx_bf16", False)
        options.precision = "bf16" if torch.cuda.is_available() or tiles else "fp32"
    return options


def arm_of(name: str) -> Arm:
    """One of `ARMS`, or `moh_A_S`: A of 12 heads used by each token, S of them shared.

    Raises:
        ValueError: there is no such arm.
    """
    if name in ARMS:
        return ARMS[name]
    numbers = re.fullmatch(r"moh_(\d+)_(\d+)", name)
    used, shared = map(int, numbers.groups()) if numbers else (0, 0)
    if not 0 <= shared < used <= HEADS:
        raise ValueError(
            f"an arm must be one of {', '.join(ARMS)}, or moh_A_S with 0 <= S < A <= {HEADS} (A of {HEADS} heads used, S "
            f"of them shared), got {name!r}"
        )
    return Arm(f"MoH, {used} of {HEADS}, {shared} shared", HEADS, "two_stage", shared, used - shared)


def _arm_name(name: str) -> str:
    try:
        arm_of(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return name


def recipe_of(name: str, seed: int, options: argparse.Namespace, work: Path, output: Path) -> Any:
    """The arm's recipe, with its texts in `work`: everything except the heads is the same for all arms."""
    from moh.data.text.readers import SourceRecipe
    from moh.training.language.recipe import (
        DataRecipe,
        FromScratchRecipe,
        HeadsRecipe,
        ModelRecipe,
        Recipe,
        TrainingRecipe,
    )

    arm = arm_of(name)
    sizes = {corpus: (options.work / "text" / f"{corpus}.train.jsonl").stat().st_size for corpus in options.corpora}
    steps = options.tokens // (options.batch * options.seq_len)
    return Recipe(
        model=ModelRecipe(
            from_scratch=FromScratchRecipe(
                num_hidden_layers=options.layers,
                hidden_size=options.width,
                intermediate_size=8 * options.width // 3,
                num_attention_heads=arm.heads,
                max_position_embeddings=options.seq_len,
                vocab_size=options.vocabulary,
                moh=HeadsRecipe(arm.shared, arm.active, arm.router) if arm.router is not None else None,
                extra={"head_dim": options.width // HEADS},
            )
        ),
        data=DataRecipe(  # weights by size: with as many tokens as there are, all is read about once
            sources=[SourceRecipe(str(work / "text" / f"{n}.train.jsonl"), weight=size) for n, size in sizes.items()],
            heldout_sources=[SourceRecipe(str(work / "text" / f"{n}.heldout.jsonl")) for n in sizes],
            seq_len=options.seq_len,
            cache_dir=str(work / "cache"),
        ),
        training=TrainingRecipe(
            output_dir=str(output),
            max_steps=steps,
            learning_rate=options.learning_rate,
            warmup_steps=0.05,
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs={"min_lr_rate": 0.1},
            adam_beta2=0.95,
            weight_decay=0.1,
            per_device_train_batch_size=options.batch,
            seed=seed,
            precision=options.precision,
            logging_steps=20,
            save_steps=_SAVE_STEPS,
            save_total_limit=1,
            balance_loss_coef=0.0 if arm.router is None else 0.01,
            extra={"disable_tqdm": True, "report_to": []} | ({"torch_compile": True} if options.compile else {}),
        ),
    )


def cell_file(name: str, seed: int, options: argparse.Namespace) -> Path:
    """Where a finished run's figures are kept: the name has a digest of its recipe, without the place of its files.

    Fields that have their defaults don't count, so that a field that recipes get later leaves finished runs as they are.
    """
    text = json.dumps(_set_fields(recipe_of(name, seed, options, Path(), Path())), sort_keys=True)
    text += f"heldout {options.heldout_tokens}"
    return Path(options.work) / f"{name}-{seed}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"


def _set_fields(value: Any) -> Any:
    """A dataclass as a dictionary of the fields that differ from their defaults, and so on within it."""
    if isinstance(value, (list, tuple)):
        return [_set_fields(item) for item in value]
    if not dataclasses.is_dataclass(value):
        return value
    found = {}
    for field in dataclasses.fields(value):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if (part := getattr(value, field.name)) != default:
            found[field.name] = _set_fields(part)
    return found


def run(name: str, seed: int, options: argparse.Namespace, deadline: float | None) -> None:
    """Train one model, or as much of it as there is time for; a finished one is measured and its figures are kept."""
    import torch
    from claims_training import Progress
    from language_from_scratch_report import measure
    from transformers.utils.logging import set_verbosity_error

    from moh.data.text.store import StoredBlocks, open_store
    from moh.data.text.tokenising import DocumentTokenizer
    from moh.evaluation import cpu_name
    from moh.training import train
    from moh.training.language.data import open_sources
    from moh.training.language.model import load_tokenizer

    set_verbosity_error()
    file = cell_file(name, seed, options)
    runs = file.with_suffix("")
    recipe = recipe_of(name, seed, options, options.work, runs)
    documents = DocumentTokenizer(load_tokenizer(recipe))
    cache = options.work / "cache"
    stores = [open_store(source, documents, cache) for source in open_sources(recipe.data, heldout=True)]
    blocks = {n: StoredBlocks(store, options.seq_len) for n, store in zip(options.corpora, stores, strict=True)}
    count = options.heldout_tokens // options.seq_len

    def heldout_loss(model: Any) -> float:
        return float(measure(model, blocks, max(1, count // 4))["loss"])

    steps = recipe.training.max_steps
    progress = Progress(runs / "progress.json", deadline, max(1, steps // _POINTS), heldout_loss)
    result = train(recipe, callbacks=[progress])
    if not progress.finished(steps):
        print(f"{file.stem}: stopped after step {progress.step} of {steps}", flush=True)
        return
    measured = measure(result.model, blocks, count)
    measured["corpora_loss"] = measured.pop("corpora")
    figures: Mapping[str, Any] = {
        "arm": name,
        "seed": seed,
        **{key: getattr(options, key) for key in (*SIZES["small"], "corpora", "precision", "compile")},
        **arm_of(name)._asdict(),
        "steps": steps,
        "parameters": sum(parameter.numel() for parameter in result.model.parameters()),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu_seconds": progress.cpu_seconds,
        "curve": [[point * options.batch * options.seq_len, loss] for point, loss in progress.curve],
        **measured,
    }
    write_text(file, json.dumps(figures) + "\n")
    for checkpoint in runs.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    print(
        f"{file.stem}: perplexity {figures['perplexity']:.2f}, {progress.cpu_seconds / 60:.0f} minutes of processor time",
        flush=True,
    )


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
