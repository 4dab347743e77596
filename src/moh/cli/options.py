"""Shared by the commands: adding a parser, and the options for output, texts, images and active heads with their readers.

The options for loading a model are in `loading`.
"""

from __future__ import annotations

import argparse
import json
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moh.cli.loading import revision
from moh.data.text.corpora import CORPORA, DEFAULT_CORPUS

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from moh.data.images.sources import ImageSource
    from moh.training import Corpus


class Command(argparse.ArgumentParser):
    """The parser of a command.

    Attributes:
        otherwise: the sub-command for arguments that name none, as in `moh eval MODEL`; None if one must be named, or if
            there are none.
        passes_on: argument that takes all that follows the command, options too (argparse's REMAINDER begins at the first
            argument without dashes); "" if there is none. `--help` and `--debug` at the beginning are the command's own.
        more_help: what `--help` adds, from the words of the command line.
    """

    otherwise: str | None = None
    passes_on: str = ""
    more_help: Callable[[Sequence[str]], str] | None = None
    _words: tuple[str, ...] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = list(args or ())
        self._words = tuple(words)
        if self.otherwise is not None:
            named = {"-h", "--help", *self._sub_commands()} - {self.otherwise}
            if words and words[0] not in named:
                words.insert(0, self.otherwise)
        if self.passes_on:
            own = next((i for i, word in enumerate(words) if word not in ("-h", "--help", "--debug")), len(words))
            namespace, _ = super().parse_known_args(words[:own], namespace)
            setattr(namespace, self.passes_on, words[own:])
            return namespace, []
        namespace, rest = super().parse_known_args(words, namespace)
        # argparse leaves an optional positional empty if an option comes before it
        if len(rest) == 1 and not rest[0].startswith("-") and getattr(namespace, "place", "") is None:
            namespace.place = rest.pop()
        return namespace, rest

    def format_help(self) -> str:
        more = "" if self.more_help is None else f"\n{self.more_help(self._words)}\n"
        return super().format_help() + more

    def _sub_commands(self) -> Mapping[str, Command]:
        return next(action.choices for action in self._actions if isinstance(action, argparse._SubParsersAction))


if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[Command]


def add_command(
    sub: Commands,
    name: str,
    about: str,
    run: Callable[[Namespace], int | None],
    *,
    within: str = "",
    hidden: bool = False,
) -> Command:
    """Add a command to `sub`.

    Args:
        name: its last word.
        about: one sentence, for help.
        run: carries it out; what it returns is the exit code, None for 0.
        within: the words before the last.
        hidden: leave it out of the list of commands.
    """
    shown: dict[str, Any] = {} if hidden else {"help": about}
    parser = sub.add_parser(name, **shown, description=about, allow_abbrev=False)
    parser.set_defaults(run=run, command=f"{within} {name}".strip())
    # SUPPRESS: the absence of the option here does not undo `moh --debug COMMAND`
    parser.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the full traceback of an error"
    )
    return parser


def add_json(parser: argparse.ArgumentParser) -> None:
    """`--json`."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def print_result(arguments: Namespace, figures: Mapping[str, Any], lines: Sequence[str]) -> None:
    """Print a command's result on standard output: with `--json` its figures in one line, else the lines."""
    print(json.dumps(_without_nan(figures)) if arguments.json else "\n".join(lines))


def reports_on_stderr(arguments: Namespace) -> AbstractContextManager[Any]:
    """Inside the block what libraries print goes to standard error if `--json` is given: standard output is for JSON alone."""
    return redirect_stdout(sys.stderr) if arguments.json else nullcontext()


def _without_nan(value: Any) -> Any:
    """The same with None for NaN, which JSON does not have."""
    if isinstance(value, Mapping):
        return {name: _without_nan(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and value != value else value


class _Renamed(argparse.Action):
    """An earlier name of `--output`: stores its value there and states the new name on standard error."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: str | None = None) -> None:
        print(f"{parser.prog}: {option} is now --output, or -o; the old name will be removed", file=sys.stderr)
        setattr(namespace, self.dest, values)


def add_output(
    parser: argparse.ArgumentParser,
    about: str,
    *,
    old: str | None = None,
    positional: bool = False,
    default: str | None = None,
    required: bool = False,
) -> None:
    """`--output DIR`, `-o DIR`; `output_of` reads it where there is also a positional argument.

    Args:
        about: what is written there.
        old: an option's name before it was `--output`, still accepted.
        positional: accept the directory as a positional argument too, as `OUTPUT`.
        default: the directory if none is given.
        required: whether one must be given by one of the names.
    """
    if positional:
        parser.add_argument("place", nargs="?", metavar="OUTPUT", help="the same as --output")
    if old is not None and required:
        names = parser.add_mutually_exclusive_group(required=True)
    else:
        names = parser  # type: ignore[assignment]
    names.add_argument("-o", "--output", metavar="DIR", default=default, help=about)
    if old is not None:
        names.add_argument(old, dest="output", action=_Renamed, default=default, help=argparse.SUPPRESS)


def output_of(arguments: Namespace) -> str:
    """The directory of `add_output(positional=True)`.

    Raises:
        ValueError: it is missing, or given twice.
    """
    if (arguments.place is None) == (arguments.output is None):
        given = "neither" if arguments.place is None else f"{arguments.place!r} and --output {arguments.output!r}"
        raise ValueError(f"the output must be given once, as OUTPUT or as --output DIR (-o), got {given}")
    place: str = arguments.output if arguments.place is None else arguments.place
    return place


def add_text(parser: argparse.ArgumentParser, *, also: tuple[str, ...] = ()) -> None:
    """`--corpus` or `--files`, which `read_corpus` reads; `also` are corpora that the command itself reads."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--corpus", choices=(*CORPORA, *also), default=DEFAULT_CORPUS, help="text (default: %(default)s)"
    )
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
        help="fashion-mnist, a directory of class folders (or one with val/), tar files, or a Hugging Face data set's name",
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
    kind = kind_at(arguments.model, named="language" if arguments.images is None else "images", **revision(arguments))
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


def add_push(parser: argparse.ArgumentParser) -> None:
    """`--push-to-hub [NAME]`, which `push` carries out."""
    parser.add_argument(
        "--push-to-hub", nargs="?", const="", metavar="NAME",
        help="also push the result to the Hugging Face hub (default name: the directory's); log in with `hf auth login`",
    )  # fmt: skip


def push(arguments: Namespace, directory: str | Path, *, name: str | None = None) -> None:
    """Push a result if `--push-to-hub` is given; by default as `name`, or as the directory is called."""
    if arguments.push_to_hub is not None:
        from moh.models.card import push_directory

        place = push_directory(directory, arguments.push_to_hub or name)
        print(f"pushed to https://huggingface.co/{place}", file=sys.stderr)  # standard output may be JSON
