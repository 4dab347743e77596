"""One saved model for several shares of heads: how much it loses against models converted for each share alone.

    python experiments/budgets_in_one_model.py --out docs/results --scratch /var/tmp/budgets

Calibrates on a mix of two texts, one pass for the routers, one for the layers' costs and one for W_O at every number of
heads; all variants use the results, which are kept in --scratch, so that an interrupted run can resume. No gradient step.
Writes `budgets_in_one_model.json` and `.md` after every row; about 40 minutes on one slow core. Extra `llm`.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.logging import set_verbosity_error

from moh._files import write_text
from moh.config import MoHConfig
from moh.conversion.calibrator import Calibrator, dial_costs, hand_out, keep_output_changes, least_heads, with_heads
from moh.conversion.fit import OUTPUT_RIDGE, low_rank_change
from moh.conversion.passes import OutputSums, collect_several_outputs
from moh.conversion.transformers import DenseTextModel
from moh.data.text.blocks import evenly_spread
from moh.demo.base_model import default_base_model
from moh.evaluation import cpu_name, perplexity, perplexity_rise
from moh.models.dial import set_active_heads
from moh.models.output_changes import output_projection, routed_attentions
from moh.models.transformers.loading import load_causal_lm, load_tokenizer
from moh.routing import LinearRouter
from moh.training import load_corpus, pack_tokens

NAME = "budgets_in_one_model"
ALONE = "converted for this share alone (W_O refitted at full rank)"
JOINT = "one W_O refitted to all shares at once"
NONE = "W_O untouched"


def main() -> None:
    """Parse the options, fit what all variants share, measure every variant, write the results after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="dense model (default: SmolLM2-135M, fetched)")
    parser.add_argument("--texts", nargs=2, default=["django-docs", "anarchism"], help="half the calibration each")
    parser.add_argument("--heads", nargs="+", type=int, default=[6, 5, 7, 8], help="mean heads per layer")
    parser.add_argument("--ranks", nargs="+", type=int, default=[64], help="of the output changes")
    parser.add_argument("--shared-heads", type=int, default=2)
    parser.add_argument("--calibration-tokens", type=int, default=12_288, help="of both texts together")
    parser.add_argument("--heldout-tokens", type=int, default=2_048, help="of each text")
    parser.add_argument("--scratch", type=Path, required=True, help="directory for what is fitted once")
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    options = parser.parse_args()
    set_verbosity_error()
    options.scratch.mkdir(parents=True, exist_ok=True)
    options.out.mkdir(parents=True, exist_ok=True)

    base = options.base or default_base_model()
    dense = load_causal_lm(base, dtype=torch.float32).eval()
    blocks = _blocks(options, load_tokenizer(base), dense.config.vocab_size)
    fitted = _fitted(options, dense, blocks["calibration"])
    model = _model(options, dense, fitted)
    original = [output_projection(a).weight.detach().clone() for a in routed_attentions(model)]
    heldout = {name: blocks[name] for name in options.texts}
    result: dict[str, Any] = {
        "base": Path(base).name,
        "calibrated_on": f"{' and '.join(options.texts)}, {blocks['calibration'].numel()} tokens together",
        "heldout_tokens": {name: b.shape[0] * (b.shape[1] - 1) for name, b in heldout.items()},
        "shared_heads": options.shared_heads,
        "parameters": {str(rank): _parameters(fitted, rank) for rank in options.ranks},
        "base_parameters": dense.num_parameters(),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rows": [],
    }
    dense_losses = _losses(dense, heldout)
    h = dense.config.num_attention_heads
    result["rows"].append(_row(h, "dense original", dense_losses, dense_losses))
    one_model = {}
    for rank in options.ranks:
        one_model[rank] = _model(options, dense, fitted)
        factors = [[(left[:, :rank], right[:rank]) for left, right in layer] for layer in fitted["factors"]]
        one_model[rank].config.head_costs = dial_costs(fitted["costs"])
        keep_output_changes(one_model[rank], fitted["numbers"], factors)
    differences = [_difference(moh, dense, blocks["calibration"][:1]) for moh in one_model.values()]
    result["all_heads_active"] = max(differences)

    def add(heads: int, variant: str, measured: PreTrainedModel) -> None:
        result["rows"].append(_row(heads, variant, _losses(measured, heldout), dense_losses))
        _write(options.out, result)
        print(json.dumps(result["rows"][-1]), flush=True)

    allocations = {n: hand_out(fitted["costs"], n * len(original)) for n in options.heads}
    main_rank, *other_ranks = options.ranks
    for variant in (ALONE, main_rank, JOINT, *other_ranks, NONE):  # the ones that matter first, at every share
        for heads, layers in allocations.items():
            if isinstance(variant, int):
                moh = one_model[variant]
                set_active_heads(moh, heads / h)
                assert [c.num_shared + c.active_heads for c in moh.config.layer_configs()] == layers
                add(heads, f"one model, output changes of rank {variant}", moh)
                continue
            set_active_heads(model, [n - options.shared_heads for n in layers])
            with torch.no_grad():
                for index, (attention, n) in enumerate(zip(routed_attentions(model), layers, strict=True)):
                    weight = output_projection(attention).weight
                    weight.copy_(original[index])
                    if variant == ALONE and n < h:
                        weight.add_(fitted["full"][index][fitted["numbers"].index(n)])
                    elif variant == JOINT and n < h:
                        weight.add_(fitted["joint"][index])
            add(heads, variant, model)


