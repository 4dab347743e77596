"""32 requests of mixed length: continuous batching against one request at a time, of a converted model and its original.

    python experiments/continuous_batching.py DENSE MOH

Prints a table of tokens per second of processor time (one thread), which other programs on the machine disturb less than
the time on the clock; and checks that batching gives the tokens of `generate`.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

import moh  # noqa: F401  # registers its models

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense", help="directory of the original")
    parser.add_argument("moh", help="directory of the converted model")
    parser.add_argument("--tokens", type=int, default=8, help="new tokens per request (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    options = GenerationConfig(max_new_tokens=arguments.tokens, do_sample=False, pad_token_id=0)
    print("| model | one at a time | batched | same tokens |\n| --- | --- | --- | --- |", flush=True)
    for name in (arguments.dense, arguments.moh):
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        model.generation_config.eos_token_id = None
        requests = prompts(model.config.vocab_size)
        model.generate(torch.tensor([requests[0]]), max_new_tokens=2, do_sample=False)  # kernels are built
        rates, tokens = [], []
        for run in (one_at_a_time, batched):
            start = time.process_time()
            tokens.append(run(model, requests, options))
            rates.append(REQUESTS * arguments.tokens / (time.process_time() - start))
        same = sum(a == b for a, b in zip(*tokens, strict=True))
        print(f"| {name} | {rates[0]:.1f} | {rates[1]:.1f} | {same} of {REQUESTS} |", flush=True)


if __name__ == "__main__":
    main()
