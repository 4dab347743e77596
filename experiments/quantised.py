"""What quantised weights change in a dense language model and in the MoH model that was converted from it.

    python experiments/quantised.py DENSE MOH

Both are directories in float32; MOH as `moh convert --active-heads 4 --router linear --dtype float32` writes it from DENSE.
Prints a row for each model and quantisation: the share of (token, layer) whose heads differ from those in float32, perplexity on
held-out text with its paired difference to the same model in float32, and the size of the weights in memory and on disk.
Quantisers leave routers alone; "int8" in the column of routers is a variant in which their weights are rounded by hand.
Needs the extra `llm`, torchao and bitsandbytes.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torchao.quantization as torchao
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel, TorchAoConfig

from moh import record_routing
from moh.data.text.blocks import evenly_spread
from moh.evaluation import PerplexityResult, cpu_name, perplexity, perplexity_rise
from moh.models.transformers.loading import load_causal_lm, load_tokenizer
from moh.routing import Router, Scorer
from moh.training import load_corpus, pack_tokens

KINDS: dict[str, Callable[[], Any]] = {
    "float32": lambda: None,
    "torchao int8": lambda: TorchAoConfig(torchao.Int8WeightOnlyConfig()),
    "torchao int4, groups of 64": lambda: TorchAoConfig(
        torchao.IntxWeightOnlyConfig(torch.int4, torchao.granularity.PerGroup(64))
    ),
    "torchao int8, activations too": lambda: TorchAoConfig(torchao.Int8DynamicActivationInt8WeightConfig()),
    "bitsandbytes 8 bit": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "bitsandbytes 4 bit (nf4)": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
}


def main() -> None:
    """Parse the options, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense", help="directory of the dense model")
    parser.add_argument("moh", help="directory of the converted model")
    parser.add_argument("--kinds", nargs="+", choices=[*KINDS][1:], default=[*KINDS][1:], metavar="KIND")
    parser.add_argument("--corpora", nargs="+", default=["django-docs", "anarchism"])
    parser.add_argument("--tokens", type=int, default=8_192, help="held-out, of all corpora together")
    parser.add_argument("--seq-len", type=int, default=512)
    options = parser.parse_args()
    tokenizer = load_tokenizer(options.dense)
    count = options.tokens // options.seq_len // len(options.corpora)
    texts = [pack_tokens(load_corpus(name).heldout, tokenizer, seq_len=options.seq_len) for name in options.corpora]
    blocks = torch.cat([evenly_spread(text, count) for text in texts])

    text = f"{blocks.numel():,} tokens in blocks of {options.seq_len} of {', '.join(options.corpora)}"
    print(f"{text}; {cpu_name()}, torch {torch.__version__}\n")
    print("| model | weights | routers | other heads | perplexity | above float32 | memory, MB | disk, MB |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, path in (("dense", options.dense), ("MoH", options.moh)):
        expected: list[Tensor] = []
        base: PerplexityResult | None = None
        for kind in ("float32", *options.kinds):
            for rounded in (False, True) if name == "MoH" and kind == "torchao int8" else (False,):
                model = load_causal_lm(path, dtype=torch.float32, quantization_config=KINDS[kind]()).eval()
                disk = _size_on_disk(model)  # before the first call: bitsandbytes then packs 4-bit weights for the CPU
                memory = sum({tensor.data_ptr(): tensor.nbytes for tensor in _tensors(model)}.values())
                if rounded:
                    _round_routers(model)
                with record_routing(model) as routing:
                    measured = perplexity(model, blocks, batch_size=4)
                chosen = [info.active for _, info in routing]
                expected, base = expected or chosen, base or measured
                differ = [(a != b).any(-1).flatten() for a, b in zip(chosen, expected, strict=True)]
                other = f"{100 * float(torch.cat(differ).double().mean()):.2f} %" if differ else "–"
                above, stderr = perplexity_rise(measured.block_losses, base.block_losses)
                routers = "–" if name == "dense" else "int8" if rounded else "float32"
                print(
                    f"| {name} | {kind} | {routers} | {other} | {measured.perplexity:.3f} | {above:+.2f} % ± {stderr:.2f} "
                    f"| {memory / 1e6:.0f} | {disk / 1e6:.0f} |",
                    flush=True,
                )


def _round_routers(model: nn.Module) -> None:
    """Round the weights of the routers to 8 bits, with a scale for each row, as the quantisers do with linear layers."""
    for router in (module for module in model.modules() if isinstance(module, Router)):
        for scorer in (module for module in router.modules() if isinstance(module, Scorer)):
            weight = scorer.weight.data
            scale = weight.abs().amax(1, keepdim=True) / 127
            weight.copy_((weight / scale).round() * scale)


def _size_on_disk(model: PreTrainedModel) -> int:
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        return sum(file.stat().st_size for file in Path(directory).glob("*.safetensors"))


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    """What the weights are made of: of a quantised one its integers and its scales."""
    for value in model.state_dict().values():
        if hasattr(value, "__tensor_flatten__"):
            parts, _ = value.__tensor_flatten__()
            yield from (getattr(value, part) for part in parts)
        else:
            yield value


if __name__ == "__main__":
    main()
