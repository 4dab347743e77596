"""What it would change to keep a converted model's routers in float32 while the rest is in bfloat16.

    python experiments/router_precision.py MODEL

MODEL is a converted language model, in float32, as `moh convert --router linear --dtype float32` writes it. Prints a
table: the share of (token, layer) whose heads differ from those of the float32 model, and perplexity, on held-out text,
for the whole model in float32, all of it in bfloat16, and bfloat16 with routers in float32. Needs the extra `llm`.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from moh import record_routing
from moh.data.text.blocks import evenly_spread
from moh.evaluation import PerplexityResult, cpu_name, perplexity, perplexity_rise
from moh.models.transformers.loading import load_causal_lm, load_tokenizer
from moh.routing import Router
from moh.training import load_corpus, pack_tokens

SEQ_LEN = 512


def main() -> None:
    """Parse the options, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="directory of the converted model")
    parser.add_argument("--corpora", nargs="+", default=["django-docs", "anarchism"])
    parser.add_argument("--tokens", type=int, default=8_192, help="held-out, of all corpora together")
    options = parser.parse_args()
    tokenizer = load_tokenizer(options.model)
    count = options.tokens // SEQ_LEN // len(options.corpora)
    texts = [pack_tokens(load_corpus(name).heldout, tokenizer, seq_len=SEQ_LEN) for name in options.corpora]
    blocks = torch.cat([evenly_spread(text, count) for text in texts])

    print(f"{blocks.numel():,} tokens of {', '.join(options.corpora)}; {cpu_name()}, torch {torch.__version__}\n")
    print("| model | routers | other heads than in float32 | perplexity | above float32 |")
    print("| --- | --- | --- | --- | --- |")
    expected: list[Tensor] = []
    base: PerplexityResult | None = None
    for dtype, routers in (
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
    ):
        model = load_causal_lm(options.model, dtype=torch.float32).eval()
        kept = {name: m.state_dict() for name, m in model.named_modules() if isinstance(m, Router)}
        kept = {name: {key: tensor.clone() for key, tensor in state.items()} for name, state in kept.items()}
        model.to(dtype)
        if routers != dtype:
            for name, state in kept.items():
                _keep(model.get_submodule(name), state, routers)
        with record_routing(model) as routing:
            measured = perplexity(model, blocks, batch_size=2)
        chosen = [info.active.cpu() for _, info in routing]
        expected, base = expected or chosen, base or measured
        differ = torch.cat([(a != b).any(-1).flatten() for a, b in zip(chosen, expected, strict=True)]).double()
        above, stderr = perplexity_rise(measured.block_losses, base.block_losses)
        names = (str(t).removeprefix("torch.") for t in (dtype, routers))
        print(
            f"| {' | '.join(names)} | {100 * float(differ.mean()):.2f} % | {measured.perplexity:.3f} | "
            f"{above:+.2f} % ± {stderr:.2f} |",
            flush=True,
        )


def _keep(router: Router, state: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Give the router these weights and let it compute in `dtype`; its gates are in its input's dtype."""
    router.to(dtype)
    router.load_state_dict(state)
    scores = router.linear_scores()
    assert scores is not None
    scores.register_forward_pre_hook(lambda _, args: (args[0].to(dtype),))


if __name__ == "__main__":
    main()
