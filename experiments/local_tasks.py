"""Task files in the harness's own format (YAML and JSONL), made from texts in package indexes, and their group.

    python experiments/local_tasks.py local-tasks
    moh eval lm CHECKPOINT --suite local-tasks/local.yaml

WordNet comes from Debian's package `wordnet-base`; the running text is the held-out part of one of our corpora.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import local_questions as questions
import yaml
from local_questions import read_synsets, wordnet_directory

from moh._files import replacing_directory
from moh.data.text.corpora import DEFAULT_CORPUS, default_cache_dir, load_corpus

_GROUP = {
    "group": "local",
    "task": ["moh_definitions", "moh_kinds", {"task": "moh_opposites", "num_fewshot": 5}, "moh_last_words",
             "moh_next_sentences"],
    "metadata": {
        "version": 1.0,
        "scores": {
            "moh_definitions": {"metric": "acc_norm", "label": "Definitions"},
            "moh_kinds": {"metric": "acc_norm", "label": "Kinds"},
            "moh_opposites": {"metric": "exact_match", "label": "Opposites"},
            "moh_last_words": {"metric": "acc", "label": "Last words"},
            "moh_next_sentences": {"metric": "acc_norm", "label": "Next sentences"},
        },
    },
}  # fmt: skip
_EXAMPLES = 20  # questions used as solved examples, never asked

_METRICS = {
    "multiple_choice": ("acc", "acc_norm"),
    "loglikelihood": ("acc", "perplexity"),
    "generate_until": ("exact_match",),
}


def make_local_tasks(target: Path, *, wordnet: Path, documents: Sequence[str], count: int = 500) -> None:
    """Write the five tasks and their group, local.yaml; `target` is created, or replaced if it holds such tasks.

    Args:
        target: the directory.
        wordnet: directory with `data.noun`, `data.adj` and `cntlist.rev`.
        documents: running text, paragraphs separated by blank lines.
        count: most questions per task.

    Raises:
        FileNotFoundError: a file of WordNet is missing.
        ValueError: the texts are too short for a single question of some task, or `target` holds other files.
    """
    nouns, adjectives = read_synsets(wordnet, "noun"), read_synsets(wordnet, "adj")
    pairs = questions.opposites(adjectives, count=count + _EXAMPLES)
    shown = min(_EXAMPLES, len(pairs) // 2)
    choice = {"doc_to_text": "{{question}}", "doc_to_choice": "choices", "doc_to_target": "answer"}
    made: dict[str, tuple[str, list[questions.Question], dict[str, Any]]] = {
        "moh_definitions": ("multiple_choice", questions.definitions(nouns, count=count), choice),
        "moh_kinds": ("multiple_choice", questions.kinds(nouns, count=count), choice),
        "moh_opposites": (
            "generate_until",
            pairs[shown:],
            {
                "doc_to_text": 'The opposite of "{{word}}" is',
                "doc_to_target": "answers",
                "generation_kwargs": {"until": ["\n", ".", ","], "max_gen_toks": 8, "do_sample": False},
                "filter_list": [{"name": "word", "filter": [{"function": "regex", "regex_pattern": r"([\w-]+)"},
                                                            {"function": "take_first"}]}],
                "fewshot_split": "train", "fewshot_config": {"sampler": "first_n"}, "training_split": "train",
                "fewshot_delimiter": "\n",
            },
        ),
        "moh_last_words": (
            "loglikelihood",
            questions.last_words(documents, count=count),
            {"doc_to_text": "text", "doc_to_target": "{{' ' + word}}"},
        ),
        "moh_next_sentences": ("multiple_choice", questions.next_sentences(documents, count=count), choice),
    }  # fmt: skip
    for name, (_, asked, _) in made.items():
        if not asked:
            raise ValueError(f"the texts are too short: they give no question for the task {name}")
    with replacing_directory(target, kinds=("local.yaml", "*.yaml", "*.jsonl")) as scratch:
        for name, (kind, asked, fields) in made.items():
            files = {"test": _write(scratch, f"{name}.jsonl", asked)}
            if "training_split" in fields:
                files["train"] = _write(scratch, f"{name}.examples.jsonl", pairs[:shown])
            _write_task(scratch, target, name, kind, files, fields)
        (scratch / "local.yaml").write_text(yaml.safe_dump(_GROUP, sort_keys=False), encoding="utf-8")


def _write(scratch: Path, name: str, asked: Sequence[questions.Question]) -> str:
    lines = "".join(json.dumps(question, ensure_ascii=False) + "\n" for question in asked)
    (scratch / name).write_text(lines, encoding="utf-8")
    return name


def _write_task(
    scratch: Path, target: Path, name: str, kind: str, files: dict[str, str], fields: dict[str, Any]
) -> None:
    means = {"perplexity": {"aggregation": "perplexity", "higher_is_better": False}}
    plain = {"aggregation": "mean", "higher_is_better": True}
    metrics = [{"metric": metric, **means.get(metric, plain)} for metric in _METRICS[kind]]
    if kind == "generate_until":
        metrics[0]["ignore_case"] = True
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {split: str(target.resolve() / file) for split, file in files.items()}},
        "output_type": kind,
        "test_split": "test",
        **fields,
        "metric_list": metrics,
        "metadata": {"version": 1.0},
    }
    text = yaml.safe_dump(task, sort_keys=False, allow_unicode=True)
    (scratch / f"{name}.yaml").write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path, help="directory for the task files; an earlier one is replaced")
    arguments = parser.parse_args()
    cache = default_cache_dir()
    documents = load_corpus(DEFAULT_CORPUS, cache).heldout
    make_local_tasks(arguments.target, wordnet=wordnet_directory(cache), documents=documents)


if __name__ == "__main__":
    main()
