"""Does routing pay? Routed heads against fixed heads, dropped layers, random heads and an oracle, at equal numbers of heads.

    python experiments/does_routing_pay.py
    python experiments/does_routing_pay.py --only speed

No gradient step. Two models, calibrated on two texts and measured on the held-out parts of these and on a third, which no
default was chosen on; then the time to read a prompt and to decode, in turns with the dense model. Each cell is a file of
its own, so that an interrupted run resumes; all of them are joined to those in `docs/results/does_routing_pay.json`, from
which the page of that name and its picture are written: `--only page` does only this. Fetches Gemma 3 270M, under Gemma's
own terms. Hours on two cores; `--quick` measures one cell of each kind. Needs the extra `llm`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from pathlib import Path
from typing import Any

import torch
from does_routing_pay_models import BEFORE, METHODS, MODELS, NOT_MODELS, ROUTED, SHARES, Chosen, Compared, cell_file
from does_routing_pay_report import NAME, SAME, write
from result_names import collect_cells
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

import moh
from moh._files import write_text
from moh.conversion.fitted import Made
from moh.conversion.transformers import LONG_SEQ_LEN
from moh.data.text.blocks import evenly_spread
from moh.evaluation import cpu_name, measure_speed, perplexity, perplexity_rise
from moh.models.transformers.loading import load_causal_lm, load_tokenizer
from moh.training import load_corpus, pack_tokens

SEQ_LEN = 512

ROUTER = "threshold"
"""Of routed layers: `moh.convert`'s default."""


