"""How much of a pretrained model conversion alone keeps: routers, heads, and closed-form refinements, on two texts.

    python experiments/conversion_without_training.py
    python experiments/conversion_without_training.py --mixes

The first measures the pieces one by one, calibrated on the training part of one text; the second measures the cost of
calibrating on one text and testing on another, with the best settings. Both use held-out parts of both texts. No gradient
step. Each writes its part of `docs/results/conversion_without_training.{json,md}`, after every row, and resumes after an
interruption; about 20 minutes on one slow core. Needs the extra `llm`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from moh._files import write_text
from moh.config import MoHConfig
from moh.conversion import convert
from moh.conversion.calibrator import Calibrator
from moh.conversion.fit import refit_output_projection
from moh.conversion.passes import collect_several_outputs
from moh.conversion.transformers import DenseTextModel
from moh.data.text.blocks import evenly_spread
from moh.demo.base_model import default_base_model
from moh.evaluation import PerplexityResult, cpu_name, perplexity, perplexity_rise
from moh.models.transformers.loading import load_causal_lm, load_tokenizer
from moh.routing import LinearRouter, router_class
from moh.training import load_corpus, pack_tokens

NAME = "conversion_without_training"
SEQ_LEN = 512
DENSE = "dense original"
PIECES, MIXES = "pieces", "mixes"
INTRODUCTIONS = {
    PIECES: "{shared_heads} shared heads, calibrated on {calibration_tokens:,} tokens of {first}",
    MIXES: "Calibrated on one text and measured on another: {shared_heads} shared heads, contribution router by what is unique "
    "to a head, uneven shares, refitted W_O, {calibration_tokens:,} calibration tokens per row, {four_times:,} in the rows with "
    "four times the tokens",
}


@dataclass
class Run:
    """One table in the making."""

    table: str
    dense: PreTrainedModel
    training: dict[str, Tensor]  # [n, 512] of each text
    heldout: dict[str, Tensor]
    heads: list[int]
    shared: int
    calibration_tokens: int
    out: Path
    about: dict[str, Any] = field(default_factory=dict)
    original: dict[str, PerplexityResult] = field(default_factory=dict)
    start: float = field(default_factory=time.perf_counter)

    def has(self, heads: float, variant: str) -> bool:
        """Whether an interrupted run has measured this row."""
        return any((row["heads"], row["variant"]) == (heads, variant) for row in self.about["rows"])

    def go_on(self) -> None:
        """Take over the rows that an earlier run with the same settings measured."""
        before = _tables(self.out).get(self.table, {})
        if all(before.get(name) == value for name, value in self.about.items()):
            self.start -= 60 * before["minutes"]
            self.about["rows"] = before["rows"]
        else:
            self.about["rows"] = []

    def calibrator(self, blocks: Tensor, *, refitted: bool) -> tuple[Calibrator, list[LinearRouter]]:
        """A calibrator on `blocks` and its routers, for a model whose W_O will be refitted or not."""
        calibrator = Calibrator(DenseTextModel(self.dense, "linear", copied=False), blocks, 2, progress=False)
        h = self.dense.config.num_attention_heads
        layer = MoHConfig(h, self.shared, h - 1 - self.shared, "linear")
        routers: Any = calibrator.fit_routers([layer] * self.dense.config.num_hidden_layers, refitted=refitted)
        return calibrator, routers

    def measure(self, heads: float, variant: str, model: PreTrainedModel) -> None:
        """Add a row and write the page."""
        measured = {name: perplexity(model, b, batch_size=2) for name, b in self.heldout.items()}
        self.original = self.original or measured
        texts = {}
        for name, now in measured.items():
            above, stderr = perplexity_rise(now.block_losses, self.original[name].block_losses)
            texts[name] = {"perplexity": now.perplexity, "above": above, "stderr": stderr}
        if self.has(heads, variant):
            return
        self.about["rows"].append({"heads": heads, "variant": variant, "texts": texts})
        self.about["minutes"] = round((time.perf_counter() - self.start) / 60, 1)
        _write(self.out, self.table, self.about)
        print(json.dumps(self.about["rows"][-1]), flush=True)


def main() -> None:
    """Parse the options and measure one of the two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixes", action="store_true", help="calibrate on each text alone and on both")
    parser.add_argument("--base", help="dense model (default: SmolLM2-135M, fetched)")
    parser.add_argument(
        "--texts", nargs=2, default=["django-docs", "anarchism"], help="the first calibrates the pieces"
    )
    parser.add_argument("--third", default="botchan", help="a text of neither kind, for --mixes to calibrate on")
    parser.add_argument("--heads", nargs="+", type=int, default=[7, 6, 5], help="heads per layer, shared and routed")
    parser.add_argument("--shared-heads", type=int, help="of each layer (default: as moh.convert shares)")
    parser.add_argument("--calibration-tokens", type=int, default=12_288)
    parser.add_argument("--heldout-tokens", type=int, default=3_072, help="of each text")
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    options = parser.parse_args()
    set_verbosity_error()
    disable_progress_bar()

    base = options.base or default_base_model()
    dense = load_causal_lm(base, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(base)
    training, heldout = {}, {}
    for name in options.texts:
        corpus = load_corpus(name)
        training[name] = pack_tokens(corpus.train, tokenizer, seq_len=SEQ_LEN)
        heldout[name] = _some(pack_tokens(corpus.heldout, tokenizer, seq_len=SEQ_LEN), options.heldout_tokens)
    shared = options.shared_heads
    run = Run(
        table=MIXES if options.mixes else PIECES,
        dense=dense,
        training=training,
        heldout=heldout,
        heads=options.heads,
        shared=router_class("linear").default_shared_heads(dense.config.num_attention_heads)
        if shared is None
        else shared,
        calibration_tokens=options.calibration_tokens,
        out=options.out,
    )
    run.about |= {
        "base": Path(base).name,
        "shared_heads": run.shared,
        "calibration_tokens": options.calibration_tokens // SEQ_LEN * SEQ_LEN,
        "first": options.texts[0],
        "heldout_tokens": {name: b.shape[0] * (b.shape[1] - 1) for name, b in heldout.items()},
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    run.go_on()
    run.measure(dense.config.num_attention_heads, DENSE, dense)
    if options.mixes:
        third = pack_tokens(load_corpus(options.third).train, tokenizer, seq_len=SEQ_LEN)
        _measure_mixes(run, options.third, third)
    else:
        _measure_pieces(run)


def _measure_pieces(run: Run) -> None:
    blocks = _some(run.training[run.about["first"]], run.calibration_tokens)
    calibrator, routers = run.calibrator(blocks, refitted=False)
    costs = calibrator.costs(routers)
    unique_calibrator, unique_routers = run.calibrator(blocks, refitted=True)
    unique_costs = unique_calibrator.costs(unique_routers, refitted=True)
    for heads in run.heads:
        total = heads * len(routers)
        half = router_class("query_norm").default_shared_heads(run.dense.config.num_attention_heads)
        paper = convert(run.dense, shared_heads=half, active_heads=heads - half, router="query_norm")
        run.measure(heads, "the paper's rule: first half of the heads shared, query norms", paper)
        del paper
        even = calibrator.reallocate(routers, _level(costs, heads), total)
        run.measure(heads, "contribution router", _model(run.dense, even))
        uneven = calibrator.reallocate(routers, costs, total)
        run.measure(heads, "contribution router, uneven shares", _model(run.dense, uneven))
        refitted = _model(run.dense, even, calibrator.refit_outputs(even))
        run.measure(heads, "contribution router, refitted W_O", refitted)
        even = unique_calibrator.reallocate(unique_routers, _level(costs, heads), total)
        refitted = _model(run.dense, even, unique_calibrator.refit_outputs(even))
        run.measure(heads, "contribution router by what is unique to a head, refitted W_O", refitted)
        uneven = unique_calibrator.reallocate(unique_routers, unique_costs, total)
        refitted = _model(run.dense, uneven, unique_calibrator.refit_outputs(uneven))
        run.measure(heads, "contribution router by what is unique, uneven shares, refitted W_O", refitted)


def _measure_mixes(run: Run, third: str, third_blocks: Tensor) -> None:
    first = run.about["first"]
    kinds = list(run.training.values())
    mixes = {f"{name} alone": _some(blocks, run.calibration_tokens) for name, blocks in run.training.items()}
    mixes["half of each"] = _parts(kinds, run.calibration_tokens)
    mixes[f"half {first}, half {third}"] = _parts([run.training[first], third_blocks], run.calibration_tokens)
    mixes["half of each, four times the tokens"] = _parts(kinds, 4 * run.calibration_tokens)
    for variant, blocks in mixes.items():
        if all(run.has(heads, variant) for heads in run.heads):
            continue
        calibrator, routers = run.calibrator(blocks, refitted=True)
        costs = calibrator.costs(routers, refitted=True)
        of_shares = [calibrator.reallocate(routers, costs, heads * len(routers)) for heads in run.heads]
        of_layers = {layer: of_layer for layer, of_layer in enumerate(zip(*of_shares, strict=True))}
        adapter = DenseTextModel(run.dense, "linear", copied=False)
        sums = collect_several_outputs(adapter, of_layers, calibrator.refit_batches())
        for index, (heads, routers_here) in enumerate(zip(run.heads, of_shares, strict=True)):
            outputs = [
                refit_output_projection(sums[layer][index], attention.output_weight)
                for layer, attention in enumerate(adapter.attentions)
            ]
            run.measure(heads, variant, _model(run.dense, routers_here, outputs))


def _some(blocks: Tensor, tokens: int) -> Tensor:
    """Blocks of `tokens` tokens in all, evenly spaced."""
    return evenly_spread(blocks, tokens // SEQ_LEN)


def _parts(texts: Sequence[Tensor], tokens: int) -> Tensor:
    """Equally many blocks of each text, `tokens` tokens together."""
    return torch.cat([_some(blocks, tokens // len(texts)) for blocks in texts])


def _level(costs: Tensor, heads: int) -> Tensor:
    """Costs under which every layer gets the same number of heads."""
    return (torch.arange(costs.shape[1], dtype=costs.dtype) - heads).square().expand_as(costs)


def _model(dense: PreTrainedModel, routers: Sequence[LinearRouter], outputs: Sequence[Tensor] = ()) -> PreTrainedModel:
    """The MoH model with these routers, on the dense model's own tensors."""
    adapter = DenseTextModel(dense, "linear", copied=False)
    return adapter.build([r.config for r in routers], routers, outputs, router_aux_loss_coef=0.0)


def _tables(out: Path) -> dict[str, Any]:
    file = out / f"{NAME}.json"
    tables: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return tables


def _write(out: Path, table: str, about: dict[str, Any]) -> None:
    """Add this table to the other one in the results."""
    out.mkdir(parents=True, exist_ok=True)
    tables = {name: kept for name, kept in _tables(out).items() if name in (PIECES, MIXES)} | {table: about}
    write_text(out / f"{NAME}.json", json.dumps(tables, indent=1) + "\n")
    lines = ["# Conversion without training", ""]
    for name in (PIECES, MIXES):
        if name in tables:
            lines += [*_table(name, tables[name]), ""]
    lines.append(f"Made by `python experiments/{NAME}.py` and `python experiments/{NAME}.py --mixes`.")
    write_text(out / f"{NAME}.md", "\n".join(lines) + "\n")


def _table(name: str, about: dict[str, Any]) -> list[str]:
    texts = about["heldout_tokens"]
    lines = [
        INTRODUCTIONS[name].format(**about, four_times=4 * about["calibration_tokens"])
        + f". {about['base']}, no gradient step. Held-out perplexity, and how far it is above the dense original's (± "
        "standard error of the paired difference over blocks of 512 tokens; one run). Held-out tokens: "
        + ", ".join(f"{text} {count:,}" for text, count in texts.items())
        + f". {about['cpu']}, {about['threads']} thread(s), torch {about['torch']}, float32, {about['minutes']} minutes.",
        "",
        f"| heads per layer | {'calibrated on' if name == MIXES else 'variant'} | " + " | ".join(texts) + " |",
        "| --- | --- |" + " --- |" * len(texts),
    ]
    for row in sorted(about["rows"], key=lambda row: -row["heads"]):
        if row["variant"] == DENSE:
            cells = [f"{t['perplexity']:.2f}" for t in row["texts"].values()]
        else:
            cells = [f"{t['perplexity']:.2f} ({t['above']:+.1f} % ± {t['stderr']:.1f})" for t in row["texts"].values()]
        lines.append(f"| {row['heads']} | {row['variant']} | " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    main()
