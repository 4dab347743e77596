"""`moh convert --report`: a page on what converting this model gives, next to the converted model."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moh.cli.loading import revision
from moh.cli.options import read_corpus
from moh.config import FIXED

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from moh.conversion.fitted import Fitted

HELDOUT_BLOCKS = 16
"""Blocks of each held-out text that the perplexity is measured on, at most."""

_ROUTERS = ("threshold", "linear")
"""Of routed layers; the first is `moh convert`'s default."""

_ONLY = "--report compares what `moh convert` makes by default, of a language model that generates"


def add_report(parser: Any) -> None:
    """`--report` and `--report-lengths`."""
    parser.add_argument(
        "--report", action="store_true",
        help="also write conversion_report.md and .html next to the model: perplexity and time at several shares of the heads, "
        "also for fixed heads and dropped layers, and a recommendation (language models that generate)",
    )  # fmt: skip
    parser.add_argument(
        "--report-lengths", nargs="+", type=int, metavar="TOKENS",
        help="lengths of the prompts that the report times (default: 512 2048 8192, or what the model supports)",
    )  # fmt: skip


def check(arguments: Namespace) -> None:
    """Refuse what a report can't be made with, before anything is loaded.

    Raises:
        ValueError: an option that the report's models don't have, or `--report-lengths` alone.
    """
    if not arguments.report:
        if arguments.report_lengths is not None:
            raise ValueError("--report-lengths needs --report")
        return
    from moh._extras import require

    require("matplotlib", extra="plot")  # before minutes of measuring
    defaults = {"shared_heads": None, "routing_unit": "head", "shares": None}
    others = {
        name: getattr(arguments, name) for name, default in defaults.items() if getattr(arguments, name) != default
    }
    if arguments.allocation == "even":
        others["allocation"] = "even"
    if arguments.refit_output is False:
        others["no_refit_output"] = ""
    # "drop" leaves nothing to route
    allowed = (None, FIXED) if arguments.layers == "drop" else (None, *_ROUTERS, FIXED)
    if arguments.router not in allowed or (arguments.router == FIXED and arguments.layers == "keep"):
        others["router"] = arguments.router
    if others:
        name, value = next(iter(others.items()))
        raise ValueError(
            f"{_ONLY}: leave out --{name.replace('_', '-')}{f' {value}' if value != '' else ''}, or --report"
        )


def refuse_kind(arguments: Namespace, kind: str) -> None:
    """Refuse `--report` for a model of this kind.

    Raises:
        ValueError: it was given.
    """
    if arguments.report:
        raise ValueError(f"{_ONLY}, and {arguments.model} is {kind}: leave out --report")


