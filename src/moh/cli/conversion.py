"""`moh convert`: a pretrained dense model on disk -> a MoH model on disk.

Each kind of model has its own calibration data and its own files; the conversion itself is `moh.convert`.
"""

from __future__ import annotations

from argparse import BooleanOptionalAction, Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from moh.cli import report
from moh.cli.loading import add_loading, placement, refuse_device_map, revision
from moh.cli.options import (
    add_command,
    add_files,
    add_images,
    add_json,
    add_output,
    add_push,
    output_of,
    print_result,
    push,
    read_corpus,
    read_images,
)
from moh.config import FIXED, ROUTERS, ROUTING_UNITS

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

    from moh.cli.options import Commands
    from moh.data.images.augmentation import ProcessorInput
    from moh.data.images.recipe import ImageInput


class Converted(NamedTuple):
    """A MoH model, a function that writes it with all that belongs to it, and one that then writes a report, if any."""

    model: Any
    save: Callable[[Path], object]
    report: Callable[[Path], str] | None = None


_HELP = "Turn a pretrained dense model of text, images or diffusion into a MoH model, without training."


def add_parser(sub: Commands) -> None:
    """Add `convert` to the commands."""
    from moh.data.text.corpora import CALIBRATION_CORPORA, CORPORA

    parser = add_command(sub, "convert", _HELP, run)
    parser.add_argument("model", help="directory, hub name or .gguf file; hf-hub:NAME for a timm model")
    add_output(parser, "directory for the MoH model", positional=True)
    parser.add_argument(
        "--share", type=float,
        help="share of all heads that tokens use, shared ones included (default: 0.75, unless --active-heads is given)",
    )  # fmt: skip
    parser.add_argument(
        "--plan", action="store_true",
        help="convert nothing: print what shares save in this model at 512, 4,096 and 32,768 tokens, from its configuration",
    )  # fmt: skip
    report.add_report(parser)
    add_json(parser)
    numbers = parser.add_argument_group("numbers of heads per layer, instead of --share")
    numbers.add_argument(
        "--active-heads",
        type=int,
        help="routed heads that each token activates; where heads are fixed, those that a layer keeps on average",
    )
    numbers.add_argument(
        "--shared-heads",
        type=int,
        help="heads that every token uses (default: 2 in 9, half with query_norm; diffusion with --active-heads needs it)",
    )
    parser.add_argument(
        "--router",
        choices=(*ROUTERS, FIXED),
        help="fixed: the same heads for every token, the others cut out of the projections; threshold: as linear, but tokens "
        "use as many heads as they need (default: threshold for a language model that generates and --routing-unit head; "
        "two_stage for a diffusion model, which is not calibrated; else linear)",
    )
    parser.add_argument(
        "--layers",
        choices=("keep", "drop", "mix"),
        help="keep: every layer keeps heads; drop: a layer keeps all of its heads or none; mix: routed, fixed or none "
        "(default: mix with --router fixed, else keep)",
    )
    parser.add_argument("--routing-unit", choices=ROUTING_UNITS, default="head", help="what a token chooses")
    text = parser.add_mutually_exclusive_group()
    text.add_argument(
        "--calibration", "--corpus",
        nargs="+",
        metavar="NAME[:CONFIG][:SPLIT]|PATH",
        help="text to calibrate on, in equal parts if several: a Hugging Face data set (texts or conversations), a file or "
        f"directory, or a built-in corpus: {', '.join(CORPORA)} (default: {' '.join(CALIBRATION_CORPORA)})",
    )  # fmt: skip
    add_files(text)
    add_images(parser)
    parser.add_argument(
        "--calibration-tokens", type=int, default=49_152,
        help="tokens, or patches of images, to calibrate on (default: %(default)s, which for SmolLM2-135M in bfloat16 takes "
        "3.4 GB of temporary disk, in $TMPDIR)",
    )  # fmt: skip
    parser.add_argument(
        "--calibration-length", type=int, nargs="+", metavar="TOKENS",
        help="length of the blocks of text to calibrate on, or several, with as many tokens of each (default: 512, or 128 for an "
        "encoder, or the model's positions if fewer; 512 4096 for a language model that generates, with 49152 tokens or more)",
    )  # fmt: skip
    parser.add_argument(
        "--allocation",
        choices=("even", "sensitivity"),
        help="of heads to layers (default: sensitivity for a language model that generates with router threshold or linear, "
        "else even)",
    )
    parser.add_argument(
        "--refit-output",
        action=BooleanOptionalAction,
        help="refit W_O to make up for skipped heads (default: with the sensitivity allocation, but not with --shares)",
    )
    parser.add_argument(
        "--shares",
        nargs="+",
        type=float,
        metavar="SHARE",
        help="store output changes for each of these shares of heads in one model",
    )
    add_loading(parser, dtype="of the weights, to calibrate in and to save")
    add_push(parser)


