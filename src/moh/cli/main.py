"""Parse the command line, run one command, and turn what went wrong into one clear line and exit code 2.

The commands are in `moh.cli.commands`; nothing heavier than `moh` itself is imported until one runs.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from moh.cli import (
    chat,
    commands,
    conversion,
    curve,
    explore,
    generation,
    harness,
    images,
    info,
    inspect,
    sampling,
    scores,
    serving,
    vocabulary,
)

_DESCRIPTION = "Mixture-of-Heads: convert, tune, run and inspect transformers whose attention heads are experts."


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (without the program's name); returns the exit code: 0, or 2 for bad input."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(scores.join_command(sys.argv[1:] if argv is None else argv))
    if rest and arguments.command != "train":  # train hands the rest to the recipe's parser
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.overrides = rest
    if not sys.stderr.isatty():  # no progress bars in log files; transformers and its hub client read it on import
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        arguments.run(arguments)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if arguments.debug:
            raise
        print(f"moh {arguments.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"moh {arguments.command}: interrupted", file=sys.stderr)
        return 130
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(prog="moh", description=_DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--debug", action="store_true", help="show the full traceback of an error")
    sub = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, help: str) -> argparse.ArgumentParser:
        made = sub.add_parser(name, help=help, description=help, allow_abbrev=False)
        made.set_defaults(run=getattr(commands, f"run_{name}"))
        return made

    demo = command("demo", "Convert a pretrained language model, tune it beside a dense control, report what it costs.")
    demo.add_argument("--output-dir", default="moh-demo", help="where everything goes (default: %(default)s)")
    demo.add_argument("--base", help="dense model: directory, hub name or .gguf file (default: SmolLM2-135M, fetched)")
    _text(demo)
    demo.add_argument("--shared-heads", type=int, help="heads that every token uses (default: 2 in 9)")
    demo.add_argument("--active-heads", type=int, help="routed heads per token (default: up to 7 in 9 with the shared)")
    demo.add_argument("--steps", type=int, help="tuning steps per model (default: what fits --minutes, at most 120)")
    demo.add_argument("--minutes", type=float, default=7.0, help="for all tuning together (default: %(default)s)")
    demo.add_argument("--batch-size", type=int, default=2, help="sequences per step (default: %(default)s)")
    demo.add_argument("--learning-rate", type=float, default=1e-4, help="peak (default: %(default)s)")
    demo.add_argument("--distillation-weight", type=float, default=0.0, help="weight of the dense model's predictions")
    demo.add_argument("--full", action="store_true", help="also tune the model converted the paper's way")
    demo.add_argument("--seed", type=int, default=0, help="order of the training text (default: %(default)s)")

    conversion.add_parser(sub)

    train = command(
        "train", "Train by a recipe: moh train RECIPE.yaml [--training.max_steps 10 ...]; resumes by itself."
    )
    train.add_argument(
        "recipe", help="YAML file; every field can be overridden, for example --training.learning_rate 5e-5"
    )

    evaluate = command("eval", "Perplexity of a language model on held-out text, or accuracy of an image classifier.")
    evaluate.add_argument("model", help="directory, hub name or .gguf file; dense or MoH")
    _text(evaluate)
    images.add_options(evaluate)
    evaluate.add_argument("--all-text", action="store_true", help="use all of --files, not their held-out tenth")
    evaluate.add_argument("--seq-len", type=int, default=512, help="tokens per block (default: %(default)s)")
    evaluate.add_argument(
        "--max-tokens", type=int, default=32_768, help="at most so many tokens (default: %(default)s)"
    )
    evaluate.add_argument("--json", action="store_true", help="print JSON")

    scores.add_parser(sub)
    harness.add_parser(sub)
    sampling.add_parser(sub)
    vocabulary.add_parser(sub)
    inspect.add_parser(sub)
    explore.add_parser(sub)

    for added in (generation, chat, serving, curve):
        added.add_parser(sub)

    info.add_parser(sub)
    return parser


def _text(parser: argparse.ArgumentParser) -> None:
    from moh.training.corpus import CORPORA, DEFAULT_CORPUS

    group = parser.add_mutually_exclusive_group()
    group.add_argument("--corpus", choices=tuple(CORPORA), default=DEFAULT_CORPUS, help="text (default: %(default)s)")
    group.add_argument("--files", nargs="+", metavar="PATH", default=[], help="your own text files or directories")
