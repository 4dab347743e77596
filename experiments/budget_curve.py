"""Perplexity and time against the share of heads, for every router and routing unit, of a model with untouched weights.

    python experiments/budget_curve.py

SmolLM2-135M, no gradient step, two texts of different kinds: each gives half of the calibration text, and both are
measured on their held-out parts. Writes `docs/results/budget_curve.{json,md}` and `docs/images/budget_curve.png` after
every step and resumes after an interruption; about 20 minutes on one core. `--only speed` times everything again, about
five minutes; `--tune 20` compares the units before and after this many training steps, the dense control too. Extra `llm`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from budget_curve_models import QUERY_NORM, ROUTERS, TWO_STAGE, UNITS, Fitted, Variant, fit, step_of, two_stage
from budget_curve_report import write
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from moh.data.text.blocks import evenly_spread
from moh.demo.base_model import default_base_model
from moh.evaluation import cpu_name, measure_speed, perplexity, perplexity_rise
from moh.models.transformers.loading import load_causal_lm, load_tokenizer
from moh.training import load_corpus, pack_tokens

SEQ_LEN = 512


def main() -> None:
    """Parse the options and measure what is missing from the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="dense model (default: SmolLM2-135M, fetched)")
    parser.add_argument("--texts", nargs=2, default=["django-docs", "anarchism"])
    parser.add_argument("--heads", nargs="+", type=int, default=[6, 7, 5, 8, 4, 3], help="mean heads per layer")
    parser.add_argument("--calibration-tokens", type=int, default=8_192, help="of both texts together")
    parser.add_argument("--heldout-tokens", type=int, default=2_048, help="of each text")
    parser.add_argument("--prompt-tokens", type=int, default=512, help="of the prefill that is timed")
    parser.add_argument("--decode-tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds")
    parser.add_argument("--only", choices=("quality", "speed"), help="measure one of the two; speed: everything again")
    parser.add_argument("--tune", type=int, default=0, metavar="STEPS", help="also tune each unit at 6 heads")
    parser.add_argument("--tune-tokens", type=int, default=1_024, help="per step")
    parser.add_argument("--scratch", type=Path, default=Path("budget_curve_scratch"), help="for what is fitted once")
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--images", type=Path, default=Path("docs/images"))
    options = parser.parse_args()
    set_verbosity_error()
    disable_progress_bar()
    options.scratch.mkdir(parents=True, exist_ok=True)

    base = options.base or default_base_model()
    dense = load_causal_lm(base, dtype=torch.float32).eval()
    blocks = _blocks(options, load_tokenizer(base))
    fitted = fit(dense, blocks["calibration"], options.scratch / "fitted_by_router.pt")
    result = _result(options, base, blocks)
    variants = [
        Variant(unit, router, heads)
        for heads in options.heads
        for router in ROUTERS
        for unit in UNITS
        if router == ROUTERS[-1] or heads % step_of(dense, unit) == 0
    ]
    if options.only != "speed":
        _measure_quality(options, dense, fitted, variants, blocks, result)
    if options.only != "quality":
        _measure_speed(options, dense, fitted, variants, result)
    if options.tune:
        _tune(options, dense, fitted, blocks, result)


def _measure_quality(
    options: argparse.Namespace,
    dense: PreTrainedModel,
    fitted: Fitted,
    variants: list[Variant],
    blocks: dict[str, Tensor],
    result: dict[str, Any],
) -> None:
    rows = result["rows"]
    if "dense" not in rows:
        rows["dense"] = {"texts": _texts(options, dense, blocks, None)}
    for variant in variants:
        if variant.key in rows and "texts" in rows[variant.key]:
            continue
        if variant.router == TWO_STAGE:
            model = two_stage(dense, variant, blocks["calibration"])
        else:
            model = fitted.model(dense, variant)
        rows.setdefault(variant.key, variant.describe(model))["texts"] = _texts(options, model, blocks, rows["dense"])
        del model
        write(options.out, options.images, result)
        print(json.dumps(rows[variant.key]), flush=True)


def _texts(
    options: argparse.Namespace, model: PreTrainedModel, blocks: dict[str, Tensor], dense: dict[str, Any] | None
) -> dict[str, Any]:
    """Perplexity of each text, and its rise above the dense model's in percent, with the standard error."""
    texts: dict[str, Any] = {}
    for name in options.texts:
        now = perplexity(model, blocks[name], batch_size=2)
        texts[name] = {"perplexity": now.perplexity, "block_losses": list(now.block_losses)}
        if dense is not None:
            above, stderr = perplexity_rise(now.block_losses, dense["texts"][name]["block_losses"])
            texts[name] |= {"above": above, "stderr": stderr}
    return texts


