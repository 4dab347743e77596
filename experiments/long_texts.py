"""Do fewer heads lose long texts? Perplexity by position and needles in a haystack, up to 8,192 tokens.

    python experiments/does_routing_pay.py --only quality
    python experiments/long_texts.py --models does_routing_pay_work

The models are those that the first command converted, and the dense one. Perplexity is of held-out text in blocks of 8,192
tokens, by how far back a token can look; the needles are in `long_texts_needles.py`. All models read the same blocks and
haystacks, so that differences to the dense model are paired. Each cell is a file of its own, so that an interrupted run
resumes; all of them are joined to those in `docs/results/long_texts.json`, from which the page of that name and its picture
are written: `--only page` does only this. Hours on two cores; `--quick` measures two short lengths at one share. Needs the
extra `llm`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from does_routing_pay_models import METHODS, MODELS, NOT_MODELS, cell_file, converted
from long_texts_needles import DEPTHS, ask, haystacks
from long_texts_report import DEFAULTS, DENSE, KINDS, NAME, SAME, write
from result_names import collect_cells
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

import moh  # noqa: F401  registers our models
from moh._files import write_text
from moh.data.text.blocks import evenly_spread
from moh.evaluation import cpu_name
from moh.models.transformers.loading import load_causal_lm, load_config, load_tokenizer
from moh.training import load_corpus, pack_tokens

_TOKENS_PER_CALL = 512  # whose logits are held at once: 0.5 GB with Gemma's vocabulary


def main() -> None:
    """Parse the options, measure what is missing and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path("does_routing_pay_work"), help="directory of the models")
    parser.add_argument("--model", choices=tuple(MODELS), default=DEFAULTS["model"], help="the dense one")
    parser.add_argument("--shares", nargs="+", type=float, default=DEFAULTS["shares"], help="of all heads")
    parser.add_argument(
        "--methods",
        nargs="*",
        help="none: the dense model alone",
        choices=[method for method in METHODS if method not in NOT_MODELS],
        default=DEFAULTS["methods"],
    )
    parser.add_argument("--texts", nargs="+", default=[*DEFAULTS["texts"]], help="whose held-out parts are read")
    parser.add_argument("--lengths", nargs="+", type=int, default=[*DEFAULTS["lengths"]])
    parser.add_argument("--haystacks", type=int, default=DEFAULTS["haystacks"], help="of each length")
    parser.add_argument(
        "--blocks", type=int, default=DEFAULTS["blocks"], help="of each text, at most, for the perplexity"
    )
    parser.add_argument("--only", choices=(*KINDS, "page"), help="one kind of cells; page: none")
    parser.add_argument("--quick", action="store_true", help="one share, two short lengths, into --work")
    parser.add_argument("--work", type=Path, default=Path("long_texts_work"), help="for cells")
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--images", type=Path, default=Path("docs/images"))
    options = parser.parse_args()
    set_verbosity_error()
    disable_progress_bar()
    if options.quick:
        options.shares, options.lengths, options.haystacks, options.blocks = [5 / 9], [256, 512], 2, 2
        options.work = options.out = options.images = options.work / "quick"
    options.lengths = sorted(set(options.lengths))
    options.work.mkdir(parents=True, exist_ok=True)
    if options.only != "page":
        _measure(options)
    write(options.out, options.images, collect_cells(options.work, options.out / f"{NAME}.json", SAME))


