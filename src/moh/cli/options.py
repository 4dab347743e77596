"""Shared by the commands: adding a parser, and the options for texts, images and active heads with their readers."""

from __future__ import annotations

import argparse
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moh.data.text.corpora import CORPORA, DEFAULT_CORPUS

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from moh.data.images.sources import ImageSource
    from moh.training import Corpus


class Command(argparse.ArgumentParser):
    """The parser of a command; hands over to the longer command if the next word makes it one, such as `moh eval fid`.

    With argparse's own sub-parsers the first word must be one of their names, which rules out `moh eval MODEL`.
    """

    longer: Mapping[str, Command] = {}
    more_help: Callable[[Sequence[str]], str] | None = None
    """What `--help` adds, from the words of the command line."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if args and args[0] in self.longer:
            return self.longer[args[0]].parse_known_args(args[1:], namespace)
        self._words = tuple(args or ())
        return super().parse_known_args(args, namespace)

    def format_help(self) -> str:
        more = "" if self.more_help is None else f"\n{self.more_help(self._words)}\n"
        return super().format_help() + more


if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[Command]


def add_command(sub: Commands, name: str, about: str, run: Callable[[Namespace], None]) -> Command:
    """Add a command to `sub`; `run` carries it out."""
    parser = sub.add_parser(name, help=about, description=about, allow_abbrev=False)
    parser.set_defaults(run=run, command=name)
    return parser


def add_text(parser: argparse.ArgumentParser) -> None:
    """`--corpus` or `--files`, which `read_corpus` reads."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--corpus", choices=tuple(CORPORA), default=DEFAULT_CORPUS, help="text (default: %(default)s)")
    add_files(group)


def add_files(parser: Any) -> None:
    """`--files PATH ...`."""
    parser.add_argument("--files", nargs="+", metavar="PATH", default=[], help="your own text files or directories")


def read_corpus(arguments: Namespace) -> Corpus:
    """The text given on the command line."""
    from moh.training import corpus_from_files, load_corpus

    return corpus_from_files(arguments.files) if arguments.files else load_corpus(arguments.corpus)


def token_blocks(texts: list[str], tokenizer: PreTrainedTokenizerBase, *, seq_len: int, max_tokens: int) -> Tensor:
    """`[n, seq_len]` int64, the first blocks of the texts, up to `max_tokens` in total.

    Raises:
        ValueError: `seq_len` is below 2 or `max_tokens` below `seq_len`.
    """
    from moh.training import pack_tokens

    if seq_len < 2 or max_tokens < seq_len:
        raise ValueError(
            f"--seq-len must be at least 2 and --max-tokens at least --seq-len, got {seq_len}, {max_tokens}"
        )
    return pack_tokens(texts, tokenizer, seq_len=seq_len)[: max_tokens // seq_len]


def add_images(parser: argparse.ArgumentParser) -> None:
    """The options of image classifiers; `read_images` reads the images."""
    group = parser.add_argument_group("image classifiers")
    group.add_argument(
        "--images", metavar="DATASET",
        help="fashion-mnist, a directory of class folders (or one with val/), or a Hugging Face data set's name",
    )  # fmt: skip
    group.add_argument("--split", help="of a Hugging Face data set (default: validation or test)")
    group.add_argument("--image-column", help="of a Hugging Face data set (default: the one that holds images)")
    group.add_argument("--label-column", help="of a Hugging Face data set (default: the one that holds class labels)")
    group.add_argument("--max-images", type=int, help="at most this many images, evenly spread (default: all)")
    group.add_argument("--batch-size", type=int, default=64, help="images per forward pass (default: %(default)s)")
    group.add_argument("--workers", type=int, default=0, help="processes that load images (default: %(default)s)")


def reads_images(arguments: Namespace) -> bool:
    """Whether the model is an image classifier: by its configuration; a hub name whose
    configuration can't be fetched is one if `--images` is given.

    Raises:
        ValueError: a classifier without images, images for another model, images and text, or a diffusion model.
    """
    from moh.models.hub import kind_at

    if arguments.images is not None and arguments.files:
        raise ValueError("--images and --files must not both be given")
    kind = kind_at(arguments.model, named="language" if arguments.images is None else "images")
    if kind.library == "diffusers":
        raise ValueError(
            f"model must be a language model or an image classifier, and {arguments.model} is a diffusion model"
        )
    if kind.task == "images" and arguments.images is None:
        raise ValueError(f"--images must be given, because {arguments.model} is an image classifier")
    if kind.task != "images" and arguments.images is not None:
        raise ValueError(f"--images needs an image classifier, and {arguments.model} is not one")
    return kind.task == "images"


def read_images(arguments: Namespace) -> ImageSource:
    """The images given on the command line."""
    from moh.data.images.datasets import load_evaluation_images
    from moh.data.images.sources import every_nth

    columns = {"image_column": arguments.image_column, "label_column": arguments.label_column}
    images = load_evaluation_images(arguments.images, eval_split=arguments.split, **columns)
    return every_nth(images, arguments.max_images)


def active_heads(text: str) -> int | float | list[int]:
    """The argument of `moh.set_active_heads` from "3", "0.75" or "3,2,4".

    Raises:
        argparse.ArgumentTypeError: the text is not a number or numbers.
    """
    try:
        if "," in text:
            return [int(part) for part in text.split(",")]
        return float(text) if "." in text else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be like 3, 0.75 or 3,2,4 (one per layer), got {text!r}") from None


def add_active_heads(parser: argparse.ArgumentParser) -> None:
    """`--active-heads K`."""
    parser.add_argument(
        "--active-heads", type=active_heads, metavar="K",
        help="routed heads per token: 3; one number per layer: 3,2,4; or a share of all heads: 0.75 (default: as the model "
        "was saved)",
    )  # fmt: skip