def _blocks(options: argparse.Namespace, tokenizer: Any, vocabulary: int) -> dict[str, Tensor]:
    """Blocks of 512 tokens: the calibration mix and each text's held-out part."""
    file = options.scratch / "blocks.pt"
    if not file.exists():
        blocks, calibration = {}, []
        for name in options.texts:
            corpus = load_corpus(name)
            every = max(1, len(corpus.train) // 60)  # documents enough to choose from, without tokenising all
            calibration.append(evenly_spread(pack_tokens(corpus.train[::every], tokenizer, seq_len=512),
                                     options.calibration_tokens // 1024))  # fmt: skip
            blocks[name] = evenly_spread(
                pack_tokens(corpus.heldout, tokenizer, seq_len=512), options.heldout_tokens // 512
            )
        torch.save(blocks | {"calibration": torch.cat(calibration)}, file)
    blocks = torch.load(file)
    assert int(max(b.max() for b in blocks.values())) < vocabulary
    return blocks


def _fitted(options: argparse.Namespace, dense: Any, calibration: Tensor) -> dict[str, Any]:
    """The routers, the layers' costs, and the output changes."""
    file = options.scratch / "fitted.pt"
    if file.exists():
        fitted: dict[str, Any] = torch.load(file)
        return fitted
    adapter = DenseTextModel(dense, "linear", copied=True)
    h, shared, layers = dense.config.num_attention_heads, options.shared_heads, dense.config.num_hidden_layers
    calibrator = Calibrator(adapter, calibration, 2, progress=False)
    routers: Any = calibrator.fit_routers([MoHConfig(h, shared, h - shared, "linear")] * layers, refitted=True)
    costs = calibrator.costs(routers, refitted=True)
    numbers = list(range(max(least_heads(h), shared), h))
    full, factors, joint = [], [], []
    for start in range(0, layers, 30):  # as many at a time as fit into memory
        chosen = {i: [with_heads(routers[i], n) for n in numbers] for i in range(start, min(start + 30, layers))}
        for index, sums in collect_several_outputs(adapter, chosen, calibrator.refit_batches()).items():
            weight = dense.model.layers[index].self_attn.o_proj.weight
            full.append([_full_change(s, weight) for s in sums])
            factors.append([low_rank_change(s, weight, rank=max(options.ranks)) for s in sums])
            total = OutputSums(torch.stack([s.gg for s in sums]).sum(0), torch.stack([s.gz for s in sums]).sum(0))
            joint.append(_full_change(total, weight))
    states = [(r.config.shared_indices, r.state_dict()) for r in routers]
    fitted = {"numbers": numbers, "costs": costs, "full": full, "factors": factors, "joint": joint, "routers": states}
    torch.save(fitted, file)
    return fitted


def _model(options: argparse.Namespace, dense: Any, fitted: dict[str, Any]) -> Any:
    """A MoH model with its routers, all heads active, W_O untouched."""
    h = dense.config.num_attention_heads
    routers = []
    for indices, state in fitted["routers"]:
        router = LinearRouter(MoHConfig(h, indices, h - len(indices), "linear"), dense.config.hidden_size)
        router.load_state_dict(state)
        routers.append(router)
    adapter = DenseTextModel(dense, "linear", copied=True)
    return adapter.build([r.config for r in routers], routers, [], router_aux_loss_coef=0.0)


def _full_change(sums: OutputSums, o_proj: Tensor) -> Tensor:
    """The refit of W_O as a change of o_proj's weight, at full rank."""
    measure = sums.gg + OUTPUT_RIDGE * sums.gg.diagonal().mean() * torch.eye(len(sums.gg), dtype=torch.float64)
    return torch.linalg.solve(measure, (sums.gz - sums.gg) @ o_proj.detach().double().T).T.float().contiguous()


def _parameters(fitted: dict[str, Any], rank: int) -> int:
    """How many numbers the output changes of all layers take."""
    return sum(rank * (left.shape[0] + right.shape[1]) for layer in fitted["factors"] for left, right in layer)


@torch.no_grad()
def _difference(model: PreTrainedModel, dense: PreTrainedModel, ids: Tensor) -> float:
    """Largest difference of the logits to the original's with all heads active, relative to the largest logit."""
    set_active_heads(model, 1.0)
    expected = dense(ids).logits
    return float((model(ids).logits - expected).abs().max() / expected.abs().max())


def _losses(model: PreTrainedModel, heldout: dict[str, Tensor]) -> dict[str, tuple[float, ...]]:
    return {name: perplexity(model, b, batch_size=1, progress=False).block_losses for name, b in heldout.items()}


def _row(
    heads: int, variant: str, now: dict[str, Sequence[float]], dense: dict[str, Sequence[float]]
) -> dict[str, Any]:
    texts = {}
    for name, losses in now.items():
        above, stderr = perplexity_rise(losses, dense[name])
        texts[name] = {
            "perplexity": math.exp(sum(losses) / len(losses)),
            "above": above,
            "stderr": stderr,
            "block_losses": list(losses),
        }
    return {"heads": heads, "variant": variant, "texts": texts}


def _write(out: Path, result: dict[str, Any]) -> None:
    names = list(result["heldout_tokens"])
    alone = {row["heads"]: row for row in result["rows"] if row["variant"] == ALONE}
    sizes = ", ".join(
        f"{n:,} numbers at rank {r} ({100 * n / result['base_parameters']:.1f} % of the model's)"
        for r, n in result["parameters"].items()
    )
    lines = [
        "# Several shares in one model",
        "",
        f"{result['base']}, {result['shared_heads']} shared heads, contribution router, heads distributed over the layers by "
        f"measured cost, calibrated on {result['calibrated_on']}, no gradient step. Held-out perplexity; in brackets how far "
        "it is above the dense original's (± standard error of the paired difference over blocks of 512 tokens) and, "
        "after the slash, above that of the model converted for this share alone. Held-out tokens: "
        + ", ".join(f"{n} {t:,}" for n, t in result["heldout_tokens"].items())
        + f". {result['cpu']}, {result['threads']} thread(s), torch {result['torch']}, float32.",
        "",
        "| heads per layer | variant | " + " | ".join(names) + " |",
        "| --- | --- |" + " --- |" * len(names),
    ]
    for row in sorted(result["rows"], key=lambda row: -row["heads"]):
        cells = []
        for name in names:
            text = row["texts"][name]
            cell = f"{text['perplexity']:.2f}"
            if row["variant"] != "dense original":
                against = 100 * (text["perplexity"] / alone[row["heads"]]["texts"][name]["perplexity"] - 1)
                beside = "" if row["variant"] == ALONE else f" / {against:+.1f} %"
                cell += f" ({text['above']:+.1f} % ± {text['stderr']:.1f}{beside})"
            cells.append(cell)
        lines.append(f"| {row['heads']} | {row['variant']} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"With all heads active the logits of the one model differ from the original's by "
        f"{result['all_heads_active']:.1e} of the largest. The output changes take {sizes}.",
        "",
        f"Made by `python experiments/{NAME}.py --scratch DIR`.",
    ]
    write_text(out / f"{NAME}.json", json.dumps(result, indent=1) + "\n")
    write_text(out / f"{NAME}.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
