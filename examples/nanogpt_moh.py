"""A language model in one file whose attention heads are experts, next to the same model with dense attention.

    python examples/nanogpt_moh.py                      # a few minutes on two cores
    python examples/nanogpt_moh.py --text book.txt --steps 3000 --bf16

Both models learn to predict the next character of the same text in the same order. The script prints losses, times and a
sample of each, and draws both curves into nanogpt_moh.png. Without --text it reads Python's own help texts.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import moh


class DenseAttention(nn.Module):
    """The attention to compare with: every token uses every head."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)

    def forward(self, x: Tensor, *, is_causal: bool, rotate: moh.RotaryEmbedding, cache: moh.KVCache | None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [B, H, N, D] each
        start = 0 if cache is None else cache.length
        q, k = rotate(q, start).to(v.dtype), rotate(k, start).to(v.dtype)
        if cache is not None:
            k, v = cache.update(k, v)
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal and start == 0)
        return self.proj(heads.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, attention: nn.Module, width: int) -> None:
        super().__init__()
        self.attention = attention
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, rotate: moh.RotaryEmbedding, cache: moh.KVCache | None) -> Tensor:
        x = x + self.attention(self.norms[0](x), is_causal=True, rotate=rotate, cache=cache)
        return x + self.mlp(self.norms[1](x))


class GPT(nn.Module):
    """A decoder; `share` of its heads work for each token, and 2 of them for every token. None means dense attention."""

    def __init__(self, vocabulary: int, layers: int, heads: int, width: int, share: float | None) -> None:
        super().__init__()

        def attention() -> nn.Module:
            if share is None:
                return DenseAttention(width, heads)
            return moh.MoHAttention(width, heads, shared_heads=2, active_heads=round(share * heads) - 2)

        self.embed = nn.Embedding(vocabulary, width)
        self.rotate = moh.RotaryEmbedding(width // heads)
        self.blocks = nn.ModuleList(Block(attention(), width) for _ in range(layers))
        self.norm, self.output = nn.RMSNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor, caches: list[moh.KVCache] | None = None) -> Tensor:
        """Logits `[B, N, vocabulary]` of tokens `[B, N]`, which continue those in the caches."""
        x = self.embed(tokens)
        for index, block in enumerate(self.blocks):
            x = block(x, self.rotate, None if caches is None else caches[index])
        return self.output(self.norm(x))

    @torch.inference_mode()
    def generate(self, tokens: Tensor, count: int, temperature: float = 0.8) -> Tensor:
        """`tokens` `[B, N]` with `count` more, drawn one by one; each step computes the newest token alone."""
        caches = [moh.KVCache(tokens.shape[1] + count) for _ in self.blocks]
        new = tokens
        for _ in range(count):
            probabilities = (self(new, caches)[:, -1] / temperature).softmax(-1)
            new = torch.multinomial(probabilities, 1)
            tokens = torch.cat([tokens, new], dim=1)
        return tokens


def batches(text: Tensor, batch: int, length: int, steps: int, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """(tokens, next tokens), `[batch, length]` each, from random places of the text; the same ones for the same seed."""
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(len(text) - length, (batch, 1), generator=draw)
        rows = text[starts + torch.arange(length + 1)]
        yield rows[:, :-1], rows[:, 1:]


def loss_of(model: GPT, tokens: Tensor, targets: Tensor, bf16: bool) -> Tensor:
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=bf16):
        logits = model(tokens)
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def train(model: GPT, text: Tensor, options: argparse.Namespace) -> tuple[list[float], float]:
    """Train a model; returns the loss of each step, in nats per character, and the seconds of a step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.learning_rate, total_steps=options.steps)
    losses, started = [], time.perf_counter()
    drawn = batches(text, options.batch, options.length, options.steps, options.seed)
    for step, (tokens, targets) in enumerate(drawn):
        with moh.record_routing(model) as routing:
            loss = loss_of(model, tokens, targets, options.bf16)
        # Without it a router may use a few heads for all tokens. A dense model has no routing and no such loss.
        balance = routing.balance_loss() if routing.layers else 0.0
        (loss + 0.01 * balance).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        if step % 50 == 0 or step == options.steps - 1:
            print(f"  step {step:5d}  loss {loss.item():.3f}", flush=True)
    return losses, (time.perf_counter() - started) / options.steps


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="a text file to learn (default: Python's help texts)")
    parser.add_argument(
        "--share", type=float, default=0.5, help="of the heads that a token uses (default: %(default)s)"
    )
    for name, default in (("layers", 4), ("heads", 8), ("width", 256), ("length", 256), ("batch", 8), ("steps", 300)):
        parser.add_argument(f"--{name}", type=int, default=default, help="(default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="at its peak (default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the weights and the training data (default: %(default)s)"
    )
    parser.add_argument("--bf16", action="store_true", help="mixed precision: products in bfloat16, weights in float32")
    parser.add_argument("--output", type=Path, default=Path("nanogpt_moh.png"), help="picture (default: %(default)s)")
    options = parser.parse_args(arguments)

    if options.text:
        text = options.text.read_text(encoding="utf-8")
    else:
        from pydoc_data.topics import topics

        text = "\n".join(topics.values())
    letters = sorted(set(text))
    tokens = torch.tensor([letters.index(letter) for letter in text])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    split = len(tokens) * 9 // 10
    learned, heldout = tokens[:split].to(device), tokens[split:].to(device)
    curves = {}
    for name, share in (("dense", None), (f"MoH, {options.share:.0%} of the heads", options.share)):
        torch.manual_seed(options.seed)
        model = GPT(len(letters), options.layers, options.heads, options.width, share).to(device)
        print(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters")
        curves[name], seconds = train(model, learned, options)
        model.eval()
        with torch.no_grad():
            pairs = batches(heldout, options.batch, options.length, 20)
            losses = torch.stack([loss_of(model, *pair, options.bf16) for pair in pairs])
        error = losses.std() / math.sqrt(len(losses))
        print(f"  held-out loss {losses.mean():.3f} ± {error:.3f}, {1000 * seconds:.0f} ms a step")
        print("  " + repr("".join(letters[i] for i in model.generate(heldout[None, :20], 100)[0])))

    import matplotlib.pyplot as plt

    for name, losses in curves.items():
        plt.plot(torch.tensor(losses).unfold(0, min(20, len(losses)), 1).mean(-1), label=name)
    plt.xlabel("step")
    plt.ylabel("loss, nats per character (mean of 20 steps)")
    plt.legend()
    plt.savefig(options.output, dpi=150)
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
