"""Write docs/reference/cli.md from the commands' own parsers: `python docs/generate_cli.py`, run by `make docs`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

from moh.cli.main import build_parser

PAGE = Path(__file__).parent / "reference" / "cli.md"
INTRODUCTION = """\
# Commands

Made from the commands' own parsers by `docs/generate_cli.py`; `moh COMMAND --help` shows the same in a terminal.

Every command also takes `--debug`, which shows the full traceback of an error. Exit codes: 0; 1 if a command failed; 2 if it
was called with something that it can't accept; 130 if it was interrupted.

Commands and options are completed by the shell after `pip install 'mixture-of-heads[completion]'` and, in bash,
`eval "$(moh --print-completion bash)"`; in zsh, `moh --print-completion zsh > DIR/_moh` for a directory in `fpath`."""


def page() -> str:
    """The page as Markdown."""
    return "\n\n".join([INTRODUCTION, *(_section(name, parser) for name, parser in commands(build_parser()))]) + "\n"


def commands(parser: argparse.ArgumentParser, name: str = "moh") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """(full name, parser) of the program and of all of its commands, in their order."""
    yield name, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, command in action.choices.items():
                yield from commands(command, f"{name} {word}")


def _section(name: str, parser: argparse.ArgumentParser) -> str:
    parts = [f"## `{name}`", parser.description or ""]
    tables: dict[str, list[str]] = {}
    for group in parser._action_groups:
        title = "" if group.title in ("positional arguments", "options") else f"{(group.title or '').capitalize()}:\n\n"
        tables.setdefault(title, []).extend(_row(parser, a) for a in group._group_actions if not _is_hidden(a))
    for title, rows in tables.items():
        if rows:
            parts.append(f"{title}| argument | meaning |\n| --- | --- |\n" + "\n".join(rows))
    return "\n\n".join(part for part in parts if part)


def _is_hidden(action: argparse.Action) -> bool:
    everywhere = action.default == argparse.SUPPRESS and action.dest == "debug"
    return (
        everywhere
        or isinstance(action, argparse._HelpAction | argparse._SubParsersAction)
        or action.help == argparse.SUPPRESS
    )


def _row(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    """One option with its help, as a row of a Markdown table."""
    shown = argparse.HelpFormatter(parser.prog, width=10_000)
    names = shown._format_action_invocation(action)
    if not action.option_strings and action.nargs not in (None, "?"):
        names = shown._format_args(action, shown._get_default_metavar_for_positional(action))
    meaning = " ".join((shown._expand_help(action) if action.help else "").split())
    names, meaning = names.replace("|", "\\|"), re.sub(r"([|<>])", r"\\\1", meaning)
    return f"| `{names}` | {meaning} |"


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
