"""`moh generate`: write text with a model, one prompt as a stream or many in batches."""

from __future__ import annotations

import argparse
import json
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moh.cli.loading import add_loading, language_model
from moh.cli.options import add_active_heads, add_command
from moh.data.text.files import printable
from moh.models.transformers.families import supported_positions

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

    from moh.cli.options import Commands

_ESCAPED = {code: f"\\u{code:04x}" for code in range(0x7F, 0xA0)}  # control characters that JSON leaves as they are
_HELP = "Write text with a model: one prompt token by token, or the lines of a file in batches."


def add_parser(sub: Commands) -> None:
    """Add `generate` to the commands."""
    parser = add_command(sub, "generate", _HELP, run)
    parser.add_argument("model", help="directory, hub name or .gguf file; dense or MoH")
    parser.add_argument("prompt", nargs="?", help="the beginning of the text")
    parser.add_argument("--prompts", metavar="FILE", help="one prompt per line; implies --json")
    parser.add_argument("--batch-size", type=int, default=8, help="prompts at a time (default: %(default)s)")
    add_sampling(parser, max_new_tokens=100, temperature=0.0)
    add_active_heads(parser)
    parser.add_argument(
        "--json", action="store_true", help="print a JSON object for each prompt, when its text is complete"
    )
    add_loading(parser)


def add_sampling(parser: argparse.ArgumentParser, *, max_new_tokens: int, temperature: float) -> None:
    """Add the options of sampling, which `sampling` reads."""
    parser.add_argument("--max-new-tokens", type=int, default=max_new_tokens, help="(default: %(default)s)")
    parser.add_argument(
        "--temperature", type=float, default=temperature,
        help="sampling temperature; 0 takes the likeliest token (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="for sampling (default: %(default)s)")


def load(arguments: Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model given on the command line, with its dial set, and its tokenizer.

    Raises:
        ValueError: a sampling option or the dial is out of range, or the model can't be loaded.
    """
    import torch

    import moh

    if arguments.max_new_tokens < 1 or arguments.temperature < 0:
        raise ValueError("--max-new-tokens must be at least 1 and --temperature at least 0")
    model, tokenizer = language_model(arguments)
    if arguments.active_heads is not None:
        moh.set_active_heads(model, arguments.active_heads)
    torch.manual_seed(arguments.seed)
    return model, tokenizer


def sampling(arguments: Namespace) -> dict[str, Any]:
    """The arguments of `model.generate` from the options of `add_sampling`."""
    drawn = {"do_sample": True, "temperature": arguments.temperature} if arguments.temperature else {"do_sample": False}
    return {"max_new_tokens": arguments.max_new_tokens, **drawn}


def run(arguments: Namespace) -> None:
    if (arguments.prompt is None) == (arguments.prompts is None):
        raise ValueError("give either a prompt, or --prompts FILE with one per line")
    if arguments.prompts is not None or arguments.json:
        _as_json(arguments, _prompts(arguments))
        return
    model, tokenizer = load(arguments)
    inputs = tokenizer(arguments.prompt, return_tensors="pt").to(model.device)
    if inputs.input_ids.shape[1] == 0:
        raise ValueError(f"prompt must hold at least one token, got {arguments.prompt!r}")
    check_room(model, inputs.input_ids.shape[1], arguments.max_new_tokens)
    model.generate(**inputs, streamer=printing(tokenizer), **sampling(arguments))


def _prompts(arguments: Namespace) -> list[str]:
    if arguments.prompts is None:
        return [arguments.prompt]
    prompts = [line for line in Path(arguments.prompts).read_text(encoding="utf-8").splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"--prompts must hold at least one line, {arguments.prompts} holds none")
    return prompts


def _as_json(arguments: Namespace, prompts: list[str]) -> None:
    """Print an object for each prompt and its text, in batches."""
    if arguments.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {arguments.batch_size}")
    model, tokenizer = load(arguments)
    for start in range(0, len(prompts), arguments.batch_size):
        batch = prompts[start : start + arguments.batch_size]
        for prompt, text in zip(batch, continuations(model, tokenizer, batch, **sampling(arguments)), strict=True):
            line = json.dumps({"prompt": prompt, "text": text}, ensure_ascii=False)
            print(line.translate(_ESCAPED), flush=True)


def printing(tokenizer: PreTrainedTokenizerBase, **options: Any) -> TextStreamer:
    """Prints a model's text while it is written, without what would steer the terminal.

    Args:
        tokenizer: the model's.
        options: of `transformers.TextStreamer`.
    """
    from transformers import TextStreamer

    class Printer(TextStreamer):  # type: ignore[misc]
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            super().on_finalized_text(printable(text), stream_end)

    return Printer(tokenizer, skip_special_tokens=True, **options)


def room(model: PreTrainedModel) -> int | None:
    """Tokens that the model can read and write in total; None if its configuration has no limit."""
    return supported_positions(model.config)


def check_room(model: PreTrainedModel, prompt: int, new: int) -> None:
    """Check that a prompt and its new tokens fit into a model.

    Raises:
        ValueError: they exceed the model's positions.
    """
    most = room(model)
    if most is not None and prompt + new > most:
        raise ValueError(
            f"a prompt of {prompt} tokens and {new} new ones must fit into the model's {most} tokens: a smaller "
            "--max-new-tokens, or a shorter prompt"
        )


def continuations(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], **options: Any
) -> Iterator[str]:
    """The model's text after each of several prompts, computed as one batch, padded on the left.

    Args:
        prompts: each of at least one token.
        options: for `model.generate`.

    Raises:
        ValueError: several prompts are given and the tokenizer has no token to pad with, or a prompt and its continuation
            are too long for the model.
    """
    import torch

    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if pad is None and len(prompts) > 1:
        raise ValueError(
            "tokenizer must have a padding or an end-of-text token for several prompts at a time: take one, with --batch-size 1"
        )
    rows = [torch.tensor(tokenizer(prompt).input_ids, dtype=torch.int64) for prompt in prompts]
    if any(len(row) == 0 for row in rows):
        raise ValueError("every prompt must hold at least one token")
    width = max(map(len, rows))
    check_room(model, width, options.get("max_new_tokens", 0))
    ids = torch.full((len(rows), width), 0 if pad is None else pad)  # a single row has no padding
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, width - len(row) :] = row
        mask[index, width - len(row) :] = 1
    written = model.generate(
        input_ids=ids.to(model.device), attention_mask=mask.to(model.device), pad_token_id=pad, **options
    )
    for row in written[:, width:]:
        yield tokenizer.decode(row, skip_special_tokens=True)
