"""`moh serve`: a MoH model in `transformers serve`, an HTTP server with OpenAI's interface. `moh explore`: the application.

`transformers serve` looks for a model's class among transformers' own, so ours is put there, in this process.
"""

from __future__ import annotations

import argparse
import sys
from argparse import Namespace
from typing import TYPE_CHECKING, Any

from moh.cli.loading import add_loading, device_map_of, device_of, placement, revision
from moh.cli.options import add_active_heads, add_command

if TYPE_CHECKING:
    from moh.cli.options import Commands

_SERVE = "Serve a model over HTTP with `transformers serve`, whose options (--port, --host, ...) follow the model."
_EXPLORE = (
    "Open an application: a text or an image, a dial for the active heads, and the cost compared with the dense model."
)


def add_serve(sub: Commands) -> None:
    """Add `serve` to the commands."""
    parser = add_command(sub, "serve", _SERVE, run_serve)
    add_active_heads(parser)
    parser.add_argument("model", help="directory or hub name; dense or MoH; our options come before it")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="options of `transformers serve`")
    add_loading(parser)


def run_serve(arguments: Namespace) -> None:
    from moh._extras import require

    for module in ("uvicorn", "fastapi"):
        require(module, extra="serve")
    place, name = _place(arguments), revision(arguments)
    make_servable(arguments.model, arguments.active_heads, device_map=device_map_of(arguments), **name)
    from transformers.cli.transformers import app

    model = "@".join([arguments.model, *name.values()])  # how the server names a revision
    app(["serve", model, *place, *arguments.options])


def _place(arguments: Namespace) -> list[str]:
    """The options of `transformers serve` for the device and the dtype."""
    words = [] if arguments.dtype == "auto" else ["--dtype", arguments.dtype]
    if device_map_of(arguments) is None and arguments.device is not None:
        words += ["--device", str(device_of(arguments))]
    return words


def make_servable(
    model: str,
    active_heads: int | float | list[int] | None = None,
    *,
    device_map: Any = None,
    revision: str | None = None,
) -> None:
    """Let `transformers serve` find the class of a MoH model, which it looks up by name in the package transformers.

    Args:
        model: directory or hub name.
        active_heads: as in `moh.set_active_heads`; None leaves the model as it was saved.
        device_map: as in `from_pretrained`; None leaves it to the server's `--device`.
        revision: branch, tag or commit of a hub name.

    Raises:
        ValueError: the configuration can't be read, or is not that of a causal language model saved with its head.
    """
    import transformers

    from moh.models.transformers.loading import load_config
    from moh.models.transformers.published import recognise_published_llama

    recognise_published_llama()  # `transformers serve` reads the configuration again, in this process
    config = load_config(model, revision=revision)
    kind = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if kind is None:
        raise ValueError(f"model must be a causal language model, got one of type {config.model_type!r}")
    names = config.architectures or [kind.__name__]
    if names != [kind.__name__]:
        raise ValueError(f"model must be saved as {kind.__name__}, with its head, got {', '.join(names)}")
    changed = active_heads is not None or device_map is not None
    setattr(transformers, kind.__name__, _Changed(kind, active_heads, device_map) if changed else kind)


class _Changed:
    """Loads a model of one class with another device map than the server's, and turns its dial."""

    def __init__(self, kind: Any, active_heads: int | float | list[int] | None, device_map: Any) -> None:
        self._kind = kind
        self._active_heads = active_heads
        self._place = {} if device_map is None else {"device_map": device_map}

    def from_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        import moh

        model = self._kind.from_pretrained(*args, **kwargs | self._place)
        if self._active_heads is not None:
            moh.set_active_heads(model, self._active_heads)
        return model


def add_explore(sub: Commands) -> None:
    """Add `explore` to the commands."""
    parser = add_command(sub, "explore", _EXPLORE, run_explore)
    parser.add_argument(
        "model", metavar="CHECKPOINT", help="language model or image classifier: directory, hub name or .gguf file"
    )
    parser.add_argument(
        "--dense", metavar="CHECKPOINT", help="dense model to compare with (default: all heads, where that is dense)"
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen at, without a password (default: %(default)s)"
    )
    parser.add_argument("--port", type=int, help="port to listen at (default: the first free one from 7860 on)")
    parser.add_argument("--share", action="store_true", help="also open a public address, through Gradio's servers")
    parser.add_argument("--no-browser", action="store_true", help="don't open it in the browser")
    add_loading(parser, auto="the checkpoint's; float32 where the processor would emulate bfloat16")


def run_explore(arguments: Namespace) -> None:
    if arguments.port is not None and not 0 < arguments.port < 65_536:
        raise ValueError(f"--port must be between 1 and 65535, got {arguments.port}")
    from moh._extras import require

    require("gradio", extra="app")  # before a model is loaded
    from moh.explore.interface import build, serve
    from moh.explore.subjects import load_subject

    if arguments.share or not (arguments.host == "localhost" or arguments.host.startswith(("127.", "::1"))):
        print(
            "moh explore: there is no password: everybody who reaches the address can use this machine and upload files; "
            "uploads and comparisons are kept for an hour",
            file=sys.stderr,
        )
    app = build(load_subject(arguments.model, dense=arguments.dense, **placement(arguments)))
    serve(app, host=arguments.host, port=arguments.port, share=arguments.share, browser=not arguments.no_browser)