def main() -> None:
    """Parse the options, measure what is missing and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=list(MODELS))
    parser.add_argument("--texts", nargs=2, default=["django-docs", "anarchism"], help="to calibrate on, half and half")
    parser.add_argument("--third", default="debian-handbook", help="a text that is only measured on")
    parser.add_argument(
        "--shares", nargs="+", type=float, help="of all heads (default: 7, 6, 5 and 4 of 9; 3 and 2.5 of 4)"
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--calibration-tokens", type=int, default=49_152)
    parser.add_argument("--heldout-tokens", type=int, default=4_096, help="of each text")
    parser.add_argument("--lengths", nargs="+", type=int, default=[512, 8_192], help="of the prompts that are timed")
    parser.add_argument("--timed-shares", nargs="+", type=float, default=[7 / 9, 5 / 9, 3 / 4])
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds")
    parser.add_argument("--only", choices=("quality", "speed", "page"))
    parser.add_argument("--quick", action="store_true", help="one model, one share, few tokens, into --work")
    parser.add_argument(
        "--work", type=Path, default=Path("does_routing_pay_work"), help="for cells and converted models"
    )
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--images", type=Path, default=Path("docs/images"))
    options = parser.parse_args()
    set_verbosity_error()
    disable_progress_bar()
    if options.quick:
        options.models, options.shares, options.timed_shares = options.models[:1], [5 / 9], [5 / 9]
        options.calibration_tokens, options.heldout_tokens, options.lengths, options.repeats = 1_024, 1_024, [128], 1
        options.out = options.images = options.work
    options.work.mkdir(parents=True, exist_ok=True)
    for name in options.models:
        if options.only not in ("speed", "page"):
            _measure_quality(options, name)
    for name in options.models:
        if options.only not in ("quality", "page"):
            _measure_speed(options, name)
    write(options.out, options.images, collect_cells(options.work, options.out / f"{NAME}.json", SAME))


def _measure_quality(options: argparse.Namespace, name: str) -> None:
    cells = [(method, share) for share in options.shares or SHARES[name] for method in options.methods]
    asked = quality_options(options)
    missing = [cell for cell in cells if not is_measured(cell_file(options.work, name, *cell), asked)]
    if not missing:
        return
    dense, tokenizer = _load(name)
    blocks = {text: _blocks(text, tokenizer, options) for text in (*options.texts, options.third)}
    calibration = torch.cat([blocks[t][0] for t in options.texts])
    heldout = {text: held for text, (_, held) in blocks.items()}
    original = {text: perplexity(dense, held, batch_size=2) for text, held in heldout.items()}
    layers, heads = dense.config.num_hidden_layers, dense.config.num_attention_heads
    about = {"model": name, "cpu": cpu_name(), "threads": torch.get_num_threads(), "torch": torch.__version__,
             "calibration_tokens": calibration.numel(), "heldout_tokens": {t: h.numel() for t, h in heldout.items()},
             "options": asked, "calibrated_on": options.texts, "dense": {t: r.perplexity for t, r in original.items()},
             "dense_cache": _cache(dense, [getattr(dense.config, "num_key_value_heads", heads)] * layers)}  # fmt: skip
    mixed = _of_two_lengths(tokenizer, options) if any(method in (ROUTED, BEFORE) for method, _ in missing) else ()
    fitted = Compared(dense, calibration, mixed=mixed, router=ROUTER)
    for method, share in missing:
        made = fitted.make_any(method, round(share * layers * heads))
        cell: dict[str, Any] = {**about, "kind": "quality", "method": method, "aim": share, "used": made.used}
        cell["share"] = sum(made.used) / (layers * heads)
        cell["cache"] = _cache(dense, made.cached)
        cell["texts"] = {text: _rise(fitted, made, held, original[text]) for text, held in heldout.items()}
        if made.model is not None:
            cell["parameters"] = sum(p.numel() for p in made.model.parameters())
            made.model.save_pretrained(cell_file(options.work, name, method, share).with_suffix(""))
        _save(cell_file(options.work, name, method, share), cell)


def _measure_speed(options: argparse.Namespace, name: str) -> None:
    methods = [method for method in options.methods if method not in NOT_MODELS]
    asked = {"text": options.texts[0], "repeats": options.repeats}
    for share, length in itertools.product(timed_shares(options, name), options.lengths):
        missing = [m for m in methods if not is_measured(cell_file(options.work, name, m, share, length), asked)]
        cells = {m: cell_file(options.work, name, m, share) for m in missing}
        for cell in cells.values():
            is_measured(cell, quality_options(options))  # refuses models that were made otherwise
        paths = {m: cell.with_suffix("") for m, cell in cells.items()}
        if absent := [str(path) for path in paths.values() if not path.is_dir()]:
            print(f"no model yet in {', '.join(absent)}: run without --only speed first")
        models = {m: AutoModelForCausalLM.from_pretrained(path).eval() for m, path in paths.items() if path.is_dir()}
        if not models:
            continue
        dense, tokenizer = _load(name)
        text = pack_tokens(load_corpus(options.texts[0]).heldout, tokenizer, seq_len=length)
        report = measure_speed({"dense": dense, **models}, prompt=text[:1], decode_tokens=16, repeats=options.repeats,
                               progress=False)  # fmt: skip
        for method, model in models.items():
            cell = {"kind": "speed", "model": name, "method": method, "aim": share, "length": length, "options": asked,
                    "share": model.config.share, "cpu": report.device, "threads": report.threads}  # fmt: skip
            for phase in ("prefill", "decode"):
                ours, theirs = (getattr(report.models[m], phase) for m in (method, "dense"))
                ratios = [d / o for o, d in zip(ours.values, theirs.values, strict=True)]  # times, from rates
                middle = sorted(ratios)[len(ratios) // 2]
                cell[phase] = {"to_dense": middle, "ratios": ratios, "dense_rate": theirs.median}
            _save(cell_file(options.work, name, method, share, length), cell)


def quality_options(options: argparse.Namespace) -> dict[str, Any]:
    """What a cell of the quality depends on besides its model, method and share."""
    return {
        "router": ROUTER,
        "texts": [*options.texts, options.third],
        "calibration_tokens": options.calibration_tokens,
        "heldout_tokens": options.heldout_tokens,
    }


def is_measured(file: Path, asked: dict[str, Any]) -> bool:
    """Whether a cell has its file.

    Raises:
        ValueError: the file was measured with other options, so that no other cell could be compared with it.
    """
    if not file.exists():
        return False
    kept = json.loads(file.read_text("utf-8")).get("options")
    if kept is None:
        raise ValueError(
            f'{file} does not state its options: choose another --work, or add "options": {json.dumps(asked)} to it if it was '
            "measured with these"
        )
    for name, value in asked.items():
        if kept.get(name) != value:
            raise ValueError(
                f"{file} was measured with {name} {kept.get(name)}, not {value}: choose another --work, or the same options"
            )
    return True


def timed_shares(options: argparse.Namespace, name: str) -> list[float]:
    """The shares of this model that are to be timed; 0.78 on the command line is not 7 / 9, but 0.7777777778 is."""
    shares = options.shares or SHARES[name]
    return [s for s in shares if any(math.isclose(s, timed, abs_tol=1e-6) for timed in options.timed_shares)]


def _load(name: str) -> tuple[PreTrainedModel, Any]:
    path = MODELS[name]()
    return load_causal_lm(path, dtype=torch.float32).eval(), load_tokenizer(path)


def _blocks(name: str, tokenizer: Any, options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Calibration and held-out tokens of a text."""
    corpus = load_corpus(name)
    counts = options.calibration_tokens // 2, options.heldout_tokens
    parts = zip((corpus.train, corpus.heldout), counts, strict=True)
    train, held = (evenly_spread(pack_tokens(p, tokenizer, seq_len=SEQ_LEN), n // SEQ_LEN) for p, n in parts)
    return train, held


def _of_two_lengths(tokenizer: Any, options: argparse.Namespace) -> list[Tensor]:
    """Calibration tokens of both texts, half of them in long blocks, as `moh.convert` takes them."""
    return [
        torch.cat(
            [
                evenly_spread(
                    pack_tokens(load_corpus(name).train, tokenizer, seq_len=length),
                    max(1, options.calibration_tokens // 4 // length),
                )
                for name in options.texts
            ]
        )
        for length in (SEQ_LEN, LONG_SEQ_LEN)
    ]


def _rise(fitted: Compared, made: Made | Chosen, heldout: Tensor, original: Any) -> dict[str, float]:
    """The perplexity on a text, and the heads that its tokens used over all layers, those with fixed heads included."""
    used: float = sum(made.used)
    if isinstance(made, Made):
        with moh.record_routing(made.model) as routing:
            now = perplexity(made.model, heldout, batch_size=2)
        used = routing.share() * fitted.total(1.0)  # an average, which another text may not have
    else:
        with fitted.dense_with(made.changes) as model:
            now = perplexity(model, heldout, batch_size=2)
    above, stderr = perplexity_rise(now.block_losses, original.block_losses)
    return {"perplexity": now.perplexity, "above": above, "stderr": stderr, "used": used}


def _cache(dense: PreTrainedModel, kv_heads: list[int]) -> int:
    """Bytes of keys and values per token, in the model's dtype."""
    config = dense.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * width * dense.dtype.itemsize * sum(kv_heads)


def _save(file: Path, cell: dict[str, Any]) -> None:
    write_text(file, json.dumps(cell, indent=1) + "\n")
    shown = {text: f"{v['above']:+.1f} %" for text, v in cell.get("texts", {}).items()}
    print(file.stem, shown or {p: round(cell[p]["to_dense"], 3) for p in ("prefill", "decode")}, flush=True)


if __name__ == "__main__":
    main()
