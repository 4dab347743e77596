"""What fewer heads do to answers: the local language tasks with the models of `does_routing_pay.py`.

    python experiments/does_routing_pay.py --only quality
    python experiments/local_answers.py --models does_routing_pay_work

Makes the tasks (`local_tasks.py`) where they are missing, asks the dense model and the converted ones the same questions and
writes the page `docs/results/local_answers.md` and its figures, `.json`: differences to the dense model, paired by question,
with standard errors. The scores of each model and task are kept in --work, so that an interrupted run resumes. Hours on two
cores; `--quick` asks two questions per task at one share. Needs the extras `llm` and `eval`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from does_routing_pay_models import (
    DROPPED_LINEAR,
    FIXED_HEADS,
    METHODS,
    MODELS,
    NOT_MODELS,
    ROUTED,
    about_blocks,
    converted,
)
from local_questions import wordnet_directory
from local_tasks import make_local_tasks
from result_names import command

import moh  # noqa: F401  registers our models
from moh._files import write_text
from moh.data.text.corpora import DEFAULT_CORPUS, default_cache_dir, load_corpus
from moh.evaluation.harness import Estimate, TaskEvaluation, evaluate_tasks
from moh.models.transformers.loading import load_tokenizer

DENSE = "dense"

_ASKED = ("model", "shares", "methods", "limit")
"""Options that change results."""


def main() -> None:
    """Parse the options, ask what has not been asked yet and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path("does_routing_pay_work"), help="directory of the models")
    parser.add_argument("--model", choices=tuple(MODELS), default=next(iter(MODELS)), help="the dense one")
    parser.add_argument("--shares", nargs="+", type=float, default=[7 / 9, 6 / 9, 5 / 9], help="of all heads")
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=[method for method in METHODS if method not in NOT_MODELS],
        default=[ROUTED, FIXED_HEADS, DROPPED_LINEAR],
    )
    parser.add_argument("--limit", type=int, default=500, help="questions per task")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--quick", action="store_true", help="one share, two questions per task, into --work")
    parser.add_argument("--work", type=Path, default=Path("local_answers_work"), help="for tasks and scores")
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    options = parser.parse_args()
    asked = {name: getattr(options, name) for name in _ASKED}
    made_by = command("local_answers.py", asked, {name: parser.get_default(name) for name in _ASKED})
    if options.quick:
        options.shares, options.limit, options.work = [5 / 9], 2, options.work / "quick"
        options.out = options.work
    dense = MODELS[options.model]()
    models = {DENSE: dense}
    for share in options.shares:
        for method in options.methods:
            models[f"{method}, {share:.0%}"] = converted(options.models, options.model, method, share)
    _complete(list(models.values())[1:], dense)
    options.work.mkdir(parents=True, exist_ok=True)
    tasks = options.work / "tasks"
    if not (tasks / "local.yaml").is_file():
        cache = default_cache_dir()
        documents = load_corpus(DEFAULT_CORPUS, cache).heldout
        make_local_tasks(tasks, wordnet=wordnet_directory(cache), documents=documents)
    result = evaluate_tasks(
        models,
        str(tasks / "local.yaml"),
        limit=options.limit,
        batch_size=options.batch_size,
        dtype="float32",
        output_dir=options.work / options.model,
    )
    options.out.mkdir(parents=True, exist_ok=True)
    write_text(options.out / "local_answers.json", json.dumps(figures(result.to_dict()), indent=1) + "\n")
    write_text(options.out / "local_answers.md", page(options.model, result, made_by))


def figures(found: dict[str, Any]) -> dict[str, Any]:
    """The scores of all models and tasks, without the harness's own records, which name this machine's files."""
    return {name: found[name] for name in ("title", "limit", "settings", "machine", "rows")}


def _complete(models: list[Path], dense: Path) -> None:
    """Put the dense model's tokenizer into directories that have none."""
    missing = [path for path in models if not (path / "tokenizer_config.json").is_file()]
    if missing:
        tokenizer = load_tokenizer(dense)
        for path in missing:
            tokenizer.save_pretrained(path)


def page(name: str, result: TaskEvaluation, made_by: str) -> str:
    """The page of all models: the dense one's scores, and below them the differences to it, in points.

    Args:
        name: of the dense model.
        result: its first model is the dense one, the others are named "METHOD, SHARE".
        made_by: the command.
    """
    first = result.models[0].scores
    labels = [f"{score.label} ({score.metric})" for score in first]
    asked = sorted({score.questions for score in first})
    methods = [model.label.rpartition(", ")[0] for model in result.models[1:]]
    counts = f"{asked[0]}" if len(asked) == 1 else f"{asked[0]} to {asked[-1]}"
    lines = [
        "# What fewer heads do to answers",
        "",
        f"{name} on the [local suite](../evaluation.md#without-a-network), {counts} questions per task, in percent: the dense "
        "model's scores ± their standard errors, and the other models' differences to it ± those of the paired differences over "
        f"the same questions. The share of routed heads is the average over the text of their calibration, which is cut "
        f"{about_blocks(methods)}. No gradient step. {result.machine}, lm-eval {result.settings['lm-eval']}, float32.",
        "",
        "| share of heads | model | " + " | ".join(labels) + " | average |",
        "| --- | --- |" + " --- |" * (len(labels) + 1),
        _row(1.0, DENSE, [Estimate(score.value, score.stderr) for score in first], result.average(0)),
    ]
    for number, model in enumerate(result.models[1:], 1):
        deltas = [result.difference(number, task) for task in range(len(first))]
        lines.append(_row(model.share, methods[number - 1], deltas, result.average_difference(number), sign="+"))
    return "\n".join([*lines, "", f"Made by `{made_by}`.", ""])


def _row(share: float, name: str, scores: list[Estimate], average: Estimate | None, sign: str = "") -> str:
    cells = ["" if e is None else f"{100 * e.value:{sign}.1f} ± {100 * e.stderr:.1f}" for e in (*scores, average)]
    return "| " + " | ".join([f"{share:.0%}", name, *cells]) + " |"


if __name__ == "__main__":
    main()
