"""`moh demo`, `moh train` and `moh extend-vocabulary`."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from moh.cli.loading import add_loading, placement
from moh.cli.options import (
    add_command,
    add_json,
    add_output,
    add_push,
    add_text,
    output_of,
    print_result,
    push,
    reports_on_stderr,
)

if TYPE_CHECKING:
    from moh.cli.options import Commands


def add_demo(sub: Commands) -> None:
    """Add `demo` to the commands."""
    demo = add_command(
        sub,
        "demo",
        "Convert a pretrained language model, tune it and a dense control, report what it costs.",
        run_demo,
    )
    add_output(demo, "where everything goes (default: %(default)s)", old="--output-dir", default="moh-demo")
    demo.add_argument("--base", help="dense model: directory, hub name or .gguf file (default: SmolLM2-135M, fetched)")
    add_text(demo)
    demo.add_argument("--shared-heads", type=int, help="heads that every token uses (default: 2 in 9)")
    demo.add_argument("--active-heads", type=int, help="routed heads per token (default: up to 7 in 9 with the shared)")
    demo.add_argument("--steps", type=int, help="tuning steps per model (default: what fits --minutes, at most 120)")
    demo.add_argument("--minutes", type=float, default=7.0, help="for all tuning in total (default: %(default)s)")
    demo.add_argument("--batch-size", type=int, default=2, help="sequences per step (default: %(default)s)")
    demo.add_argument("--learning-rate", type=float, default=1e-4, help="peak (default: %(default)s)")
    demo.add_argument("--distillation-weight", type=float, default=0.0, help="weight of the dense model's predictions")
    demo.add_argument("--full", action="store_true", help="also tune the model converted the paper's way")
    demo.add_argument("--seed", type=int, default=0, help="order of the training text (default: %(default)s)")
    add_json(demo)


def add_train(sub: Commands) -> None:
    """Add `train` to the commands."""
    train = add_command(
        sub,
        "train",
        "Train from a recipe: moh train RECIPE [--training.max_steps 10 ...]; resumes automatically.",
        run_train,
    )
    train.add_argument(
        "recipe",
        nargs="?",
        help="YAML file, or a name from --list; every field can be overridden, for example --training.learning_rate 5e-5",
    )
    train.add_argument("--list", action="store_true", help="list the recipes that come with the package")
    add_json(train)
    add_push(train)
    train.more_help = _fields


def _fields(words: Sequence[str]) -> str:
    from moh.training.fields import fields_of

    try:
        return fields_of(words)
    except (ValueError, OSError, ImportError) as error:  # help is printed whatever the other words are
        return f"its fields: {' '.join(str(error).split())}"


def add_extension(sub: Commands) -> None:
    """Add `extend-vocabulary` to the commands."""
    about = (
        "Give a language model the vocabulary of another tokenizer; new tokens start as the mean of their old pieces."
    )
    parser = add_command(sub, "extend-vocabulary", about, run_extension)
    parser.add_argument("model", help="directory or hub name, with its own tokenizer")
    parser.add_argument("tokenizer", help="directory or hub name of the new tokenizer")
    add_output(parser, "directory for the model and its new tokenizer", positional=True)
    parser.add_argument(
        "--multiple-of", type=int, default=1, metavar="N", help="round the number of rows up (default: %(default)s)"
    )
    add_json(parser)
    add_loading(parser, dtype="of the weights, to save in")


def run_demo(arguments: Namespace) -> None:
    from moh._extras import require

    for module in ("transformers", "rich", "matplotlib", "gguf"):
        require(module, extra="llm")
    from moh.demo import DemoSettings, run_demo

    names = "base corpus shared_heads active_heads steps minutes batch_size"
    names += " learning_rate distillation_weight full seed"
    options = {name: getattr(arguments, name) for name in names.split()}
    settings = DemoSettings(output_dir=arguments.output, files=tuple(arguments.files), **options)
    with reports_on_stderr(arguments):  # transformers' Trainer prints its losses
        report = run_demo(settings, show=not arguments.json)
    if arguments.json:
        print_result(arguments, {"output": arguments.output, **asdict(report)}, [])


def run_train(arguments: Namespace) -> None:
    from moh.training import load_recipe, train
    from moh.training.shipped import about, recipes_directory, shipped_recipes

    if arguments.list:
        recipes = {name: about(file) for name, file in shipped_recipes().items()}
        width = max(map(len, recipes))
        place = f"They are in {recipes_directory()}, with configurations for `accelerate launch` in accelerate/."
        found = {"directory": str(recipes_directory()), "recipes": recipes}
        print_result(arguments, found, [*(f"{name:{width}}  {text}" for name, text in recipes.items()), place])
        return
    if arguments.recipe is None:
        raise ValueError("RECIPE must be given: a YAML file or a name; `moh train --list` lists those of the package")
    with reports_on_stderr(arguments):
        result = train(load_recipe(arguments.recipe, arguments.overrides))
    step, loss = result.losses[-1] if result.losses else (None, None)
    figures = {"model": str(result.model_dir), "step": step, "loss": loss, "precision": result.precision}
    reached = "no loss was logged" if loss is None else f"step {step}, loss {loss:.4f}"
    print_result(arguments, figures, [f"{result.model_dir}: {reached}, {result.precision}"])
    if os.environ.get("RANK", "0") == "0":  # of torchrun and accelerate
        push(arguments, result.model_dir, name=result.model_dir.absolute().parent.name)  # it is always called model


def run_extension(arguments: Namespace) -> None:
    from moh._files import check_replaceable
    from moh.training.language.vocabulary import extend_vocabulary_files

    output = output_of(arguments)
    check_replaceable(output, name="output")
    counts = extend_vocabulary_files(
        arguments.model, arguments.tokenizer, output, multiple_of=arguments.multiple_of, **placement(arguments)
    )
    text = (
        f"{counts.kept:,} tokens kept, {counts.averaged:,} new ones are the mean of their pieces, {counts.unspelled:,} the "
        f"mean of all; saved in {output}"
    )
    figures = {"kept": counts.kept, "averaged": counts.averaged, "unspelled": counts.unspelled, "output": output}
    print_result(arguments, figures, [text])
