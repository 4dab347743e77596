"""What a little training adds to the models of `does_routing_pay.py`: their W_O and routers are tuned, all else stays.

    python experiments/does_routing_pay.py --only quality
    python experiments/does_routing_pay_tuned.py
    python experiments/does_routing_pay.py --only page

The recipe field `training.only` leaves the other parameters as they are and computes no gradients of theirs. The control is
the dense model, whose W_O is tuned on the same tokens in the same order: what routing costs is the difference to it. Each
model is a cell of its own next to those of the first command, which writes the page. Needs the extras `llm` and `train`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from does_routing_pay import SEQ_LEN, is_measured
from does_routing_pay_models import MODELS, ROUTED, SHORT, cell_file, converted
from does_routing_pay_report import CONTROL, TUNED
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

import moh
from moh._files import write_text
from moh.data.text.blocks import evenly_spread
from moh.evaluation import cpu_name, perplexity
from moh.models.transformers.loading import load_causal_lm, load_tokenizer
from moh.training import load_corpus, pack_tokens, train
from moh.training.language.recipe import ModelRecipe, Recipe, TrainingRecipe


def main() -> None:
    """Parse the options and tune what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("does_routing_pay_work"), help="cells and converted models")
    parser.add_argument("--model", choices=tuple(MODELS), default=next(iter(MODELS)), help="the dense one")
    parser.add_argument("--method", choices=(ROUTED, SHORT), default=ROUTED, help="by which the others were converted")
    parser.add_argument("--shares", nargs="+", type=float, default=[6 / 9, 7 / 9, 5 / 9, 4 / 9], help="of all heads")
    parser.add_argument("--texts", nargs=2, default=[*TUNED["texts"]], help="to tune on, half and half")
    parser.add_argument("--third", default=TUNED["third"], help="a text that is only measured on")
    parser.add_argument("--tokens", type=int, default=TUNED["tokens"], help="to tune on, each of them once")
    parser.add_argument("--heldout-tokens", type=int, default=TUNED["heldout_tokens"], help="of each text")
    parser.add_argument("--learning-rate", type=float, default=TUNED["learning_rate"])
    parser.add_argument(
        "--batch-size", type=int, default=TUNED["batch_size"], help=f"blocks of {SEQ_LEN} tokens per step"
    )
    parser.add_argument("--only", nargs="+", default=[*TUNED["only"]], help="what is tuned of the routed models")
    parser.add_argument("--seed", type=int, default=TUNED["seed"], help="of the order of the tokens")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default=TUNED["precision"])
    options = parser.parse_args()
    set_verbosity_error()
    disable_progress_bar()
    dense = MODELS[options.model]()
    paths = {share: converted(options.work, options.model, options.method, share) for share in options.shares}
    tokenizer = load_tokenizer(dense)
    corpora = {text: load_corpus(text) for text in (*options.texts, options.third)}
    count = options.tokens // 2 // SEQ_LEN
    parts = [evenly_spread(pack_tokens(corpora[t].train, tokenizer, seq_len=SEQ_LEN), count) for t in options.texts]
    held = {
        text: evenly_spread(pack_tokens(corpus.heldout, tokenizer, seq_len=SEQ_LEN), options.heldout_tokens // SEQ_LEN)
        for text, corpus in corpora.items()
    }
    for share in (1.0, *options.shares):
        file = tuned_file(options, share)
        asked = {name: getattr(options, name) for name in TUNED}
        asked |= {} if share < 1 else {"only": ["o_proj"]}  # the control has no routers
        if is_measured(file, asked):
            continue
        load = AutoModelForCausalLM.from_pretrained if share < 1 else load_causal_lm
        model = load(paths.get(share, dense), dtype=torch.float32)
        about = {"kind": "tuned", "model": options.model, "method": options.method if share < 1 else CONTROL, "aim": share,
                 "options": asked, "cpu": cpu_name(), "threads": torch.get_num_threads()}  # fmt: skip
        cell = {**about, **_tuned(options, model, tokenizer, torch.cat(parts), held, share)}
        write_text(file, json.dumps(cell, indent=1) + "\n")
        print(file.stem, {t: round(v["perplexity"], 2) for t, v in cell["texts"].items()}, f"{cell['seconds']:.0f} s")


def tuned_file(options: argparse.Namespace, share: float) -> Path:
    """The cell of a tuned model; the dense control has share 1. Options other than the defaults are in its name."""
    words = ["tuned", *options.only] if share < 1 else ["tuned", "o_proj"]
    for name, default in TUNED.items():
        value = getattr(options, name)
        if name not in ("only", "seed") and (tuple(value) if isinstance(value, list) else value) != default:
            words += [name, *(value if isinstance(value, list) else [value])]
    return cell_file(options.work, options.model, options.method if share < 1 else CONTROL, share, *words, options.seed)


def _tuned(
    options: argparse.Namespace,
    model: PreTrainedModel,
    tokenizer: Any,
    blocks: Tensor,
    heldout: dict[str, Tensor],
    share: float,
) -> dict[str, Any]:
    """Tune a model, and the figures of its cell; the run's own files are removed once it is measured."""
    run = tuned_file(options, share).with_suffix("")
    steps = len(blocks) // options.batch_size
    recipe = Recipe(
        model=ModelRecipe(path=options.model),
        training=TrainingRecipe(
            output_dir=str(run),
            max_steps=steps,
            learning_rate=options.learning_rate,
            per_device_train_batch_size=options.batch_size,
            seed=options.seed,
            precision=options.precision,
            save_steps=max(1, steps // 4),
            save_total_limit=1,
            only=options.only if share < 1 else ["o_proj"],
            extra={"disable_tqdm": True, "report_to": []},
        ),
    )
    start = time.perf_counter()
    result = train(recipe, model=model, tokenizer=tokenizer, train_blocks=blocks)
    seconds = time.perf_counter() - start
    found: dict[str, Any] = {"seconds": seconds, "resumed": result.resumed_from is not None, "texts": {}}
    found["training_losses"] = [loss for _, loss in result.losses]
    for text, held in heldout.items():
        with moh.record_routing(result.model) as routing:
            of_text = perplexity(result.model, held, batch_size=2)
        used = routing.share() if len(routing) else 1.0
        found["texts"][text] = {
            "perplexity": of_text.perplexity,
            "block_losses": list(of_text.block_losses),
            "used": used,
        }
    shutil.rmtree(run)
    return found


if __name__ == "__main__":
    main()
