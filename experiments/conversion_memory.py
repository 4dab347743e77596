"""How much memory `moh.convert` takes, above what its imports take: SmolLM2-135M by default settings; Linux.

    python experiments/conversion_memory.py

Prints the process's resident memory after the imports, after loading, and its peak in loading and in the conversion, as
multiples of the model's weights in float32; and the conversion's time, elapsed and on all processors. Needs the extra `llm`.
"""

from __future__ import annotations

import argparse
import importlib
import time
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

import moh
from moh.data.text.corpora import default_cache_dir
from moh.demo.base_model import default_base_model
from moh.evaluation import cpu_name
from moh.models.transformers.loading import load_causal_lm, load_tokenizer
from moh.training import load_corpus


def main() -> None:
    """Parse the options, load, convert and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="default: SmolLM2-135M")
    parser.add_argument("--texts", nargs="+", default=["django-docs", "anarchism"])
    parser.add_argument("--calibration-tokens", type=int, default=49_152)
    parser.add_argument("--lengths", type=int, nargs="+", help="of the blocks of text; default: that of moh.convert")
    options = parser.parse_args()
    set_verbosity_error()
    disable_progress_bar()
    for part in ("convert", "calibrator", "transformers"):
        importlib.import_module(f"moh.conversion.{part}")
    path = options.model or default_base_model()
    imports = resident("VmRSS")
    dense = load_causal_lm(path, dtype=torch.float32)
    weights = sum(p.numel() * p.element_size() for p in dense.parameters())
    print(
        f"imports {imports / 1e9:.2f} GB, model {weights / 1e9:.2f} GB; {cpu_name()}, {torch.get_num_threads()} thread(s)"
    )
    show("loaded", resident("VmRSS"), imports, weights)
    show("peak in loading", resident("VmHWM"), imports, weights)
    tokenizer = load_tokenizer(path)
    corpora = [load_corpus(name, default_cache_dir()).train for name in options.texts]
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
    start, spent = time.perf_counter(), time.process_time()
    moh.convert(dense, calibration=[t for of_one in corpora for t in of_one], tokenizer=tokenizer, copy_weights=False,
                calibration_tokens=options.calibration_tokens, seq_len=options.lengths, progress=False)  # fmt: skip
    times = f"{time.perf_counter() - start:.0f} s, {time.process_time() - spent:.0f} s of processor time"
    show(
        f"peak in converting, {times}",
        resident("VmHWM"),
        imports,
        weights,
    )


def show(what: str, size: int, imports: int, weights: int) -> None:
    """One line."""
    print(f"{what}: {size / 1e9:.2f} GB, {(size - imports) / weights:.2f} models above the imports", flush=True)


def resident(field: str) -> int:
    """Bytes of the process's resident memory (VmRSS) or its peak (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: this needs Linux")


if __name__ == "__main__":
    main()