def _measure_speed(
    options: argparse.Namespace, dense: PreTrainedModel, fitted: Fitted, variants: list[Variant], result: dict[str, Any]
) -> None:
    """Milliseconds per token, the models in turns, so that the ratios to dense hold on a busy machine too.

    Time depends on the unit and the number of heads, hardly on the router: the last router, which every number of heads
    has, is timed for all of them, the query norms for one.
    """
    timed = [v for v in variants if v.router == ROUTERS[-1] or (v.router == QUERY_NORM and v.heads == options.heads[0])]
    models = {"dense": dense} | {v.key: fitted.model(dense, v, refit=False) for v in timed}
    for row in result["rows"].values():
        for name in ("prefill", "decode"):
            row.pop(name, None)
    for variant in timed:
        result["rows"].setdefault(variant.key, variant.describe(models[variant.key]))
    report = measure_speed(
        models,
        prompt_tokens=options.prompt_tokens,
        decode_tokens=options.decode_tokens,
        repeats=options.repeats,
        progress=False,
    )
    for key, speed in report.models.items():
        row = result["rows"].setdefault(key, {})
        for name, rate in (("prefill", speed.prefill), ("decode", speed.decode)):
            dense_rate = getattr(report.models["dense"], name)
            # Paired by round: both were slowed down by what else ran then
            ratios = torch.tensor(dense_rate.values) / torch.tensor(rate.values)
            row[name] = {"ms": 1000 / rate.median, "to_dense": float(ratios.median())}
    result["timed"] = {
        "prompt_tokens": options.prompt_tokens,
        "decode_tokens": options.decode_tokens,
        "repeats": options.repeats,
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
    }
    write(options.out, options.images, result)


def _tune(
    options: argparse.Namespace,
    dense: PreTrainedModel,
    fitted: Fitted,
    blocks: dict[str, Tensor],
    result: dict[str, Any],
) -> None:
    """Each unit and the dense control after the same steps on the same training text."""
    tuned = result["tuned"]
    if tuned.get("steps") != options.tune or tuned.get("tokens_per_step") != options.tune_tokens:
        tuned.clear()
        tuned |= {"steps": options.tune, "tokens_per_step": options.tune_tokens, "heads": 6, "rows": {}}
    for unit in ("dense", *UNITS):
        if unit in tuned["rows"]:
            continue
        before = dense if unit == "dense" else fitted.model(dense, Variant(unit, ROUTERS[-1], 6), refit=True)
        model = _trained(before, blocks["training"], options)
        tuned["rows"][unit] = {
            "before": {name: perplexity(before, blocks[name], batch_size=2).perplexity for name in options.texts},
            "after": {name: perplexity(model, blocks[name], batch_size=2).perplexity for name in options.texts},
        }
        write(options.out, options.images, result)
        print(unit, json.dumps(tuned["rows"][unit]), flush=True)


def _trained(model: PreTrainedModel, training: Tensor, options: argparse.Namespace) -> PreTrainedModel:
    """A copy of the model after `options.tune` steps of AdamW at 1e-4, warmed up and decayed; its router stays."""
    copy = type(model)(model.config)
    copy.load_state_dict(model.state_dict())
    copy.train()
    for name, parameter in copy.named_parameters():
        parameter.requires_grad_("router" not in name)
    trainable = [p for p in copy.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trainable, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0)
    warm = max(1, options.tune // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda s: min((s + 1) / warm, max(0.0, (options.tune - s) / max(1, options.tune - warm)))
    )
    count = max(1, options.tune_tokens // SEQ_LEN)
    order = torch.randperm(len(training), generator=torch.Generator().manual_seed(0))
    for step in range(options.tune):
        batch = training[order[(torch.arange(count) + step * count) % len(training)]]
        copy(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        clip_grad_norm_(trainable, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
    return copy.eval()


def _blocks(options: argparse.Namespace, tokenizer: Any) -> dict[str, Tensor]:
    """Blocks of 512 tokens: the calibration mix, text to train on, and each text's held-out part."""
    file = options.scratch / "blocks.pt"
    if not file.exists():
        blocks: dict[str, Tensor] = {}
        calibration, training = [], []
        for name in options.texts:
            corpus = load_corpus(name)
            every = max(1, len(corpus.train) // 100)  # documents enough to choose from, without tokenising all
            text = pack_tokens(corpus.train[::every], tokenizer, seq_len=SEQ_LEN)
            calibration.append(evenly_spread(text, options.calibration_tokens // (2 * SEQ_LEN)))
            training.append(text)
            blocks[name] = evenly_spread(
                pack_tokens(corpus.heldout, tokenizer, seq_len=SEQ_LEN), options.heldout_tokens // SEQ_LEN
            )
        torch.save(blocks | {"calibration": torch.cat(calibration), "training": torch.cat(training)}, file)
    found: dict[str, Tensor] = torch.load(file)
    return found


def _result(options: argparse.Namespace, base: str | Path, blocks: dict[str, Tensor]) -> dict[str, Any]:
    """The results so far, if they were made from the same text, else new ones."""
    about = {
        "base": Path(base).name,
        "calibration_tokens": blocks["calibration"].numel(),
        "heldout_tokens": {name: blocks[name].shape[0] * (SEQ_LEN - 1) for name in options.texts},
        "cpu": cpu_name(),
        "torch": torch.__version__,
    }
    file = options.out / "budget_curve.json"
    if file.exists():
        result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        kept = ("base", "calibration_tokens", "heldout_tokens")
        if all(result["about"][name] == about[name] for name in kept):
            return result
    return {"about": about, "rows": {}, "timed": None, "tuned": {}}


if __name__ == "__main__":
    main()
