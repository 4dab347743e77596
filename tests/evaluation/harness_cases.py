"""Tasks of the tiny model's words in the harness's format, and the converted tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml

import moh
from moh.models.transformers.loading import load_causal_lm, load_tokenizer

WORDS = "head token gate router layer value key query".split()


def save_moh(base_dir: Path, target: Path) -> Path:
    """The tiny Llama with one shared and one active routed head of its four."""
    model = moh.convert(load_causal_lm(base_dir), shared_heads=1, active_heads=1, router="query_norm")
    model.save_pretrained(target)
    load_tokenizer(base_dir).save_pretrained(target)
    return target


def write_tasks(folder: Path, *, questions: int = 12) -> Path:
    """Three tasks, one of each kind, and two groups of two tasks, with and without an aggregate score."""
    generator = torch.Generator().manual_seed(1)

    def words(count: int) -> list[str]:
        return [WORDS[i] for i in torch.randint(len(WORDS), (count,), generator=generator).tolist()]

    choice = [
        {"q": " ".join(words(5)), "choices": [" ".join(words(n + 1)) for n in range(3)], "answer": i % 3}
        for i in range(questions)
    ]
    last = [{"text": " ".join(words(4)), "word": words(1)[0]} for _ in range(questions)]
    folder.mkdir(parents=True, exist_ok=True)
    fields = {"doc_to_text": "{{q}}", "doc_to_choice": "choices", "doc_to_target": "answer"}
    few = {"training_split": "train", "fewshot_split": "train"}
    generation = {"generation_kwargs": {"until": ["."], "max_gen_toks": 3, "do_sample": False}}
    texts = {"doc_to_text": "text", "doc_to_target": "word"}
    _write(folder, "tiny_choice", "multiple_choice", choice, {**fields, **few}, ["acc", "acc_norm"])
    _write(folder, "tiny_fixed", "multiple_choice", choice[:5], {**fields, "num_fewshot": 0}, ["acc"])
    _write(
        folder, "tiny_last", "loglikelihood", last, {**texts, "doc_to_target": "{{' ' + word}}"}, ["acc", "perplexity"]
    )
    no_space = {"doc_to_text": "{{text}} head", "doc_to_target": "s"}
    _write(folder, "tiny_glued", "loglikelihood", last, no_space, ["acc"])
    _write(folder, "tiny_write", "generate_until", last, {**texts, **few, **generation}, ["exact_match"])
    running = [{"text": " ".join(words(count))} for count in (40, 5)]
    fields = {"doc_to_text": "", "doc_to_target": "text"}
    _write(folder, "tiny_running", "loglikelihood_rolling", running, fields, ["word_perplexity"])
    joined = {"aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}]}
    for name, more in (("tiny_group", joined), ("tiny_list", {})):
        group = {"group": name, "task": ["tiny_choice", "tiny_fixed"], **more}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(group))
    return folder


def _write(
    folder: Path, name: str, kind: str, asked: list[dict[str, Any]], fields: dict[str, Any], metrics: list[str]
) -> None:
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(question) + "\n" for question in asked))
    files = {"test": str(file)} | ({"train": str(file)} if "training_split" in fields else {})
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files},
        "output_type": kind,
        "test_split": "test",
        **fields,
        "metric_list": [{"metric": metric} for metric in metrics],
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
