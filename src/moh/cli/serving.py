"""`moh serve`: hand a MoH model to `transformers serve`, an HTTP server with OpenAI's interface.

The server looks for a model's class among transformers' own; this command puts ours there, in this process, and hands over.
"""

from __future__ import annotations

import argparse
from argparse import Namespace
from typing import Any

from moh.cli import dial

_HELP = "Serve a model over HTTP by `transformers serve`, whose options (--port, --host, ...) follow the model."


def add_parser(sub: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `serve` to the commands."""
    parser = sub.add_parser("serve", help=_HELP, description=_HELP, allow_abbrev=False)
    parser.set_defaults(run=run)
    dial.add_option(parser)
    parser.add_argument("model", help="directory or hub name; dense or MoH")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="options of `transformers serve`")


def run(arguments: Namespace) -> None:
    from moh._extras import require

    for module in ("uvicorn", "fastapi"):
        require(module, extra="serve")
    make_servable(arguments.model, arguments.active_heads)
    from transformers.cli.transformers import app

    app(["serve", arguments.model, *arguments.options])


def make_servable(model: str, active_heads: int | float | list[int] | None = None) -> None:
    """Let `transformers serve` find the class of a MoH model, whose name it looks up in the package transformers.

    Args:
        model: directory or hub name.
        active_heads: how many heads the served model's tokens use; None leaves it as it was saved.

    Raises:
        ValueError: the model's configuration can't be read, or it is no language model of transformers or ours.
    """
    import transformers

    from moh.models.transformers.loading import load_config

    config = load_config(model)
    kind = transformers.AutoModelForCausalLM._model_mapping.get(type(config), None)
    if kind is None:
        raise ValueError(f"model must be a causal language model, got one of type {config.model_type!r}")
    names = config.architectures or [kind.__name__]
    if names != [kind.__name__]:
        raise ValueError(f"model must be saved as {kind.__name__}, with its head, got {', '.join(names)}")
    setattr(transformers, kind.__name__, kind if active_heads is None else _Dialled(kind, active_heads))


class _Dialled:
    """Loads a model of one class and turns its dial."""

    def __init__(self, kind: Any, active_heads: int | float | list[int]) -> None:
        self._kind = kind
        self._active_heads = active_heads

    def from_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        import moh

        model = self._kind.from_pretrained(*args, **kwargs)
        moh.set_active_heads(model, self._active_heads)
        return model
