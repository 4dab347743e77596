"""Parse the command line, run one command, and turn errors into one clear line and exit code 2.

Each command adds its own parser; torch, transformers and the like are imported when a command runs, not for `--help`.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

import moh
from moh.cli import chat, conversion, curve, evaluation, generation, info, inspect, sampling, serving, training
from moh.cli.options import Command

_DESCRIPTION = "Mixture-of-Heads: convert, tune, run and inspect transformers whose attention heads are experts."


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (without the program's name); returns the exit code: 0, or 2 for bad input."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and arguments.command != "train":  # train passes the rest to `load_recipe`
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.overrides = rest
    if not sys.stderr.isatty():  # no progress bars in log files; transformers and its hub client read this on import
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
    parser.add_argument("--version", action="version", version=f"moh {moh.__version__}")
    sub = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Command)
    training.add_demo(sub)
    conversion.add_parser(sub)
    training.add_train(sub)
    evaluation.add_parser(sub)
    sampling.add_parser(sub)
    training.add_extension(sub)
    inspect.add_parser(sub)
    serving.add_explore(sub)
    generation.add_parser(sub)
    chat.add_parser(sub)
    serving.add_serve(sub)
    curve.add_parser(sub)
    info.add_parser(sub)
    return parser
