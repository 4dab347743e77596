"""`moh eval lm`: language models on the tasks of lm-evaluation-harness."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from moh.cli.loading import add_loading, device_map_of, revision
from moh.cli.options import add_command, add_json, add_output, print_result

if TYPE_CHECKING:
    from moh.cli.options import Commands

_HELP = "Language models, dense and MoH side by side, on the tasks of lm-evaluation-harness."


def add_parser(sub: Commands) -> None:
    """Add `eval lm` to the commands of `eval`."""
    parser = add_command(sub, "lm", _HELP, run, within="eval")
    parser.add_argument("checkpoint", nargs="+", help="directory, hub name or .gguf file; dense or MoH")
    parser.add_argument(
        "--dense",
        nargs="+",
        metavar="CHECKPOINT",
        default=[],
        help="models to compare with; differences are to the first",
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--suite", metavar="NAME", help="paper14, scratch6, or a .yaml file of a group of tasks")
    which.add_argument("--tasks", nargs="+", metavar="NAME[:SHOTS]", help="tasks by their names in the harness")
    parser.add_argument(
        "--include-path",
        nargs="+",
        metavar="DIR",
        default=[],
        help="directories with your own task files; they may run code",
    )
    parser.add_argument(
        "--logged",
        action="store_true",
        help="compare what lm-eval logged: each CHECKPOINT is a directory of `lm-eval run --output_path DIR --log_samples`",
    )
    parser.add_argument("--limit", type=int, help="at most this many questions per task (default: all)")
    parser.add_argument("--batch-size", default="1", help="requests at a time, or auto on a GPU (default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=1234, help="for the choice of solved examples (default: %(default)s)"
    )
    parser.add_argument("--max-length", type=int, help="tokens of the longest request (default: the model's positions)")
    parser.add_argument("--truncate", action="store_true", help="cut the beginning off contexts that are longer")
    parser.add_argument(
        "--apply-chat-template", action="store_true", help="ask in the format of each model's chat template"
    )
    add_output(parser, "for results.json, table.md and table.csv; results already there are reused")
    add_json(parser)
    add_loading(parser, named="each CHECKPOINT, all named on the hub; --dense is taken from its main branch")


def run(arguments: Namespace) -> None:
    size = arguments.batch_size
    if size != "auto" and not size.isdecimal():
        raise ValueError(f"--batch-size must be a number or auto, got {size!r}")

    from moh.evaluation.harness import evaluate_tasks, processes, read_logged
    from moh.evaluation.harness.evaluate import by_label

    if arguments.logged:
        tasks = arguments.suite if arguments.suite is not None else arguments.tasks
        logged = read_logged([*arguments.dense, *arguments.checkpoint], tasks)
        if arguments.output is not None:
            Path(arguments.output).mkdir(parents=True, exist_ok=True)
            logged.save(Path(arguments.output))
        print_result(arguments, logged.to_dict(), [logged.to_markdown().rstrip("\n")])
        return
    models = by_label([*arguments.dense, *arguments.checkpoint])
    of_hub = list(models.items())[len(arguments.dense) :]
    revisions = {label: name for label, model in of_hub for name in revision(arguments, model).values()}
    with processes() as state:
        result = evaluate_tasks(
            models,
            arguments.suite if arguments.suite is not None else arguments.tasks,
            include_paths=arguments.include_path,
            limit=arguments.limit,
            batch_size=size if size == "auto" else int(size),
            dtype=arguments.dtype,
            device=arguments.device,
            device_map=device_map_of(arguments),
            revisions=revisions,
            seed=arguments.seed,
            max_length=arguments.max_length,
            truncate=arguments.truncate,
            apply_chat_template=arguments.apply_chat_template,
            output_dir=arguments.output,
        )
        if state.is_main_process:
            print_result(arguments, result.to_dict(), [result.to_markdown().rstrip("\n")])