def run(arguments: Namespace) -> None:
    if arguments.plan:
        from moh.cli.plan import show

        if arguments.report:
            raise ValueError("--plan and --report must not both be given: a report holds the plan")
        show(arguments)
    else:
        _convert(arguments)


def _convert(arguments: Namespace) -> None:
    from moh._files import (
        MODEL_FILES,
        PIPELINE_FILES,
        REPORT,
        SENTENCE_FILES,
        check_replaceable,
        check_writable,
        replacing_directory,
    )
    from moh.models.card import card_of, describe, layers_of, write_card
    from moh.models.dial import head_share, moh_routers
    from moh.models.heads import requested_share, use_of_heads
    from moh.models.hub import kind_at, local_diffusion

    report.check(arguments)
    requested_share(arguments.share, shared_heads=arguments.shared_heads, active_heads=arguments.active_heads)
    output = output_of(arguments)
    if Path(output).resolve() == Path(arguments.model).resolve():
        raise ValueError(f"output must not be the directory of the dense model itself, got {output}")
    check_writable(output, name="output")  # before anything is fetched
    drawing = (
        local_diffusion(arguments.model, **revision(arguments))
        if kind_at(arguments.model, **revision(arguments)).task == "diffusion"
        else None
    )
    of_pipeline = drawing is not None and (drawing / "model_index.json").is_file()
    kinds = PIPELINE_FILES if of_pipeline else (*MODEL_FILES, *SENTENCE_FILES)
    check_replaceable(output, name="output", kinds=kinds)
    if arguments.images is not None and (text := _text_option(arguments)):
        raise ValueError(f"--images and {text} must not both be given")
    model, save, write_report = _of_diffusion(arguments, drawing) if drawing is not None else _converted(arguments)
    describe(model, base=arguments.model, **revision(arguments))
    with replacing_directory(Path(output), kinds=kinds) as scratch:
        save(scratch)
        write_card(scratch, layers_of(model), **card_of(model))
    layers = [router.config for router in moh_routers(model)]
    share = head_share(layers)
    lines = [f"{output}: MoH model, {use_of_heads(layers, share)}"]
    figures: dict[str, Any] = {"output": output, "share_of_heads": share}
    if write_report is not None:  # the model is there already, whatever happens while others are measured
        figures["recommendation"] = write_report(Path(output))
        lines += ["", figures["recommendation"], "", f"{output}: {REPORT}.md, {REPORT}.html, {REPORT}.json"]
    print_result(arguments, figures, lines)
    push(arguments, output)


def _text_option(arguments: Namespace) -> str | None:
    """An option that is for text to calibrate on, if one is given."""
    given = {
        "--files": arguments.files,
        "--calibration": arguments.calibration,
        "--calibration-length": arguments.calibration_length,
    }
    return next((option for option, value in given.items() if value), None)


def _options(arguments: Namespace) -> dict[str, Any]:
    names = ("share", "shared_heads", "active_heads", "routing_unit", "layers", "allocation", "refit_output", "shares")
    return {name: getattr(arguments, name) for name in names}


def _of_diffusion(arguments: Namespace, source: Path) -> Converted:
    """The MoH model, which is written as a pipeline with all that `source` holds if that is one."""
    from moh.conversion import convert

    report.refuse_kind(arguments, "a diffusion model")
    if option := "--images" if arguments.images is not None else _text_option(arguments):
        raise ValueError(f"{option} must be left out for a diffusion model, which is not calibrated")
    if arguments.device is not None or arguments.dtype != "auto":
        raise ValueError("--device and --dtype must be left out for a diffusion model, whose weights are only copied")
    refuse_device_map(arguments, arguments.model)
    model = convert(source, router=arguments.router or "two_stage", **_options(arguments))
    if not (source / "model_index.json").is_file():
        return Converted(model, model.save_pretrained)
    from moh.sampling import save_with_parts_of

    return Converted(model, partial(save_with_parts_of, model, source))


