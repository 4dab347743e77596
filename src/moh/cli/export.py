"""`moh export`: a saved MoH model in a form that other programs read."""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING

from moh.cli.options import Command, add_command, add_json, add_push, print_result, push

if TYPE_CHECKING:
    from moh.cli.options import Commands

_REMOTE_CODE = "Add the code with which transformers loads the model where this package is not installed."


def add_parser(sub: Commands) -> None:
    """Add `export` and what it exports to the commands."""
    about = "Write a saved MoH model in a form that other programs read."
    parser = add_command(sub, "export", about, lambda _: None)
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND", parser_class=Command)
    code = add_command(kinds, "remote-code", _REMOTE_CODE, run_remote_code)
    code.set_defaults(command="export remote-code")
    code.add_argument("model", metavar="DIR", help="a MoH model of transformers, saved by moh convert or moh train")
    code.add_argument("--output", "-o", metavar="OUT", help="directory for a copy with the code (default: DIR itself)")
    add_json(code)
    add_push(code)


def run_remote_code(arguments: Namespace) -> None:
    from moh._extras import require

    require("transformers", extra="hf")
    from moh.models.transformers.remote_code import CODE_FILE, export_remote_code

    directory = export_remote_code(arguments.model, arguments.output)
    text = f"{directory}: with {CODE_FILE}, loads anywhere with trust_remote_code=True"
    print_result(arguments, {"output": str(directory), "code": CODE_FILE}, [text])
    push(arguments, directory)
