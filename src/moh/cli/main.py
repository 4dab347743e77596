"""Parse the command line, run one command, and turn errors into one clear line and an exit code.

Each command adds its own parser; torch, transformers and the like are imported when a command runs, not for `--help`.
"""

from __future__ import annotations

import argparse
import logging
import os
import select
import sys
from collections.abc import Sequence
from typing import Any

import moh
from moh._extras import require
from moh.cli import (
    chat,
    conversion,
    curve,
    evaluation,
    export,
    generation,
    info,
    inspect,
    programs,
    published,
    sampling,
    serving,
    training,
)
from moh.cli.options import Command

_DESCRIPTION = "Mixture-of-Heads: convert, tune, run and inspect transformers whose attention heads are experts."

_OUTPUT = 1  # the file descriptor; `sys.stdout` may be an object without one

_GROUPS = {
    "start here": ("demo", "info"),
    "make a model": ("convert", "train", "convert-published", "extend-vocabulary", "export"),
    "use it": ("generate", "chat", "serve", "sample"),
    "measure and look inside": ("eval", "curve", "inspect", "explore"),
    "other programs with our models": ("lm-eval", "run"),
}
"""The commands as `moh --help` shows them."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (without the program's name).

    Returns:
        the exit code: 0; 1 if the command failed; 2 if it was called with something that it can't accept, as for the
        errors of argparse (which exits by itself); 130 if it was interrupted; 141 if nobody reads the output any more.
    """
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and arguments.command != "train":  # train passes the rest to `load_recipe`
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.overrides = rest
    if not sys.stderr.isatty():  # no progress bars in log files; transformers and its hub client read this on import
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        code = int(arguments.run(arguments) or 0)
        sys.stdout.flush()
        return code
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return 141
        if arguments.debug:
            raise
        print(f"moh {arguments.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, ValueError | FileNotFoundError) else 1
    except KeyboardInterrupt:
        print(f"moh {arguments.command}: interrupted", file=sys.stderr)
        return 130


def _nobody_reads() -> bool:
    """Whether the reader of the output has ended, as in `moh ... | head`; what is left is then dropped."""
    if not hasattr(select, "poll"):  # Windows
        return False
    poll = select.poll()
    poll.register(_OUTPUT, 0)
    if not any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), _OUTPUT)  # Python flushes once more when it ends
    return True


class _Program(argparse.ArgumentParser):
    """The parser of all commands, whose help shows them in groups."""

    def format_help(self) -> str:
        width = max(len(name) for names in _GROUPS.values() for name in names)
        about = {
            action.dest: action.help or "" for part in self._subparsers_parts() for action in part._get_subactions()
        }
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        formatter.add_text(self.description)
        formatter.start_section("options")
        formatter.add_arguments(action for action in self._actions if action.option_strings)
        formatter.end_section()
        lines = [formatter.format_help().rstrip()]
        for title, names in _GROUPS.items():
            lines.append(f"\n{title}:")
            lines += [f"  {name.ljust(width)}  {about[name]}" for name in names]
        return "\n".join([*lines, "", "`moh COMMAND --help` explains a command.", ""])

    def _subparsers_parts(self) -> list[Any]:
        return [action for action in self._actions if isinstance(action, argparse._SubParsersAction)]


class _PrintCompletion(argparse.Action):
    """Print a shell's completion script, made by shtab, and exit."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: str | None = None) -> None:
        try:
            shtab = require("shtab", extra="completion")
        except ImportError as error:
            parser.error(f"--print-completion: {error}")
        print(shtab.complete(parser, shell=values))
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = _Program(prog="moh", description=_DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--debug", action="store_true", help="show the full traceback of an error")
    parser.add_argument("--version", action="version", version=f"moh {moh.__version__}")
    parser.add_argument(
        "--print-completion",
        action=_PrintCompletion,
        choices=("bash", "zsh"),
        help="print a script that completes commands and options in this shell (needs shtab)",
    )
    sub = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Command)
    training.add_demo(sub)
    conversion.add_parser(sub)
    training.add_train(sub)
    published.add_parser(sub)
    export.add_parser(sub)
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
    programs.add_harness(sub)
    programs.add_run(sub)
    return parser
