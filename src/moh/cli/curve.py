"""`moh curve`: quality and speed of one model at every share of its heads."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from moh.cli.loading import add_loading, classifier, language_model
from moh.cli.options import (
    add_command,
    add_images,
    add_json,
    add_output,
    add_text,
    print_result,
    read_corpus,
    read_images,
    reads_images,
    token_blocks,
)

if TYPE_CHECKING:
    from moh.cli.options import Commands
    from moh.evaluation.curve import Curve

_HELP = "Quality and speed of a MoH model against the share of active heads: picture, table, JSON."


def add_parser(sub: Commands) -> None:
    """Add `curve` to the commands."""
    parser = add_command(sub, "curve", _HELP, run)
    parser.add_argument("model", metavar="CHECKPOINT", help="directory or hub name of a MoH model")
    parser.add_argument("--dense", metavar="CHECKPOINT", help="dense model to measure as well, such as the original")
    add_output(parser, "for curve.png, .svg, .csv and .json", old="--out", required=True)
    add_json(parser)
    add_text(parser)
    add_images(parser)
    parser.add_argument(
        "--shares", nargs="+", type=float, metavar="SHARE", help="of all heads, like 0.6 0.75 1 (default: up to nine)"
    )
    parser.add_argument("--seq-len", type=int, default=512, help="tokens per block (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=16_384, help="held-out tokens at most (default: %(default)s)")
    parser.add_argument("--prompt-tokens", type=int, default=512, help="in the timed prompt (default: %(default)s)")
    parser.add_argument("--decode-tokens", type=int, default=32, help="timed after the prompt (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="timings; 0 for none (default: %(default)s)")
    add_loading(parser)


def run(arguments: Namespace) -> None:
    from moh._extras import require
    from moh._files import check_writable

    require("matplotlib", extra="plot")  # before minutes of measuring
    check_writable(arguments.output, name="--output")
    if reads_images(arguments):
        from moh.evaluation.curve import image_curve

        model = classifier(arguments)
        dense = None if arguments.dense is None else classifier(arguments, arguments.dense)
        curve = image_curve(
            model,
            read_images(arguments),
            dense=dense,
            shares=arguments.shares,
            batch_size=arguments.batch_size,
            workers=arguments.workers,
        )
    else:
        curve = _of_text(arguments)
    print_result(arguments, curve.as_dict(), write(curve, Path(arguments.output), Path(arguments.model).name))


def _of_text(arguments: Namespace) -> Curve:
    from moh.evaluation.curve import text_curve
    from moh.models.transformers.loading import load_causal_lm

    if arguments.repeats < 0 or arguments.prompt_tokens < 1 or arguments.decode_tokens < 1:
        raise ValueError("--repeats must be at least 0, --prompt-tokens and --decode-tokens at least 1")
    model, tokenizer = language_model(arguments)
    dense = None
    if arguments.dense is not None:
        dense = load_causal_lm(arguments.dense, dtype=model.dtype, device=model.device)
    return text_curve(
        model,
        token_blocks(
            read_corpus(arguments).heldout, tokenizer, seq_len=arguments.seq_len, max_tokens=arguments.max_tokens
        ),
        dense=dense,
        shares=arguments.shares,
        prompt_tokens=arguments.prompt_tokens,
        decode_tokens=arguments.decode_tokens,
        repeats=arguments.repeats,
    )


def write(curve: Curve, out: Path, name: str) -> list[str]:
    """Write the picture, the table and the JSON of a curve; returns a line for each of its points and one for the files."""
    from moh._files import write_text
    from moh.evaluation.curve_plots import plot_curve
    from moh.inspection.plots import save_with_data

    out.mkdir(parents=True, exist_ok=True)
    rows = curve.rows()
    save_with_data(plot_curve(curve, title=name), rows, out / "curve")
    write_text(out / "curve.json", json.dumps(curve.as_dict(), indent=1) + "\n")
    lines = []
    for point in (*curve.points, *((curve.dense,) if curve.dense else ())):
        quality = f"top-1 {point.top1:.2f} %" if point.perplexity is None else f"perplexity {point.perplexity:.3f}"
        speed = "" if point.images is None else f", {point.images:,.0f} images/s"
        if point.prefill is not None and point.decode is not None:
            speed = f", prefill {point.prefill.median:,.0f} tokens/s, decoding {point.decode.median:,.1f} tokens/s"
        name = "the dense model" if point is curve.dense else f"{100 * point.share:5.1f} % of the heads"
        lines.append(f"{name}: {quality}{speed}")
    return [*lines, f"{out}: curve.png, curve.svg, curve.csv, curve.json"]