def convert_with_report(
    arguments: Namespace, dense: Any, tokenizer: PreTrainedTokenizerBase
) -> tuple[PreTrainedModel, Callable[[Path], str]]:
    """The MoH model, and a function that compares it with others and writes the report into its directory.

    The function returns the recommendation.

    Raises:
        ValueError: the model or an option rules a report out.
    """
    from moh.conversion.dense import check_weights
    from moh.conversion.fitted import Fitted
    from moh.conversion.plan import plan
    from moh.conversion.transformers import adapter
    from moh.data.text.blocks import evenly_spread, pack_tokens
    from moh.evaluation.conversion_measure import report_lengths
    from moh.models.card import describe

    if not dense.can_generate():
        refuse_kind(arguments, f"a {type(dense).__name__}")
    check_weights(dense)
    lengths = report_lengths(dense.config, arguments.report_lengths)
    planned = plan(arguments.model, revision=revision(arguments).get("revision"))  # what can fail does so now
    texts, heldout = _texts(arguments, tokenizer)
    samples = adapter(dense, "linear", copied=False).samples(
        texts, max_tokens=arguments.calibration_tokens, tokenizer=tokenizer, seq_len=arguments.calibration_length
    )
    seq_len = samples[0].shape[1]
    packed = {
        name: evenly_spread(pack_tokens(part, tokenizer, seq_len=seq_len), HELDOUT_BLOCKS)
        for name, part in heldout.items()
    }
    for name, blocks in packed.items():
        if len(blocks) < 2:  # the standard error needs two
            raise ValueError(
                f"--report needs at least {2 * seq_len} held-out tokens of each text, got fewer of {name}: a tenth of a text is "
                "held out; give more of it"
            )
    router = arguments.router if arguments.router in _ROUTERS else _ROUTERS[0]
    fitted = Fitted(dense, samples, router=router, progress=True)
    method = _method(arguments)
    made = fitted.make(method, _total(arguments, method, fitted))
    check_weights(made.model)
    lengths_of = " and ".join(f"{blocks.shape[1]:,}" for blocks in samples)
    count = sum(blocks.numel() for blocks in samples)
    calibrated = f"{count:,} tokens of {', '.join(heldout)}, in blocks of {lengths_of}"
    facts = {"calibrated on": calibrated, "output projections": "refitted, without training"}
    describe(made.model, base=arguments.model, facts=facts)

    def report(directory: Path) -> str:
        from moh.evaluation.conversion_measure import measure_conversion
        from moh.evaluation.conversion_page import save_data, save_report
        from moh.evaluation.conversion_report import ConversionReport
        from moh.models.card import card_of, layers_of, write_card

        known: list[ConversionReport] = []

        def keep(so_far: ConversionReport) -> None:
            known[:] = [so_far]
            save_data(so_far, directory)

        try:
            found = measure_conversion(
                fitted,
                method,
                made,
                packed,
                name=Path(arguments.model).name.removesuffix(".gguf"),
                lengths=lengths,
                plan=planned,
                facts={"calibrated on": calibrated},
                keep=keep,
            )
        finally:  # also of what an interrupted measurement found
            for last in known:
                save_report(last, directory)
        results = [
            (
                f"perplexity on {text}",
                f"{found.dense[text] * (1 + rise.above / 100):.2f} ({rise.above:+.1f} ± {rise.stderr:.1f} %)",
                f"{found.dense[text]:.2f}, dense",
            )
            for text, rise in found.cells[0].rises.items()
        ]
        write_card(directory, layers_of(made.model), **card_of(made.model), results=results)
        return found.recommendation()

    return made.model, report


def _texts(arguments: Namespace, tokenizer: PreTrainedTokenizerBase) -> tuple[list[str], dict[str, list[str]]]:
    """Texts to calibrate on, and by name those that are held out of them."""
    from moh.data.text.corpora import CALIBRATION_CORPORA
    from moh.data.text.named import calibration_and_heldout

    if arguments.files:
        corpus = read_corpus(arguments)
        return corpus.train, {" ".join(Path(file).name for file in arguments.files): corpus.heldout}
    return calibration_and_heldout(arguments.calibration or CALIBRATION_CORPORA, tokenizer=tokenizer)


def _method(arguments: Namespace) -> str:
    """How the model itself is made."""
    from moh.conversion.fitted import DROPPED_LINEAR, FIXED_HEADS, MIXED, ROUTED

    if arguments.layers == "drop":
        return DROPPED_LINEAR
    if arguments.router == FIXED:
        return FIXED_HEADS
    return MIXED if arguments.layers == "mix" else ROUTED


def _total(arguments: Namespace, method: str, fitted: Fitted) -> int:
    """Heads over all layers, as `moh.convert` counts them."""
    from moh.conversion.fitted import MIXED, ROUTED
    from moh.models.heads import requested_share
    from moh.routing import router_class

    share = requested_share(arguments.share, active_heads=arguments.active_heads)
    if share is not None:
        return fitted.total(share)
    h = fitted.adapter.num_heads
    shared = router_class(arguments.router or _ROUTERS[0]).default_shared_heads(h) if method in (ROUTED, MIXED) else 0
    if not 1 <= arguments.active_heads <= h - shared:
        raise ValueError(f"active_heads must be between 1 and {h - shared}, got {arguments.active_heads}")
    return (shared + int(arguments.active_heads)) * fitted.layers
