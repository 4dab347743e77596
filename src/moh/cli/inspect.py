"""`moh inspect`: tables, figures and a page on which head does what, for any checkpoint."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moh.cli.loading import add_loading
from moh.cli.options import add_command, add_images, add_json, add_output, print_result

if TYPE_CHECKING:
    from moh.cli.inspect_subjects import Subject
    from moh.cli.options import Commands


def add_parser(sub: Commands) -> None:
    """Add `inspect` to the commands."""
    from moh.data.text.corpora import CORPORA, DEFAULT_CORPUS

    about = (
        "Which heads do what, for each kind of text, class of images or range of time steps: tables, figures, a page."
    )
    parser = add_command(sub, "inspect", about, run)
    parser.add_argument("model", help="directory or hub name of a language model, image classifier or diffusion model")
    add_output(parser, "directory for tables, figures and a summary", old="--out")
    parser.add_argument("--html", metavar="FILE", help="one page to explore tokens or patches and their heads")
    add_json(parser)
    texts = parser.add_argument_group("language models")
    texts.add_argument(
        "--corpus", choices=tuple(CORPORA), default=DEFAULT_CORPUS,
        help="its held-out documents are the only group unless others are given (default: %(default)s)",
    )  # fmt: skip
    texts.add_argument(
        "--files", nargs="+", metavar="PATH", default=[], help="text files or directories, each a group named after it"
    )
    texts.add_argument(
        "--group", action="append", default=[], metavar="NAME=TEXTS",
        help="a group: text file, directory, pattern such as 'code=src/*.py', or corpus; may be repeated",
    )  # fmt: skip
    texts.add_argument("--seq-len", type=int, default=512, help="tokens per passage (default: %(default)s)")
    texts.add_argument("--max-tokens", type=int, default=8_192, help="tokens per group (default: %(default)s)")
    add_images(parser)
    parser.add_argument(
        "--classes", nargs="+", metavar="NAME", help="groups of images to show in the figure and the page"
    )
    diffusion = parser.add_argument_group("diffusion models (with --images)")
    diffusion.add_argument(
        "--by", choices=("timestep", "class"), default="timestep", help="what the groups are (default: %(default)s)"
    )
    diffusion.add_argument("--bins", type=int, default=10, help="ranges of time steps (default: %(default)s)")
    diffusion.add_argument("--vae", metavar="DIR", help="AutoencoderKL, for a model on latents without its own")
    analysis = parser.add_argument_group("analysis")
    analysis.add_argument("--permutations", type=int, default=999, help="permutations per test (default: %(default)s)")
    analysis.add_argument(
        "--seed", type=int, default=0, help="for the tests, noise and time steps (default: %(default)s)"
    )
    analysis.add_argument("--dead", type=float, default=0.01, help="a dead head's load is below (default: %(default)s)")
    analysis.add_argument(
        "--overloaded", type=float, default=0.95, help="an overloaded head's load is above (default: %(default)s)"
    )
    analysis.add_argument(
        "--ablate", type=int, default=0, metavar="N",
        help="remove one head at a time and measure the loss on N passages or images (default: don't)",
    )  # fmt: skip
    analysis.add_argument(
        "--similarity", type=int, default=0, metavar="N",
        help="compare every two heads' attention patterns and outputs on N passages or images; models of transformers",
    )  # fmt: skip
    analysis.add_argument(
        "--curve", action="store_true",
        help="also perplexity or accuracy against the share of heads, on the same inputs (moh curve also times it)",
    )  # fmt: skip
    add_loading(parser)


def run(arguments: Namespace) -> None:
    from moh.cli.inspect_subjects import family_of

    _check_targets(arguments)
    family = family_of(arguments)
    family.check(arguments)
    subject = family(arguments)
    if arguments.html is not None:
        subject.write_page()
    if arguments.output is not None:
        _write(subject)
    elif arguments.json:
        print_result(arguments, {"html": arguments.html}, [])


def _write(subject: Subject) -> None:
    from moh.inspection import ablate_heads, head_similarity, inspect_groups
    from moh.inspection.plots import find_history, training_rows
    from moh.inspection.report import report
    from moh.inspection.statistics import choosing_layers

    arguments = subject.arguments
    # First, as it refuses models that give no patterns
    similarity = head_similarity(subject.model, subject.few(arguments.similarity)) if arguments.similarity else None
    use = inspect_groups(subject.model, subject.inputs(), seed=arguments.seed)
    ablation = ablate_heads(subject.model, subject.few(arguments.ablate)) if arguments.ablate else None
    found = report(
        _name(Path(arguments.model)),
        use,
        permutations=arguments.permutations,
        seed=arguments.seed,
        dead=arguments.dead,
        overloaded=arguments.overloaded,
        ablation=ablation,
        similarity=similarity,
        training=training_rows(find_history(arguments.model) or ()),
        notes=subject.notes,
    )
    lines: list[str] = []
    figures: dict[str, Any] = {"layers": [], "test": None, "curve": None}
    choosing = {place for place, _ in choosing_layers(use)}
    out = Path(arguments.output)
    found.save(out, groups=arguments.classes)
    for place, (share, layer) in enumerate(zip(use.share(), use.layers, strict=True)):
        routed = use.load[place][use.inputs > 0][:, layer.routed]
        spread = "dense" if layer.config is None else "no choice"
        if place in choosing:
            spread = f"a group's load of a routed head {routed.min():.2f} to {routed.max():.2f}"
        figures["layers"].append({"layer": place, "share_of_heads": share})
        lines.append(f"layer {place:3d}: {100 * share:3.0f} % of the heads used; {spread}")
    if found.untested:
        lines.append(f"not tested: {found.untested}")
    else:
        test = figures["test"] = {name: found.tests[-1][name] for name in ("divergence", "p")}
        lines.append(f"the groups' loads differ by {test['divergence']:.4f} bits, p = {test['p']:.3g}")
    if arguments.curve:
        from moh.cli.curve import write

        curve = subject.curve()
        figures["curve"] = curve.as_dict()
        lines += write(curve, out, _name(Path(arguments.model)))
    figures |= {"output": str(out), "groups": len(use.groups), "inputs": int(use.inputs.sum())}
    lines.append(f"{out}: summary.md, tables and figures of {figures['groups']} groups, {figures['inputs']:,} inputs")
    print_result(arguments, figures, lines)


def _check_targets(arguments: Namespace) -> None:
    """Check, before anything is computed, that an output is requested and can be written."""
    from moh._files import check_writable

    if arguments.output is None and arguments.html is None:
        raise ValueError("--output DIR or --html FILE must be given for the result")
    if arguments.output is not None:
        check_writable(arguments.output, name="--output")
    if arguments.html is not None:
        check_writable(Path(arguments.html).parent, name="--html's directory")
        if not Path(arguments.html).parent.is_dir():
            raise ValueError(f"--html must be a file in a directory that exists, got {arguments.html}")
    if arguments.curve and arguments.output is None:
        raise ValueError("--curve needs --output DIR, where the curve is written")
    for name in ("ablate", "similarity"):
        if getattr(arguments, name) < 0:
            raise ValueError(f"--{name} must be at least 0, got {getattr(arguments, name)}")
    if arguments.permutations < 1:
        raise ValueError(f"--permutations must be at least 1, got {arguments.permutations}")


def _name(model: Path) -> str:
    """A model's name: with its parent for `OUTPUT_DIR/model`, which is where training saves it."""
    return f"{model.absolute().parent.name}/model" if model.name == "model" else model.name
