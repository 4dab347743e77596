"""32 requests of mixed length: continuous batching against one request at a time, of a converted model and its original.

    python experiments/continuous_batching.py DENSE MOH

Prints a table of new tokens per second of processor time (one thread), medians and ranges of `--rounds` in turns; and checks that
batching gives the tokens of `generate`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

import moh  # noqa: F401  # registers its models
from moh.evaluation import cpu_name

REQUESTS = 32
SHORTEST, LONGEST = 8, 64


def prompts(vocabulary: int) -> list[list[int]]:
    """Random prompts; the same for all models."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(SHORTEST, LONGEST + 1, (REQUESTS,), generator=generator).tolist()
    return [torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length in lengths]


def one_at_a_time(model: Any, requests: list[list[int]], options: GenerationConfig) -> list[list[int]]:
    return [model.generate(torch.tensor([p]), options)[0, len(p) :].tolist() for p in requests]


def batched(model: Any, requests: list[list[int]], options: GenerationConfig) -> list[list[int]]:
    cache = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=256)
    return [r.generated_tokens for r in model.generate_batch(requests, options, cache, warmup=False).values()]


def rate_and_tokens(
    run: Callable[..., list[list[int]]], model: Any, requests: list[list[int]], options: GenerationConfig
) -> tuple[float, list[list[int]]]:
    """New tokens per second of processor time, and the tokens of each request."""
    start = time.process_time()
    tokens = run(model, requests, options)
    return sum(map(len, tokens)) / (time.process_time() - start), tokens


def cell(rates: list[float]) -> str:
    return f"{statistics.median(rates):.1f} ({min(rates):.1f} to {max(rates):.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense", help="directory of the original")
    parser.add_argument("moh", help="directory of the converted model")
    parser.add_argument("--tokens", type=int, default=8, help="new tokens per request (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of all requests (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()  # it says for each request that none ends early
    options = GenerationConfig(max_new_tokens=arguments.tokens, do_sample=False, pad_token_id=0)
    models = {}
    for name in (arguments.dense, arguments.moh):
        models[name] = model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        model.generation_config.eos_token_id = None
        model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, do_sample=False)  # kernels are built
    rates: dict[tuple[str, str], list[float]] = {}
    same: dict[str, list[int]] = {}
    for _ in range(arguments.rounds):
        for name, model in models.items():
            requests = prompts(model.config.vocab_size)
            alone, expected = rate_and_tokens(one_at_a_time, model, requests, options)
            together, got = rate_and_tokens(batched, model, requests, options)
            rates.setdefault((name, "alone"), []).append(alone)
            rates.setdefault((name, "together"), []).append(together)
            same.setdefault(name, []).append(sum(a == b for a, b in zip(expected, got, strict=True)))
    print(f"{cpu_name()}, torch {torch.__version__}, transformers {transformers.__version__}\n")
    print("| model | one at a time | batched | same tokens |\n| --- | --- | --- | --- |")
    for name in models:
        alone, together = (cell(rates[name, way]) for way in ("alone", "together"))
        print(f"| {name} | {alone} | {together} | {min(same[name])} of {REQUESTS} |")


if __name__ == "__main__":
    main()
