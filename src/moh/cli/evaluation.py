"""`moh eval`: perplexity of a language model (`text`), accuracy of an image classifier (`images`).

`moh eval lm` is in `harness`, `moh eval fid` in `scores`. `moh eval MODEL` is `text` or `images`, by the kind of the model.
"""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING

from moh.cli import harness, scores
from moh.cli.loading import add_loading, classifier, language_model, revision
from moh.cli.options import (
    Command,
    add_command,
    add_images,
    add_json,
    add_text,
    print_result,
    read_corpus,
    read_images,
    reads_images,
    token_blocks,
)

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from moh.cli.options import Commands

_ANY = "MODEL"
"""Name of the sub-command that `moh eval` takes if none is named."""

_WIKITEXT_2 = "wikitext-2"
_SEQ_LEN, _MAX_TOKENS = 512, 32_768
_PUBLISHED_SEQ_LEN = 2048  # of GPTQ, SparseGPT, Wanda and most others


def add_parser(sub: Commands) -> None:
    """Add `eval` and its sub-commands to the commands."""
    about = (
        "Perplexity of a language model, accuracy of an image classifier, standard tasks, scores of generated images."
    )
    evaluate = sub.add_parser("eval", help=about, description=about, allow_abbrev=False)
    evaluate.otherwise = _ANY
    kinds = evaluate.add_subparsers(
        dest="eval_command", required=True, metavar="MODEL, or text, images, lm or fid", parser_class=Command
    )
    text = add_command(kinds, "text", "Perplexity of a language model on held-out text.", _text, within="eval")
    images = add_command(kinds, "images", "Accuracy of an image classifier.", _images, within="eval")
    either = add_command(
        kinds,
        _ANY,
        "Perplexity of a language model on held-out text, or accuracy of an image classifier.",
        run,
        hidden=True,
    )
    either.prog = "moh eval"
    either.set_defaults(command="eval")
    for parser in (text, images, either):
        parser.add_argument("model", help="directory, hub name or .gguf file; dense or MoH")
        if parser is not images:
            add_text(parser, also=(_WIKITEXT_2,))
            parser.add_argument("--all-text", action="store_true", help="use all of --files, not their held-out tenth")
            published = f"{_PUBLISHED_SEQ_LEN}, or the model's positions if fewer"
            parser.add_argument(
                "--seq-len", type=int, help=f"tokens per block (default: {_SEQ_LEN}; {_WIKITEXT_2}: {published})"
            )
            parser.add_argument(
                "--max-tokens", type=int, help=f"at most this many (default: {_MAX_TOKENS}; {_WIKITEXT_2}: all)"
            )
        if parser is not text:
            add_images(parser)
        add_json(parser)
        add_loading(parser)
    text.set_defaults(images=None)
    images.set_defaults(files=[])
    harness.add_parser(kinds)
    scores.add_parser(kinds)


def run(arguments: Namespace) -> None:
    if reads_images(arguments):
        _run_images(arguments)
    else:
        _run_text(arguments)


def _text(arguments: Namespace) -> None:
    from moh.models.hub import kind_at

    if kind_at(arguments.model, **revision(arguments)).task != "language":
        raise ValueError(f"model must be a language model, and {arguments.model} is not one (see moh eval images)")
    _run_text(arguments)


def _images(arguments: Namespace) -> None:
    from moh.models.hub import kind_at

    if kind_at(arguments.model, named="images", **revision(arguments)).task != "images":
        raise ValueError(f"model must be an image classifier, and {arguments.model} is not one (see moh eval text)")
    reads_images(arguments)  # it checks --images too
    _run_images(arguments)


def _run_text(arguments: Namespace) -> None:
    from moh.evaluation import perplexity

    texts = [] if arguments.corpus == _WIKITEXT_2 else _texts(arguments)
    model, tokenizer = language_model(arguments)
    if arguments.corpus == _WIKITEXT_2:
        blocks = _wikitext2(arguments, model, tokenizer)
    else:
        seq_len = _SEQ_LEN if arguments.seq_len is None else arguments.seq_len
        max_tokens = _MAX_TOKENS if arguments.max_tokens is None else arguments.max_tokens
        blocks = token_blocks(texts, tokenizer, seq_len=seq_len, max_tokens=max_tokens)
    result = perplexity(model, blocks)
    # the standard error of a single block is NaN
    figures = {name: getattr(result, name) for name in ("perplexity", "loss", "stderr", "tokens")}
    line = (
        f"perplexity {result.perplexity:.3f} (loss {result.loss:.4f} ± {result.stderr:.4f} nats per token, "
        f"{result.tokens:,} tokens)"
    )
    print_result(arguments, figures, [line])


def _texts(arguments: Namespace) -> list[str]:
    if not arguments.all_text:
        return read_corpus(arguments).heldout
    from moh.training import read_texts

    if not arguments.files:
        raise ValueError("--all-text needs --files")
    return read_texts(arguments.files)


def _wikitext2(arguments: Namespace, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The blocks of published perplexities, or the first of them."""
    from moh.data.text.named import wikitext2_blocks

    if arguments.all_text:
        raise ValueError("--all-text needs --files")
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", _PUBLISHED_SEQ_LEN)
    seq_len = min(positions, _PUBLISHED_SEQ_LEN) if arguments.seq_len is None else arguments.seq_len
    max_tokens = arguments.max_tokens
    if max_tokens is not None and max_tokens < seq_len:
        raise ValueError(f"--max-tokens must be at least --seq-len, got {max_tokens}, {seq_len}")
    blocks = wikitext2_blocks(tokenizer, seq_len)
    return blocks if max_tokens is None else blocks[: max_tokens // seq_len]


def _run_images(arguments: Namespace) -> None:
    """Top-1 and more of a classifier."""
    from moh.evaluation import evaluate_images

    model = classifier(arguments)
    images = read_images(arguments)
    result = evaluate_images(model, images, batch_size=arguments.batch_size, workers=arguments.workers)
    names = "top1 top5 loss images images_per_second share per_class"
    figures = {name: getattr(result, name) for name in names.split()} | {"skipped": len(result.skipped)}
    known = sorted((value, name) for name, value in result.per_class.items() if value is not None)
    named = ", ".join(f"{name} {value:.1f} %" for value, name in known[:5])
    heads = (
        "dense: every token uses all heads" if result.share is None else f"{100 * result.share:.0f} % of the heads used"
    )
    lines = [
        f"top-1 {result.top1:.2f} %, top-5 {result.top5:.2f} %, loss {result.loss:.4f} "
        f"({result.images:,} images, {len(result.skipped)} skipped)",
        f"{result.images_per_second:,.0f} images/s; {heads}",
        f"least recognised: {named}",
    ]
    print_result(arguments, figures, lines)
