"""How far the scores of texts move with the batch that they are in: its size, and the side that is padded.

    python experiments/batches.py DENSE MOH

Both are directories; MOH as `moh convert` writes it from DENSE. Scores texts of mixed length one by one, then in batches
padded right and left, and prints for each: how far a text's log-likelihood moves (mean and largest, in nats), and the share
of (token, layer) that choose other heads than in the text alone. Needs the extra `llm`.
"""

from __future__ import annotations

import argparse
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moh import record_routing
from moh.data.text.blocks import evenly_spread
from moh.evaluation import cpu_name
from moh.models.transformers.loading import load_causal_lm, load_tokenizer
from moh.training import load_corpus, pack_tokens


def main() -> None:
    """Parse the options, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense", help="directory of the dense model")
    parser.add_argument("moh", help="directory of the converted model")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--corpora", nargs="+", default=["django-docs", "anarchism"])
    parser.add_argument("--texts", type=int, default=32, help="held-out, of all corpora together")
    parser.add_argument("--longest", type=int, default=256, help="tokens; the shortest text has an eighth of them")
    parser.add_argument("--batch-size", type=int, default=8)
    options = parser.parse_args()
    tokenizer = load_tokenizer(options.dense)
    count = options.texts // len(options.corpora)
    blocks = [pack_tokens(load_corpus(name).heldout, tokenizer, seq_len=options.longest) for name in options.corpora]
    rows = torch.cat([evenly_spread(text, count) for text in blocks])
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(options.longest // 8, options.longest + 1, (len(rows),), generator=generator)
    texts = [row[:length] for row, length in zip(rows, lengths.tolist(), strict=True)]

    print(
        f"{len(texts)} texts of {min(lengths)} to {max(lengths)} tokens of {', '.join(options.corpora)}, {options.dtype};"
    )
    print(f"{cpu_name()}, torch {torch.__version__}\n")
    print("| model | batch | padding | log-likelihood moves by, nats: mean | largest | per token | other heads |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, path in (("dense", options.dense), ("MoH", options.moh)):
        model = load_causal_lm(path, dtype=getattr(torch, options.dtype)).eval()
        alone, chosen = score(model, texts, 1, "right")
        for side in ("right", "left"):
            together, others = score(model, texts, options.batch_size, side)
            moved = (together - alone).abs()
            differ = [(a != b).any(-1).flatten() for a, b in zip(others, chosen, strict=True)]
            share = float(torch.cat(differ).double().mean())
            print(
                f"| {name} | {options.batch_size} | {side} | {float(moved.mean()):.3f} | {float(moved.max()):.3f} | "
                f"{float((moved / lengths).mean()):.4f} | {'–' if name == 'dense' else f'{100 * share:.2f} %'} |",
                flush=True,
            )


@torch.no_grad()
def score(
    model: PreTrainedModel, texts: list[Tensor], batch_size: int, side: Literal["right", "left"]
) -> tuple[Tensor, list[Tensor]]:
    """The log-likelihood of each text, float64, and which heads its tokens use: `[layers, N, H]`, without layers if dense."""
    scores, chosen = [], []
    for start in range(0, len(texts), batch_size):
        batch = texts[start : start + batch_size]
        ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_side=side)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(t) for t in batch], True, padding_side=side)
        positions = (mask.cumsum(1) - 1).clamp(min=0)  # as `generate` does
        with record_routing(model) as routing:
            logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        layers = [info.active for _, info in routing]  # each [B, N, H]
        for index, text in enumerate(batch):
            own = mask[index].bool()
            predictions = logits[index][own][:-1].double().log_softmax(-1)
            scores.append(predictions.gather(1, text[1:, None]).sum())
            chosen.append(torch.stack([layer[index][own] for layer in layers]) if layers else torch.zeros(0, 1, 1))
    return torch.stack(scores), chosen


if __name__ == "__main__":
    main()
