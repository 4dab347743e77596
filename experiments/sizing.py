"""Memory and time per training step of LLaMA3-8B on many GPUs, dense against MoH: computed, not measured.

    python experiments/sizing.py --out docs/results

Writes `sizing.json` and `sizing.md`. The shapes are the published ones; the assumptions on the GPU are options of
`sizing_estimates.Gpu` and listed on the page.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from sizing_estimates import GIB, Gpu, Plan, Size, size
from transformers import LlamaConfig

from moh._files import write_text
from moh.models.transformers import MoHLlamaConfig

LLAMA3_8B = dict(
    vocab_size=160_896,  # the published MoH-LLaMA3-8B's; LLaMA3-8B has 128,256
    hidden_size=4096,
    intermediate_size=14_336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
)
MODELS: dict[str, LlamaConfig] = {
    "dense": LlamaConfig(**LLAMA3_8B),
    "MoH 75 %, query-norm router (the paper's)": MoHLlamaConfig(
        **LLAMA3_8B, router="query_norm", shared_heads=16, active_heads=8
    ),
    "MoH 75 %, linear router": MoHLlamaConfig(**LLAMA3_8B, router="linear", shared_heads=16, active_heads=8),
    "MoH 50 %, linear router": MoHLlamaConfig(**LLAMA3_8B, router="linear", shared_heads=8, active_heads=8),
}
GPUS = (8, 64, 512)
SEQUENCES = (8192, 32_768)
KERNEL = {0.75: 0.85, 0.5: 0.62}
"""Share of heads -> target time of the attention core for our GPU kernels, forward and backward; not measured yet."""


def main() -> None:
    """Compute and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    options = parser.parse_args()
    gpu = Gpu()
    rows = []
    for sequence in SEQUENCES:
        for gpus in GPUS:
            for name, config in MODELS.items():
                share = getattr(config, "share", 1.0)
                for kernel in (None,) if share == 1 else (None, KERNEL[share]):
                    # The paper's 16M tokens per step
                    plan = Plan(gpus, sequence, attention_ratio=kernel)
                    found = size(config, plan, gpu)
                    extra = {"memory": found.memory, "step": found.step, "micro_steps": plan.micro_steps}
                    rows.append({"model": name, "share": share, **asdict(plan), **asdict(found), **extra})
    options.out.mkdir(parents=True, exist_ok=True)
    write_text(options.out / "sizing.json", json.dumps({"gpu": asdict(gpu), "rows": rows}, indent=1) + "\n")
    write_text(options.out / "sizing.md", page(gpu))
    print(options.out / "sizing.md")


