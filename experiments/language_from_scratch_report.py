"""The measurements of `language_from_scratch.py` on a trained model, and its table and pictures."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import default_collate
from variant_plots import plot_over_layers, plot_scores

from moh._files import write_text
from moh.config import MoHConfig
from moh.data.text.blocks import IGNORED
from moh.data.text.store import StoredBlocks
from moh.evaluation import cpu_name
from moh.inspection.plots import plot_head_load, save
from moh.routing import record_routing

_BATCH = 8


@torch.no_grad()
def measure(model: Any, corpora: Mapping[str, StoredBlocks], most: int) -> dict[str, Any]:
    """Held-out loss of each corpus, and how evenly the heads are used; documents do not see each other.

    Args:
        model: dense or MoH.
        corpora: held-out blocks by name.
        most: blocks of each corpus, evenly spread.
    """
    losses: dict[str, dict[str, float]] = {}
    loads: list[Tensor] = []
    probabilities: list[Tensor] = []
    configs: list[MoHConfig] = []
    batches = 0
    for name, blocks in corpora.items():
        count = min(most, len(blocks))
        chosen = [blocks[int(index)] for index in torch.linspace(0, len(blocks) - 1, count)]
        total, tokens = 0.0, 0
        for start in range(0, count, _BATCH):
            batch = {
                name: part.to(model.device) for name, part in default_collate(chosen[start : start + _BATCH]).items()
            }
            labels = batch.pop("labels")[:, 1:]
            with record_routing(model) as routing:
                logits = model(**batch, use_cache=False).logits[:, :-1]
            total += float(
                F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum")
            )
            tokens += int((labels != IGNORED).sum())
            infos = [info for _, info in routing]
            if infos:
                configs = [info.config for info in infos]
                new = [info.load().double() for info in infos], [info.probs.double().mean((0, 1)) for info in infos]
                loads = new[0] if not loads else [a + b for a, b in zip(loads, new[0], strict=True)]
                probabilities = (
                    new[1] if not probabilities else [a + b for a, b in zip(probabilities, new[1], strict=True)]
                )
                batches += 1
        losses[name] = {"loss": total / tokens, "tokens": tokens}
    tokens = sum(part["tokens"] for part in losses.values())
    loss = sum(part["loss"] * part["tokens"] for part in losses.values()) / tokens
    found: dict[str, Any] = {"loss": loss, "perplexity": math.exp(loss), "heldout_tokens": tokens, "corpora": losses}
    if configs:
        found["load"] = [(load / batches).tolist() for load in loads]  # [L, H]
        found["balance"] = [
            float(c.num_routed * (load[list(c.routed_indices)] * p).sum() / batches**2 / c.active_heads)
            for c, load, p in zip(configs, loads, probabilities, strict=True)
        ]
        found["spread"] = [
            float(load[list(c.routed_indices)].std() / load[list(c.routed_indices)].mean())
            for c, load in zip(configs, loads, strict=True)
        ]
    return found


def report(options: argparse.Namespace) -> None:
    """Write the table, all numbers and the pictures of the existing runs."""
    from language_from_scratch import NAME, VARIANTS, result_file

    rows = {
        v: [json.loads(result_file(options.runs, v, s).read_text(encoding="utf-8")) for s in options.seeds]
        for v in options.variants
    }
    first = next(iter(rows.values()))[0]
    label = {variant: VARIANTS[variant][0] for variant in rows}
    options.out.mkdir(parents=True, exist_ok=True)
    write_text(
        options.out / f"{NAME}.json",
        json.dumps({"cpu": cpu_name(), "torch": torch.__version__, "runs": rows}, indent=1) + "\n",
    )

    scores = {label[v]: [run["perplexity"] for run in runs] for v, runs in rows.items()}
    save(plot_scores(scores, quantity="held-out perplexity", title="One dot per seed, a line at the mean"),
         options.out / f"{NAME}_perplexity.png")  # fmt: skip
    routed = {v: runs for v, runs in rows.items() if "load" in runs[0]}
    if routed:
        save(
            plot_over_layers(
                {label[v]: [run["spread"] for run in runs if "spread" in run] for v, runs in rows.items()},
                quantity="spread of the routed heads' load (std / mean)",
                title="Load balance over the layers, on held-out text",
                level=("all alike", 0.0),
            ),
            options.out / f"{NAME}_balance.png",
        )
        shown = "moh_50" if "moh_50" in routed else next(iter(routed))
        save(plot_head_load(*_mean_load(shown, routed[shown]), title=f"Head load, {label[shown]}, mean of the seeds"),
             options.out / f"{NAME}_load.png")  # fmt: skip

    lines = [
        "# Language models from scratch",
        "",
        f"{options.layers} layers of 12 heads, width {options.width}, a vocabulary of {options.vocabulary:,}, trained on "
        f"{first['tokens']:,} tokens ({first['steps']} steps of {options.batch} x {options.seq_len}) of "
        f"{', '.join(options.corpora)}; {len(options.seeds)} seeds, the same order of the same sequences for every variant of a "
        f"seed; parameters differ only by the routers. Perplexity of {first['heldout_tokens']:,} held-out tokens, "
        "± standard deviation over the seeds; the difference to dense is that of the mean loss, ± the standard error of the "
        "differences of equal seeds. Balance: the paper's loss, "
        f"divided by its value where all routed heads are used equally (1 is best). {cpu_name()}, {options.jobs} runs at a time, "
        f"torch {torch.__version__}, float32.",
        "",
        "| variant | heads per token | parameters | perplexity | against dense | balance, mean of the layers | "
        "least and most used routed head |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *(_row(v, runs, rows.get("dense")) for v, runs in rows.items()),
        "",
        f"{first['tokens'] / first['parameters']:.2f} tokens per parameter are the beginning of training: the table shows which "
        "model starts faster, not which ends better.",
        "",
        "Perplexity by text, mean of the seeds:",
        "",
        "| variant | " + " | ".join(options.corpora) + " |",
        "| --- |" + " --- |" * len(options.corpora),
    ]
    for variant, runs in rows.items():
        cells = [f"{math.exp(mean(run['corpora'][name]['loss'] for run in runs)):.2f}" for name in options.corpora]
        lines.append(f"| {label[variant]} | " + " | ".join(cells) + " |")
    lines += ["", f"![perplexity]({NAME}_perplexity.png)"]
    lines += (
        [f"![load balance over the layers]({NAME}_balance.png)", f"![head load]({NAME}_load.png)"] if routed else []
    )
    lines += ["", f"Made by `python experiments/{NAME}.py {_arguments(options)}`."]
    write_text(options.out / f"{NAME}.md", "\n".join(lines) + "\n")


def _arguments(options: argparse.Namespace) -> str:
    """The options on which the figures depend, as on the command line."""
    length = [f"--steps {options.steps}"] if options.steps else [f"--minutes {options.minutes:g}"]
    names = "layers width vocabulary seq_len batch learning_rate heldout_tokens".split()
    numbers = [f"--{name.replace('_', '-')} {getattr(options, name)}" for name in names]
    lists = [f"--{name} {' '.join(map(str, getattr(options, name)))}" for name in ("seeds", "corpora")]
    return " ".join([*length, *numbers, *lists])


def _row(variant: str, runs: list[dict[str, Any]], dense: list[dict[str, Any]] | None) -> str:
    from language_from_scratch import VARIANTS

    label, router, shared, active = VARIANTS[variant]
    perplexities = [run["perplexity"] for run in runs]
    cells = [
        label,
        "12" if router is None else f"{shared} shared, {active} of {12 - shared}",
        f"{runs[0]['parameters']:,}",
        f"{mean(perplexities):.2f}{_spread(perplexities)}",
    ]
    if dense is None or variant == "dense":
        cells.append("–")
    else:
        rises = [run["loss"] - other["loss"] for run, other in zip(runs, dense, strict=True)]
        error = [100 * rise / math.sqrt(len(rises)) for rise in rises]
        cells.append(f"{100 * math.expm1(mean(rises)):+.1f} %{_spread(error)}")
    if "load" in runs[0]:
        loads = [load[h] for run in runs for load in run["load"] for h in range(shared, 12)]
        cells += [f"{mean(mean(run['balance']) for run in runs):.3f}", f"{min(loads):.2f}, {max(loads):.2f}"]
    else:
        cells += ["–", "–"]
    return "| " + " | ".join(cells) + " |"


def _spread(values: list[float]) -> str:
    return f" ± {stdev(values):.2f}" if len(values) > 1 else ""


def _mean_load(variant: str, runs: list[dict[str, Any]]) -> tuple[Tensor, list[MoHConfig]]:
    """`[L, H]` mean of the seeds, and the heads of each layer."""
    from language_from_scratch import VARIANTS

    _, router, shared, active = VARIANTS[variant]
    load = torch.tensor([run["load"] for run in runs], dtype=torch.float64).mean(0)
    assert router is not None
    return load, [MoHConfig(12, shared, active, router)] * len(load)
