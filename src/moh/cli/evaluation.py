"""`moh eval MODEL`: perplexity of a language model, accuracy of an image classifier.

`moh eval lm` is in `harness`, `moh eval fid` in `scores`.
"""

from __future__ import annotations

import json
import math
from argparse import Namespace
from typing import TYPE_CHECKING

from moh.cli import harness, scores
from moh.cli.options import add_command, add_images, add_text, read_corpus, read_images, reads_images, token_blocks

if TYPE_CHECKING:
    from moh.cli.options import Commands


def add_parser(sub: Commands) -> None:
    """Add `eval`, `eval fid` and `eval lm` to the commands."""
    about = "Perplexity of a language model on held-out text, or accuracy of an image classifier."
    evaluate = add_command(sub, "eval", about, run)
    evaluate.add_argument("model", help="directory, hub name or .gguf file; dense or MoH")
    add_text(evaluate)
    add_images(evaluate)
    evaluate.add_argument("--all-text", action="store_true", help="use all of --files, not their held-out tenth")
    evaluate.add_argument("--seq-len", type=int, default=512, help="tokens per block (default: %(default)s)")
    evaluate.add_argument("--max-tokens", type=int, default=32_768, help="at most this many (default: %(default)s)")
    evaluate.add_argument("--json", action="store_true", help="print JSON")
    evaluate.longer = {"fid": scores.add_parser(sub), "lm": harness.add_parser(sub)}


def run(arguments: Namespace) -> None:
    if reads_images(arguments):
        _run_images(arguments)
    else:
        _run_text(arguments)


def _run_text(arguments: Namespace) -> None:
    from moh.evaluation import perplexity
    from moh.models.transformers.loading import default_device, load_causal_lm, load_tokenizer

    tokenizer = load_tokenizer(arguments.model)
    if arguments.all_text:
        from moh.training import read_texts

        if not arguments.files:
            raise ValueError("--all-text needs --files")
        texts = read_texts(arguments.files)
    else:
        texts = read_corpus(arguments).heldout
    result = perplexity(
        load_causal_lm(arguments.model, device=default_device()),
        token_blocks(texts, tokenizer, seq_len=arguments.seq_len, max_tokens=arguments.max_tokens),
    )
    if arguments.json:
        stderr = None if math.isnan(result.stderr) else result.stderr  # a single block; JSON has no NaN
        print(json.dumps({"perplexity": result.perplexity, "loss": result.loss, "stderr": stderr,
                          "tokens": result.tokens}))  # fmt: skip
    else:
        print(
            f"perplexity {result.perplexity:.3f} (loss {result.loss:.4f} ± {result.stderr:.4f} nats per token, "
            f"{result.tokens:,} tokens)"
        )


def _run_images(arguments: Namespace) -> None:
    """Top-1 and more of a classifier."""
    from moh.evaluation import evaluate_images
    from moh.models.classifiers import load_classifier
    from moh.models.transformers.loading import default_device

    model = load_classifier(arguments.model, device=default_device())
    images = read_images(arguments)
    result = evaluate_images(model, images, batch_size=arguments.batch_size, workers=arguments.workers)
    if arguments.json:
        print(json.dumps({
            "top1": result.top1, "top5": result.top5, "loss": result.loss, "images": result.images,
            "skipped": len(result.skipped), "images_per_second": result.images_per_second, "share": result.share,
            "per_class": result.per_class,
        }))  # fmt: skip
        return
    print(
        f"top-1 {result.top1:.2f} %, top-5 {result.top5:.2f} %, loss {result.loss:.4f} "
        f"({result.images:,} images, {len(result.skipped)} skipped)"
    )
    heads = (
        "dense: every token uses all heads" if result.share is None else f"{100 * result.share:.0f} % of the heads used"
    )
    print(f"{result.images_per_second:,.0f} images/s; {heads}")
    known = sorted((value, name) for name, value in result.per_class.items() if value is not None)
    named = ", ".join(f"{name} {value:.1f} %" for value, name in known[:5])
    print(f"least recognised: {named}")