def page(gpu: Gpu) -> str:
    """The page, in Markdown."""
    lines = [
        "# What training LLaMA3-8B takes, with the vocabulary of MoH-LLaMA3-8B",
        "",
        "Computed by `python experiments/sizing.py` from the model's shapes; **nothing here is measured**, and none of it "
        "has run on a GPU. It helps to choose a machine, and shows how much of a step MoH can save at all.",
        "",
        "## Assumptions",
        "",
        f"- {gpu.name}: {gpu.flops / 1e12:,.0f} TFLOP/s in bfloat16 (matrix products reach {gpu.matmul:.0%}, the "
        f"attention core {gpu.attention:.0%}); {gpu.gpus_per_node} GPUs per node, {gpu.intra_node / 1e9:.0f} GB/s per GPU "
        f"inside a node and {gpu.inter_node / 1e9:.0f} GB/s per GPU between nodes ({gpu.network:.0%} are reached); "
        f"{gpu.reserved / GIB:.0f} GiB kept for the context, collectives and fragmentation.",
        "- FSDP over all GPUs: float32 weights, two float32 moments of AdamW and float32 gradients are sharded; weights "
        "are gathered in bfloat16 for forward and again for backward, gradients reduced in float32, in every micro-step.",
        "- One sequence per GPU and micro-step, 16,777,216 tokens per step in total (the paper's second stage), every layer "
        "checkpointed: its input is kept, and it runs forward once more. Logits of the whole sequence are held in bfloat16 "
        "and, with their gradient, in float32.",
        "- Traffic overlaps with computing, so a step takes the longer of the two. Data loading, the optimiser's own time, "
        "norms and other bandwidth-bound operations are left out; real steps are longer.",
        "- Keys, values and the feed-forward layers are computed for every token, whichever heads are active; queries and the "
        "output projection only for active heads, but the query-norm router needs all queries first.",
        "- The attention core's time is given twice: in proportion to the share of heads used (which no kernel quite reaches), "
        f"and with the target ratios of our GPU kernels, {', '.join(f'{r} at {s:.0%}' for s, r in KERNEL.items())}.",
    ]
    for sequence in SEQUENCES:
        lines += ["", f"## Sequences of {sequence:,} tokens", ""]
        lines += [
            "| GPUs | model | memory, GiB | micro-steps | computing, s | attention's part, s | traffic, s | step, s | of dense |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for gpus in GPUS:
            dense = size(MODELS["dense"], Plan(gpus, sequence), gpu)
            for name, config in MODELS.items():
                lines.append(_row(name, config, Plan(gpus, sequence), gpu, dense))
    found = size(MODELS["dense"], Plan(64), gpu)
    lines += [
        "",
        "## Where the memory goes",
        "",
        f"The dense model, {found.parameters:,} parameters, in GiB per GPU; MoH adds at most a router of "
        f"{size(MODELS['MoH 75 %, linear router'], Plan(64), gpu).parameters - found.parameters:,} parameters.",
        "",
        "| sequence | GPUs | weights | optimiser | gradients | gathered | inputs, one layer | logits | reserved | total |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for sequence in SEQUENCES:
        for gpus in GPUS:
            one = size(MODELS["dense"], Plan(gpus, sequence), gpu)
            parts = (one.weights, one.optimizer, one.gradients, one.gathered, one.activations, one.logits, one.reserved)
            cells = [f"{part / GIB:.1f}" for part in (*parts, one.memory)]
            over = " (too much)" if one.memory > gpu.memory else ""
            lines.append(f"| {sequence:,} | {gpus} | " + " | ".join(cells) + f"{over} |")
    lines += [
        "",
        "Where it is too much, these help: the loss over parts of the sequence at a time (logits then take next to nothing), "
        "tensor parallelism of heads, or sequences spread over GPUs.",
        "",
        "## What it shows",
        "",
        *_conclusions(gpu),
    ]
    return "\n".join(lines) + "\n"


def _row(name: str, config: LlamaConfig, plan: Plan, gpu: Gpu, dense: Size) -> str:
    found = size(config, plan, gpu)
    share = getattr(config, "share", 1.0)
    sizes = [found]
    if share != 1:
        sizes.append(size(config, Plan(plan.gpus, plan.sequence, attention_ratio=KERNEL[share]), gpu))

    def both(values: list[float], digits: int) -> str:
        texts = [f"{value:.{digits}f}" for value in values]
        return texts[0] if len(set(texts)) == 1 else " to ".join(texts)

    cells = [
        str(plan.gpus),
        name,
        f"{found.memory / GIB:.1f}",
        f"{plan.micro_steps:,}",
        both([s.compute for s in sizes], 1),
        both([s.attention for s in sizes], 1),
        f"{found.communication:.1f}",
        both([s.step for s in sizes], 1),
        both([s.step / dense.step for s in sizes], 3),
    ]
    return "| " + " | ".join(cells) + " |"


def _conclusions(gpu: Gpu) -> list[str]:
    found = []
    for sequence in SEQUENCES:
        dense = size(MODELS["dense"], Plan(64, sequence), gpu)
        half = size(MODELS["MoH 50 %, linear router"], Plan(64, sequence, attention_ratio=KERNEL[0.5]), gpu)
        paper = size(
            MODELS["MoH 75 %, query-norm router (the paper's)"], Plan(64, sequence, attention_ratio=KERNEL[0.75]), gpu
        )
        found.append(
            f"- With {sequence:,} tokens the attention core is {dense.attention / dense.compute:.0%} of the dense model's "
            f"computing. With the kernels' target times the paper's model saves {1 - paper.step / dense.step:.1%} of a step, "
            f"and one with half of the heads and a linear router {1 - half.step / dense.step:.1%}."
        )
    return found


if __name__ == "__main__":
    main()
