"""`moh convert-published`: a checkpoint of the paper's authors on disk -> a model that every command takes, on disk."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moh.cli.options import add_command, add_json, add_output, output_of, print_result

if TYPE_CHECKING:
    from moh.cli.options import Commands

_HELP = (
    "Turn a checkpoint of the paper's authors, or one from save_published, into a directory that every command takes."
)
_TOKENIZER = "no tokenizer there: save it in {output}, which commands on text need"


def add_parser(sub: Commands) -> None:
    """Add `convert-published` to the commands."""
    parser = add_command(sub, "convert-published", _HELP, run)
    parser.add_argument(
        "file", metavar="FILE", help="MoH-ViT's .pth file, MoH-DiT's .pt file, or the directory of MoH-LLaMA3-8B"
    )
    add_output(parser, "directory for the model", positional=True)
    parser.add_argument(
        "--name",
        help="of a published model, such as moh_transnext_base_75 or MoH-DiT-XL/2-90 (default: as the file or its name states)",
    )
    parser.add_argument(
        "--vae",
        metavar="DIR",
        help="AutoencoderKL to put next to a MoH-DiT (default: none; moh sample --vae needs it then)",
    )
    add_json(parser)


def run(arguments: Namespace) -> None:
    from moh._files import MODEL_FILES, PIPELINE_FILES, check_replaceable, check_writable, replacing_directory
    from moh.models.card import card_of, describe, layers_of, write_card
    from moh.models.dial import head_share
    from moh.models.heads import use_of_heads
    from moh.models.published import NAMES, load_published

    source, output = Path(arguments.file), Path(output_of(arguments))
    if not source.exists():
        raise ValueError(f"FILE must be a file or directory, but there is no {source}")
    if arguments.name is not None and arguments.name not in NAMES:
        raise ValueError(f"--name must be one of {', '.join(NAMES)}, got {arguments.name!r}")
    check_writable(output, name="output")
    if source.is_dir():
        check_replaceable(output, name="output")  # before the weights are read
        if arguments.name is not None:
            raise ValueError(
                f"--name must be left out for a directory, whose config.json states it, got {arguments.name!r}"
            )
    model = load_published(source, arguments.name)
    drawing = type(model).__name__ == "MoHDiTTransformer2DModel"
    if arguments.vae is not None and not drawing:
        raise ValueError(f"--vae is for a diffusion model, and {source} is not one")
    notes: list[str] = []
    if drawing:
        save = _of_diffusion(model, arguments.vae)
    else:
        save = _of_text(model, source, notes) if source.is_dir() else _of_images(model)
    describe(model, facts={"made from": f"the published checkpoint `{source.name}`"})
    layers = layers_of(model)
    with replacing_directory(output, kinds=PIPELINE_FILES if drawing else MODEL_FILES) as scratch:
        save(scratch)
        write_card(scratch, layers, **card_of(model))
    share = head_share(layers) if layers else 1.0
    notes = [note.format(output=output) for note in notes]
    lines = [f"{output}: MoH model, {use_of_heads(layers, share)}", *notes]
    print_result(arguments, {"output": str(output), "share_of_heads": share, "notes": notes}, lines)


def _of_images(model: Any) -> Callable[[Path], object]:
    """Writes a classifier in timm's format."""
    from moh.models.timm.loading import save_image_classifier
    from moh.models.timm.transnext.published import timm_model

    made, arguments = timm_model(model)
    return lambda directory: save_image_classifier(made, directory, model_args=arguments)


def _of_diffusion(model: Any, vae: str | None) -> Callable[[Path], object]:
    """Writes a pipeline of diffusers with the diffusion that the published models were trained on."""
    from moh.sampling.checkpoint import ImageModel, load_vae, save_image_model
    from moh.sampling.schedulers import diffusion_scheduler

    decoder = None if vae is None else load_vae(vae)
    channels = int(model.config["in_channels"])
    if decoder is not None and channels != decoder.config.latent_channels:
        raise ValueError(
            f"--vae must have the {channels} latent channels of the model, got {decoder.config.latent_channels}"
        )
    # The file does not say what is denoised: grey or coloured pixels, which are clipped, have 1 or 3 channels
    whole = ImageModel(model, diffusion_scheduler(clip=decoder is None and channels in (1, 3)), decoder)
    return lambda directory: save_image_model(whole, directory)


def _of_text(model: Any, source: Path, notes: list[str]) -> Callable[[Path], object]:
    """Writes a language model with the tokenizer and generation settings that are next to the published weights."""
    from transformers import GenerationConfig

    from moh.models.transformers.loading import load_tokenizer, mend_generation_config

    if (source / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source)
        mend_generation_config(model)
    parts: list[Any] = [model]
    if any((source / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        parts.append(load_tokenizer(source))
    else:
        notes.append(_TOKENIZER)

    def save(directory: Path) -> None:
        for part in parts:
            part.save_pretrained(directory)

    return save
