"""`moh explore`: the live application. Imports what it needs when it runs."""

from __future__ import annotations

import argparse
from argparse import Namespace

_HELP = (
    "Open an application: a text or an image, a dial for the active heads, and what it costs beside the dense model."
)


def add_parser(sub: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `explore` to the commands."""
    parser = sub.add_parser("explore", help=_HELP, description=_HELP, allow_abbrev=False)
    parser.set_defaults(run=run)
    parser.add_argument("checkpoint", help="language model or image classifier: directory, hub name or .gguf file")
    parser.add_argument(
        "--dense", metavar="CHECKPOINT", help="dense model to compare with (default: all heads, where that is dense)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s)")
    parser.add_argument("--port", type=int, help="port to listen at (default: the first free one from 7860 on)")
    parser.add_argument("--share", action="store_true", help="also open a public address, through Gradio's servers")
    parser.add_argument("--no-browser", action="store_true", help="don't open it in the browser")


def run(arguments: Namespace) -> None:
    if arguments.port is not None and not 0 < arguments.port < 65_536:
        raise ValueError(f"--port must be between 1 and 65535, got {arguments.port}")
    from moh.explore.interface import build, serve  # first: without Gradio no model has to be loaded
    from moh.explore.loading import load_subject

    app = build(load_subject(arguments.checkpoint, dense=arguments.dense))
    serve(app, host=arguments.host, port=arguments.port, share=arguments.share, browser=not arguments.no_browser)
