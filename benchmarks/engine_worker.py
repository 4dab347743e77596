"""One engine of `benchmarks.engines`, in a process and with a Python of its own: moh is imported for our models alone.

    python benchmarks/engine_worker.py ENGINE MODEL THREADS TOKENS CLOCK

Reads the ids of a text from the file TOKENS, at least `LENGTH + NEW` of them, loads, prints "ready", and then answers each line
of its input with a line of JSON: "perplexity" with the nats per token of the text in blocks of `LENGTH`; "bytes" with the size of
the weights and cache that a token after `LENGTH` others reads, or null where only the engine knows; "time" with the seconds of
CLOCK, "wall" or "cpu", that it took to read the first `LENGTH` tokens into an empty cache, and those per token of the `NEW` that
follow one by one.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

LENGTH, NEW = 512, 16
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


class Torch:
    """transformers, and everything that runs in it: `options` are words of float32, bfloat16, int8, moh, compiled."""

    def __init__(self, model: str, threads: int, options: set[str]) -> None:
        import torch
        from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

        if "moh" in options:
            import moh  # noqa: F401  # its models are known by name from now on
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.torch, self.dynamic, self.static = torch, DynamicCache, None
        dtype = torch.bfloat16 if "bfloat16" in options else torch.float32
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
        if "int8" in options:
            from torchao.quantization import Int8WeightOnlyConfig, quantize_  # type: ignore[import-not-found, import-untyped, unused-ignore]

            quantize_(self.model, Int8WeightOnlyConfig())  # the output layer too; the embeddings stay as they are
        self.run: Callable[..., Any] = self.model
        if "compiled" in options:
            self.static = StaticCache(config=self.model.config, max_cache_len=LENGTH + NEW)
            self.run = torch.compile(self.model, dynamic=False)

    def nats(self, block: list[int]) -> float:
        """Mean loss of a block's tokens."""
        ids = self.torch.tensor([block])
        return float(self.model(input_ids=ids, labels=ids, use_cache=False).loss)

    def bytes(self) -> int:
        """All weights but the embeddings, unless they are the output layer's, and the cache.

        Those of inactive heads count, which are not read; W_O counts once, however many shares the model is set to.
        """
        found: dict[int, int] = {}
        for name, weight in self.model.state_dict(keep_vars=True).items():
            if weight is self.model.get_input_embeddings().weight and weight is not self.model.lm_head.weight:
                continue
            if ".output_changes." in name:  # of other shares
                continue
            for part in (weight.qdata, weight.scale) if hasattr(weight, "qdata") else (weight,):
                found[part.data_ptr()] = part.nbytes
        config = self.model.config
        width = 2 * config.num_key_value_heads * config.head_dim * self.model.dtype.itemsize
        return sum(found.values()) + LENGTH * int(config.num_hidden_layers * width)

    def read(self, tokens: list[int]) -> None:
        """Read a text into an empty cache."""
        if self.static is not None:
            self.static.reset()
        self.cache = self.static or self.dynamic(config=self.model.config)
        self.position = 0
        self.next(tokens)

    def next(self, tokens: list[int]) -> None:
        """Read more."""
        ids = self.torch.tensor([tokens])
        positions = self.torch.arange(self.position, self.position + len(tokens))[None]
        self.run(input_ids=ids, position_ids=positions, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.position += len(tokens)


class LlamaCpp:
    """llama.cpp by llama-cpp-python: the .gguf file as its kind of `options` ("f16", "bf16" or "q8_0"), made beside it.

    The file may be quantised itself. Its numbers, which transformers reads as float32, are then rounded a second time here,
    as they are by int8 of `Torch`.
    """

    KINDS: ClassVar = {"f16": 1, "q8_0": 7, "bf16": 32}  # enum llama_ftype

    def __init__(self, model: str, threads: int, options: set[str]) -> None:
        import llama_cpp  # type: ignore[import-not-found, import-untyped, unused-ignore]
        import numpy

        (kind,) = options
        self.numpy = numpy
        path = Path(model).with_suffix(f".{kind}.gguf")
        if not path.exists():
            settings = llama_cpp.llama_model_quantize_default_params()
            settings.ftype, settings.allow_requantize, settings.nthread = self.KINDS[kind], True, threads
            part = path.with_suffix(".part")
            if llama_cpp.llama_model_quantize(model.encode(), str(part).encode(), settings):
                raise RuntimeError(f"llama.cpp can't write {path}")
            part.rename(path)
        common = dict(n_ctx=LENGTH + NEW, n_batch=LENGTH, n_threads=threads, n_threads_batch=threads, verbose=False)
        self.make: Callable[..., Any] = lambda **more: llama_cpp.Llama(str(path), **common, **more)
        self.model = self.make()

    def nats(self, block: list[int]) -> float:
        """Mean loss of a block's tokens."""
        model = self.make(logits_all=True)
        model.eval(block)
        logits = self.numpy.asarray(model.scores[: len(block) - 1], dtype=self.numpy.float64)
        logits -= logits.max(1, keepdims=True)
        losses = self.numpy.log(self.numpy.exp(logits).sum(1)) - logits[range(len(block) - 1), block[1:]]
        return float(losses.mean())

    def read(self, tokens: list[int]) -> None:
        """Read a text into an empty cache."""
        self.model.reset()
        self.model.eval(tokens)

    def next(self, tokens: list[int]) -> None:
        """Read more."""
        self.model.eval(tokens)


ENGINES: dict[str, type[Any]] = {"transformers": Torch, "llama.cpp": LlamaCpp}


def main() -> None:
    """Serve requests until the input ends."""
    name, model, threads, file, clock = sys.argv[1:]
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no reply

    def reply(value: Any) -> None:
        print(json.dumps(value), file=replies, flush=True)

    tokens: list[int] = json.loads(Path(file).read_text())
    engine, *options = name.split()
    running = ENGINES[engine](model, int(threads), set(options))
    _timed(running, tokens, CLOCKS[clock])  # compiles, and makes what is made once
    reply("ready")
    for line in sys.stdin:
        if line.strip() == "perplexity":
            blocks = [tokens[i : i + LENGTH] for i in range(0, len(tokens) - LENGTH + 1, LENGTH)]
            reply([running.nats(block) for block in blocks])
        elif line.strip() == "bytes":
            reply(running.bytes() if hasattr(running, "bytes") else None)
        else:
            reply(_timed(running, tokens, CLOCKS[clock]))


def _timed(engine: Any, tokens: list[int], clock: Callable[[], float]) -> list[float]:
    start = clock()
    engine.read(tokens[:LENGTH])
    after = clock()
    for token in tokens[LENGTH : LENGTH + NEW]:
        engine.next([token])
    return [after - start, (clock() - after) / NEW]


if __name__ == "__main__":
    main()
