"""How much of a pretrained model is left after conversion alone: routers, heads, and closed-form refinements, on two texts.

    python experiments/conversion_without_training.py --out docs/results

Calibrates on the training part of one text and measures on held-out parts of both. No gradient step. Writes
`conversion_without_training.json` and `.md`; about 20 minutes on two slow cores. Needs the extra `llm`.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils.logging import set_verbosity_error

from moh.config import MoHConfig
from moh.conversion import convert
from moh.conversion.calibrator import Calibrator
from moh.conversion.families import moh_config_fields
from moh.conversion.language import DenseLanguageModel, build
from moh.conversion.tokens import calibration_blocks
from moh.demo.base_model import default_base_model
from moh.evaluation import PerplexityResult, cpu_name, perplexity, perplexity_rise
from moh.models.llama import MoHLlamaConfig
from moh.models.loading import load_causal_lm, load_tokenizer
from moh.routing import LinearRouter
from moh.training import load_corpus, pack_tokens

NAME = "conversion_without_training"


def main() -> None:
    """Parse the options, measure every variant, write the results after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="dense model (default: SmolLM2-135M, fetched)")
    parser.add_argument("--texts", nargs="+", default=["django-docs", "anarchism"], help="the first calibrates")
    parser.add_argument("--heads", nargs="+", type=int, default=[7, 6], help="heads per layer, shared and routed")
    parser.add_argument("--shared-heads", type=int, default=4)
    parser.add_argument("--calibration-tokens", type=int, default=12_288)
    parser.add_argument("--heldout-tokens", type=int, default=6_144, help="of each text")
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    options = parser.parse_args()
    set_verbosity_error()
    start = time.perf_counter()

    base = options.base or default_base_model()
    dense = load_causal_lm(base, dtype=torch.float32)
    tokenizer = load_tokenizer(base)
    corpora = [load_corpus(name) for name in options.texts]
    heldout = {}
    for corpus in corpora:
        blocks = pack_tokens(corpus.heldout, tokenizer, seq_len=512)
        count = min(len(blocks), options.heldout_tokens // 512)
        heldout[corpus.name] = blocks[torch.linspace(0, len(blocks) - 1, count).long()]
    blocks = calibration_blocks(
        pack_tokens(corpora[0].train, tokenizer, seq_len=512),
        None,
        options.calibration_tokens,
        512,
        dense.config.vocab_size,
    )

    result: dict[str, Any] = {
        "base": Path(base).name,
        "calibrated_on": f"{corpora[0].name}, {blocks.numel()} tokens",
        "heldout_tokens": {name: b.shape[0] * (b.shape[1] - 1) for name, b in heldout.items()},
        "shared_heads": options.shared_heads,
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rows": [],
    }
    original = {name: perplexity(dense, b, batch_size=2) for name, b in heldout.items()}

    def add(heads: float, variant: str, model: PreTrainedModel) -> None:
        measured = {name: perplexity(model, b, batch_size=2) for name, b in heldout.items()}
        result["rows"].append(_row(heads, variant, measured, original))
        result["minutes"] = round((time.perf_counter() - start) / 60, 1)
        _write(options.out, result)
        print(json.dumps(result["rows"][-1]), flush=True)

    add(dense.config.num_attention_heads, "dense original", dense)
    h = dense.config.num_attention_heads
    calibrator = Calibrator(DenseLanguageModel(dense, copied=False), blocks, 2, progress=False)
    shared = options.shared_heads
    routers = calibrator.fit_routers([MoHConfig(h, shared, h - 1 - shared, "linear")] * dense.config.num_hidden_layers)
    costs = calibrator.costs(routers)
    for heads in options.heads:
        paper = convert(dense, shared_heads=shared, active_heads=heads - shared, router="query_norm")
        add(heads, "the paper's rule: first heads shared, query norms", paper)
        del paper
        even = calibrator.reallocate(routers, _level(costs, heads), heads * len(routers))
        add(heads, "contribution router", _model(dense, even))
        uneven = calibrator.reallocate(routers, costs, heads * len(routers))
        add(heads, "contribution router, uneven budget", _model(dense, uneven))
        add(heads, "contribution router, refitted W_O", _model(dense, even, calibrator.refit_outputs(even)))
        add(
            heads,
            "contribution router, uneven budget, refitted W_O",
            _model(dense, uneven, calibrator.refit_outputs(uneven)),
        )


def _level(costs: torch.Tensor, heads: int) -> torch.Tensor:
    """Costs under which every layer gets the same number of heads."""
    return (torch.arange(costs.shape[1], dtype=costs.dtype) - heads).square().expand_as(costs)


def _model(
    dense: PreTrainedModel, routers: Sequence[LinearRouter], outputs: Sequence[torch.Tensor] = ()
) -> PreTrainedModel:
    """The MoH model with these routers, on the dense model's own tensors."""
    config = MoHLlamaConfig(
        **moh_config_fields(dense.config),
        router="linear",
        shared_heads=[list(r.config.shared_indices) for r in routers],
        active_heads=[r.config.active_heads for r in routers],
    )
    return build(dense, config, routers, outputs, copied=False)


def _row(
    heads: float, variant: str, measured: dict[str, PerplexityResult], original: dict[str, PerplexityResult]
) -> dict[str, Any]:
    texts = {}
    for name, now in measured.items():
        above, stderr = perplexity_rise(now.block_losses, original[name].block_losses)
        texts[name] = {"perplexity": now.perplexity, "above": above, "stderr": stderr}
    return {"heads": heads, "variant": variant, "texts": texts}


def _write(out: Path, result: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    names = list(result["heldout_tokens"])
    lines = [
        "# Conversion without training",
        "",
        f"{result['base']}, {result['shared_heads']} shared heads, calibrated on {result['calibrated_on']}, no gradient step. "
        "Held-out perplexity, and how far it lies above the dense original's (± standard error of the paired difference "
        "over blocks of 512 tokens; one run). Held-out tokens: "
        + ", ".join(f"{n} {t:,}" for n, t in result["heldout_tokens"].items())
        + f". {result['cpu']}, {result['threads']} threads, torch {result['torch']}, float32, {result['minutes']} minutes.",
        "",
        "| heads per layer | variant | " + " | ".join(names) + " |",
        "| --- | --- |" + " --- |" * len(names),
    ]
    for row in result["rows"]:
        cells = [f"{t['perplexity']:.2f} ({t['above']:+.1f} % ± {t['stderr']:.1f})" for t in row["texts"].values()]
        if row["variant"] == "dense original":
            cells = [f"{t['perplexity']:.2f}" for t in row["texts"].values()]
        lines.append(f"| {row['heads']} | {row['variant']} | " + " | ".join(cells) + " |")
    lines += ["", f"Made by `python experiments/{NAME}.py`."]
    for suffix, text in (("json", json.dumps(result, indent=1)), ("md", "\n".join(lines))):
        scratch = out / f".{NAME}.{suffix}.partial"
        scratch.write_text(text + "\n", encoding="utf-8")
        os.replace(scratch, out / f"{NAME}.{suffix}")


if __name__ == "__main__":
    main()