def _converted(arguments: Namespace) -> Converted:
    from moh.conversion.convert import load_dense
    from moh.models.kinds import kind_of

    dense = load_dense(arguments.model, **placement(arguments))
    options = _options(arguments)
    options |= {"router": arguments.router, "calibration_tokens": arguments.calibration_tokens}
    options["seq_len"] = arguments.calibration_length
    options["copy_weights"] = False  # the dense model is not needed any more
    # timm's models have no config; that of others gives the kind, which a hub name does not
    reads_images = not hasattr(dense, "config") or kind_of(dense.config.to_dict()).task == "images"
    return (_of_images if reads_images else _of_text)(arguments, dense, options)


def _of_text(arguments: Namespace, dense: Any, options: dict[str, Any]) -> Converted:
    from moh.models.transformers.loading import load_tokenizer
    from moh.models.transformers.sentences import copy_parts, sentence_parts

    if arguments.images is not None:
        raise ValueError(f"--images needs a model that reads images, and {arguments.model} does not")
    tokenizer = load_tokenizer(arguments.model, **revision(arguments))
    parts = sentence_parts(arguments.model, **revision(arguments))
    if arguments.report:
        model, write_report = report.convert_with_report(arguments, dense, tokenizer)
    else:
        model, write_report = _calibrated(arguments, dense, tokenizer, options), None

    def save(directory: Path) -> None:
        _save_all((model, tokenizer), directory)
        copy_parts(parts, directory)

    return Converted(model, save, write_report)


def _calibrated(
    arguments: Namespace, dense: Any, tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]
) -> nn.Module:
    """The MoH model of a model that reads text."""
    from moh.conversion import convert
    from moh.data.text.corpora import CALIBRATION_CORPORA
    from moh.models.card import describe
    from moh.routing import router_class

    texts = _texts(arguments, tokenizer) if router_class(options["router"] or "linear").is_fitted else None
    model: nn.Module = convert(dense, calibration=texts, tokenizer=tokenizer, **options)
    if texts is not None:
        names = [Path(file).name for file in arguments.files] or arguments.calibration or CALIBRATION_CORPORA
        tokens = f"up to {arguments.calibration_tokens:,} tokens of {', '.join(names)}"
        describe(model, facts={"calibrated on": tokens})
    return model


def _texts(arguments: Namespace, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The calibration texts given on the command line."""
    from moh.data.text.corpora import CALIBRATION_CORPORA
    from moh.data.text.named import calibration_texts

    if arguments.files:
        texts: list[str] = read_corpus(arguments).train
        return texts
    return calibration_texts(arguments.calibration or CALIBRATION_CORPORA, tokenizer=tokenizer)


def _of_images(arguments: Namespace, dense: nn.Module, options: dict[str, Any]) -> Converted:
    from moh.conversion import convert
    from moh.routing import router_class

    report.refuse_kind(arguments, "an image model")
    if option := _text_option(arguments):
        raise ValueError(f"{option} needs a model that reads text, and {arguments.model} does not")
    if arguments.images is None and router_class(options["router"] or "linear").needs_fit:
        raise ValueError(
            f"--images must name the images to calibrate on, because {arguments.model} reads images (or choose a --router that "
            "needs none: query_norm, or a learned one to be trained)"
        )
    from moh.data.images.augmentation import ProcessorInput
    from moh.models.classifiers import image_input

    wanted = image_input(dense)
    calibration = None if arguments.images is None else _images(arguments, wanted)
    model = convert(dense, calibration=calibration, **options)
    if not hasattr(dense, "config"):
        from moh.models.timm import save_pretrained

        return Converted(model, partial(save_pretrained, model))
    processors = (wanted.processor,) if isinstance(wanted, ProcessorInput) else ()
    return Converted(model, partial(_save_all, (model, *processors)))


def _save_all(parts: tuple[Any, ...], directory: Path) -> None:
    for part in parts:
        part.save_pretrained(directory)


def _images(arguments: Namespace, wanted: ImageInput | ProcessorInput) -> Iterator[Tensor]:
    """Batches of images; their classes do not matter, because only the heads' contributions are used."""
    from torch.utils.data import DataLoader

    from moh.data.images.batches import ImageBatches, readable_batches
    from moh.data.images.sources import take

    batches: Any = ImageBatches(read_images(arguments), wanted)
    keep: Any = take  # the dataset returns whole batches, which DataLoader's types don't allow for
    loader = DataLoader(batches, batch_size=arguments.batch_size, collate_fn=keep, num_workers=arguments.workers)
    for images, _ in readable_batches(loader, desc="images", progress=False):
        yield images
