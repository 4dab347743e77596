"""`moh extend-vocabulary`: give a model the vocabulary of another tokenizer. Imports what it needs when it runs."""

from __future__ import annotations

import argparse
from argparse import Namespace

_HELP = "Give a language model the vocabulary of another tokenizer; new tokens begin as the mean of their old pieces."


def add_parser(sub: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `extend-vocabulary` to the commands."""
    parser = sub.add_parser("extend-vocabulary", help=_HELP, description=_HELP, allow_abbrev=False)
    parser.set_defaults(run=run)
    parser.add_argument("model", help="directory or hub name, with its own tokenizer")
    parser.add_argument("tokenizer", help="directory or hub name of the new tokenizer")
    parser.add_argument("output", help="directory for the model and its new tokenizer")
    parser.add_argument(
        "--multiple-of", type=int, default=1, metavar="N", help="round the number of rows up (default: %(default)s)"
    )


def run(arguments: Namespace) -> None:
    from moh.training.checkpoints import check_replaceable
    from moh.training.vocabulary import extend_vocabulary_files

    check_replaceable(arguments.output, name="output")
    counts = extend_vocabulary_files(
        arguments.model, arguments.tokenizer, arguments.output, multiple_of=arguments.multiple_of
    )
    print(
        f"{counts.kept:,} tokens kept, {counts.averaged:,} new ones are the mean of their pieces, {counts.unspelled:,} the "
        f"mean of all; saved in {arguments.output}"
    )