def _measure(options: argparse.Namespace) -> None:
    """Measure every cell that has no file, one model at a time."""
    dense = MODELS[options.model]()
    most = load_config(dense).max_position_embeddings
    if max(options.lengths) > most:
        raise ValueError(f"lengths must be at most the {most} positions of {options.model}, got {max(options.lengths)}")
    of: dict[tuple[str, float], Callable[[], PreTrainedModel]] = {
        (DENSE, 1.0): lambda: load_causal_lm(dense, dtype=torch.float32)
    }
    # all models before the first cell, so that a missing one is an error now and not after hours
    for share in options.shares:
        for method in options.methods:
            path = converted(options.models, options.model, method, share)
            of[method, share] = lambda path=path: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokenizer = load_tokenizer(dense)
    heldout = {text: load_corpus(text).heldout for text in options.texts}
    about = {"model": options.model, "cpu": cpu_name(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    for (method, share), load in of.items():
        files = [(_file(options, method, share, cell), cell) for cell in _cells(options)]
        missing = [(file, cell) for file, cell in files if not _is_measured(file, cell)]
        if not missing:
            continue
        model = load().eval()
        of_model = {**about, "method": method, "aim": share, "share": getattr(model.config, "share", 1.0)}
        for file, cell in missing:
            start = time.perf_counter()
            found = _measured(model, tokenizer, heldout, cell)
            seconds = round(time.perf_counter() - start, 1)
            write_text(file, json.dumps({**of_model, **cell, **found, "seconds": seconds}, indent=1) + "\n")
            print(file.stem, f"{seconds:.0f} s", flush=True)


def _measured(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, heldout: dict[str, list[str]], cell: dict[str, Any]
) -> dict[str, Any]:
    if cell["kind"] == "positions":
        blocks = pack_tokens(heldout[cell["text"]], tokenizer, seq_len=cell["edges"][-1])
        return {
            "losses": [position_losses(model, block, cell["edges"]) for block in evenly_spread(blocks, cell["blocks"])]
        }
    length = cell["length"]
    documents = [document for parts in heldout.values() for document in parts]
    made = haystacks(documents, tokenizer, length=length, count=cell["haystacks"], seed=length)
    return {"answers": [dataclasses.asdict(ask(model, haystack)) for haystack in made]}


def _file(options: argparse.Namespace, method: str, share: float, cell: dict[str, Any]) -> Path:
    of = cell["text" if cell["kind"] == "positions" else "length"]
    return cell_file(options.work, options.model, method, share, cell["kind"], of)


def _cells(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What is measured of each model, with all that the figures depend on."""
    for text in options.texts if options.only != "needles" else ():
        yield {"kind": "positions", "text": text, "edges": [0, *options.lengths], "blocks": options.blocks}
    for length in options.lengths if options.only != "positions" else ():
        yield {
            "kind": "needles",
            "length": length,
            "haystacks": options.haystacks,
            "texts": options.texts,
            "depths": [*DEPTHS],
        }


def _is_measured(file: Path, cell: dict[str, Any]) -> bool:
    """Whether a cell has its file.

    Raises:
        ValueError: the file was measured with other options, so that no model could be compared with it.
    """
    if not file.exists():
        return False
    kept = json.loads(file.read_text("utf-8"))
    if other := [name for name, value in cell.items() if kept[name] != value]:
        raise ValueError(
            f"{file} was measured with {other[0]} {kept[other[0]]}, not {cell[other[0]]}: choose another --work, or the same "
            "options"
        )
    return True


@torch.no_grad()
def position_losses(model: PreTrainedModel, block: Tensor, edges: Sequence[int]) -> list[float]:
    """Mean loss in nats of the tokens at positions from each edge up to the next; the first token is not predicted.

    The logits are taken from the last hidden states some tokens at a time, since those of a whole block take 8 GB with
    Gemma's vocabulary. That is right where the model does no more to them, as Llama and Gemma 3.

    Args:
        model: in evaluation mode.
        block: `[N]` token ids.
        edges: ascending positions, the last one at most N.
    """
    hidden = model.base_model(input_ids=block[None], use_cache=False).last_hidden_state[0]  # [N, C]
    head = model.get_output_embeddings()

    def losses(first: int, last: int) -> Iterator[Tensor]:
        for x, ids in zip(
            hidden[first - 1 : last - 1].split(_TOKENS_PER_CALL), block[first:last].split(_TOKENS_PER_CALL), strict=True
        ):
            yield F.cross_entropy(head(x).float(), ids, reduction="none").double()

    return [float(torch.cat(list(losses(max(1, first), last))).mean()) for first, last in pairwise(edges)]


if __name__ == "__main__":
    main()
