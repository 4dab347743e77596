"""Which heads lose facts that are far back? A converted model answers with some gates open at the question alone.

    moh convert MODEL DIR --shared-heads 2 --active-heads 5 --calibration django-docs anarchism  # without (M21)
    python experiments/far_facts.py DIR --dense MODEL

The texts are those of `long_texts.py` with 4,096 tokens; asked are the facts at their beginning and at a quarter, 3,000 tokens
back and more. The model reads each text with its own gates; then every question is answered with them, with all heads, with all
heads of one layer, and with one more head of the layer that helps most. Prints a table. Some 15 minutes for SmolLM2-135M. Needs
the extra `llm`.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from long_texts_needles import Haystack, haystacks
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import moh  # noqa: F401  registers our models
from moh.models.output_changes import routed_attentions
from moh.models.transformers.loading import load_causal_lm, load_tokenizer
from moh.training import load_corpus

LENGTH = 4096
DEPTHS = (0, 1)
"""Which of the five needles are asked for."""

OPEN = 1e4
"""Added to a head's predicted contribution: above every threshold."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="converted, with the router threshold or linear")
    parser.add_argument("--dense", required=True, help="the model that it was converted from")
    parser.add_argument("--texts", nargs="+", default=["anarchism", "python-doc"], help="whose held-out parts are read")
    parser.add_argument("--haystacks", type=int, default=12)
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    documents = [document for text in options.texts for document in load_corpus(text).heldout]
    made = haystacks(documents, load_tokenizer(options.dense), length=LENGTH, count=options.haystacks, seed=LENGTH)
    dense = load_causal_lm(_place(options.dense), dtype=torch.float32).eval()
    print("| model | of the facts found | margin, nats |\n| --- | --- | --- |")
    show("the dense model", answers(dense, made, read(dense, made)))
    del dense
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    routers: list[Any] = [attention.router for attention in routed_attentions(model)]
    caches = read(model, made)
    show("the converted model", answers(model, made, caches))
    every = range(routers[0].config.num_heads)
    with opened([(router, every) for router in routers]):
        show("the same with all heads at the question", answers(model, made, caches))
    margins = []
    for layer, router in enumerate(routers):
        with opened([(router, every)]):
            found = answers(model, made, caches)
        show(f"all heads of layer {layer}", found)
        margins.append(fmean(found))
    best = max(range(len(routers)), key=margins.__getitem__)
    for head in every:
        with opened([(routers[best], [head])]):
            show(f"head {head} of layer {best}", answers(model, made, caches))


def _place(name: str) -> str | Path:
    return Path(name) if Path(name).exists() else name


def read(model: nn.Module, made: Sequence[Haystack]) -> list[Any]:
    """The cache of each text."""
    return [model(input_ids=one.ids, use_cache=True, logits_to_keep=1).past_key_values for one in made]


def answers(model: nn.Module, made: Sequence[Haystack], caches: Sequence[Any]) -> list[float]:
    """For each question the log-likelihood of the right word minus that of the likeliest wrong one."""
    margins: list[float] = []
    for haystack, cache in zip(made, caches, strict=True):
        for right in DEPTHS:
            output = model(input_ids=haystack.questions[right], past_key_values=copy.deepcopy(cache), logits_to_keep=1)
            scores: Tensor = output.logits[0, -1].float()[haystack.answers]
            margins.append(float(scores[right] - scores[torch.arange(len(scores)) != right].max()))
    return margins


@contextmanager
def opened(heads: Sequence[tuple[Any, Sequence[int]]]) -> Iterator[None]:
    """These heads of these routers are used by every token."""
    before = [router.contribution.bias.clone() for router, _ in heads]
    for router, chosen in heads:
        router.contribution.bias[list(chosen)] += OPEN
    try:
        yield
    finally:
        for (router, _), bias in zip(heads, before, strict=True):
            router.contribution.bias.copy_(bias)


def show(name: str, margins: Sequence[float]) -> None:
    """A row of the table."""
    print(f"| {name} | {sum(m > 0 for m in margins)} of {len(margins)} | {fmean(margins):+.2f} |", flush=True)


if __name__ == "__main__":
    main()
