"""A converted model next to what else runs a language model on a CPU: transformers, compiled or not, and llama.cpp.

    python -m benchmarks.engines --dense DENSE --gguf DENSE.gguf --moh MOH... --threads 1 --out FILE.json \\
        --llama-python PYTHON --int8-python PYTHON

Measures the tokens per second in which 512 tokens are read, those in which more are decoded one by one after them, and the
perplexity of the same held-out text. Each engine is a process that stays (`engine_worker`); they take turns, so that a slow
phase of the machine affects all. `--report FILE...` prints files of earlier calls as tables. Engines whose Python is not
given are left out.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.engine_worker import CLOCKS, LENGTH, NEW
from moh._files import check_writable, write_text

WORKER = Path(__file__).parent / "engine_worker.py"


class Worker:
    """A running engine.

    Args:
        name: how the table calls it.
        engine: for the worker: the engine and its options.
        python: of the engine's environment.
        model: directory or file.
        threads: for its products.
        tokens: file with the ids of the text.
        clock: what its times are read from, of `CLOCKS`.
    """

    def __init__(
        self, name: str, engine: str, python: str, model: str, threads: int, tokens: Path, clock: str = "wall"
    ) -> None:
        self.name = name
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(
            [python, str(WORKER), engine, model, str(threads), str(tokens), clock],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )

    def answer(self) -> Any:
        """Its next line.

        Raises:
            RuntimeError: it ended.
        """
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with exit code {self.process.wait()}; its messages are above")
        return json.loads(line)

    def ask(self, request: str) -> Any:
        """The answer to a request."""
        assert self.process.stdin is not None
        self.process.stdin.write(request + "\n")
        self.process.stdin.flush()
        return self.answer()


def contenders(options: argparse.Namespace) -> list[tuple[str, str, str, str]]:
    """(name, engine with its options, Python, model) of everything whose Python is given.

    Raises:
        ValueError: two would have the same name.
    """
    here, dense = sys.executable, options.dense
    found = [
        ("transformers, float32", "transformers float32", here, dense),
        ("transformers, bfloat16", "transformers bfloat16", here, dense),
        ("transformers, float32, compiled, static cache", "transformers float32 compiled", here, dense),
    ]
    if options.int8_python:
        found.append(("transformers, int8", "transformers float32 int8", options.int8_python, dense))
    for model in options.moh:
        share = _share(model)
        found += [
            (f"ours, {share}, {dtype}", f"transformers moh {dtype}", here, model) for dtype in ("float32", "bfloat16")
        ]
        if options.int8_python:
            found.append((f"ours, {share}, int8", "transformers moh float32 int8", options.int8_python, model))
    if options.llama_python:
        for kind in ("f16", "bf16", "q8_0"):
            found.append((f"llama.cpp, {kind.upper()}", f"llama.cpp {kind}", options.llama_python, options.gguf))
    found = [one for one in found if not any(text in one[0] for text in options.without)]
    if len({name for name, *_ in found}) < len(found):
        raise ValueError(
            "--moh must be models of different shares of heads, by which rows are named: make two calls of it"
        )
    return found


def _share(model: str) -> str:
    from moh.models.transformers.loading import load_config

    return f"{load_config(model).share:.0%} of the heads"


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Start, check and time all engines in turns.

    Raises:
        ValueError: the models or the text don't do for it.
    """
    import torch

    from moh.data.text.blocks import evenly_spread
    from moh.evaluation import cpu_name
    from moh.models.transformers.loading import load_tokenizer
    from moh.training import load_corpus, pack_tokens

    engines = contenders(options)
    torch.set_num_threads(options.threads)
    text = load_corpus(options.corpus).heldout
    blocks = evenly_spread(pack_tokens(text, load_tokenizer(options.dense), seq_len=LENGTH), options.blocks)
    if blocks.numel() < LENGTH + NEW:
        raise ValueError(
            f"--blocks must give at least {LENGTH + NEW} tokens, but {options.blocks} have {blocks.numel()}"
        )
    with tempfile.TemporaryDirectory() as folder:
        tokens = Path(folder) / "tokens.json"
        tokens.write_text(json.dumps(blocks.flatten().tolist()))
        workers = []
        for name, engine, python, model in engines:
            worker = Worker(name, engine, python, model, options.threads, tokens, options.clock)
            worker.answer()  # one loads at a time
            workers.append(worker)
            print(f"{name}: ready", file=sys.stderr, flush=True)
        rows = {
            worker.name: dict(nats=worker.ask("perplexity"), bytes=worker.ask("bytes"), prefill=[], decode=[])
            for worker in workers
        }
        memory, reading = torch.ones(2**27), []  # 512 MB
        if options.wait_for:
            while not Path(options.wait_for).exists():
                time.sleep(0.5)
        for turn in range(options.rounds):
            reading.append(memory.nbytes / _seconds(memory.sum, CLOCKS[options.clock]))
            for step in range(len(workers)):
                worker = workers[(step + turn) % len(workers)]
                prefill, decode = worker.ask("time")
                rows[worker.name]["prefill"].append(prefill)
                rows[worker.name]["decode"].append(decode)
        for worker in workers:
            worker.process.kill()
            worker.process.wait()
    about = dict(
        cpu=cpu_name(), clock=options.clock, threads=options.threads, corpus=options.corpus, tokens=blocks.numel()
    )
    return about | dict(bytes_per_second=reading, rows=rows)


def _seconds(call: Callable[[], object], clock: Callable[[], float]) -> float:
    start = clock()
    call()
    return clock() - start


def table(found: dict[str, Any]) -> str:
    """A result as a table: medians and quartiles of tokens per second."""
    second = "CPU s" if found["clock"] == "cpu" else "s"
    lines = [
        f"{found['threads']} thread{'s' * (found['threads'] > 1)} of an {found['cpu']}; perplexity of {found['tokens']:,} "
        f"held-out tokens of {found['corpus']}.",
        "",
        f"| engine | read {LENGTH} tokens, tokens/{second} | decode after them, tokens/{second} | times the limit | perplexity |",
        "| --- | --- | --- | --- | --- |",
    ]
    speed = statistics.median(found["bytes_per_second"])
    for name, row in found["rows"].items():
        prefill, decode = _rates(row["prefill"], LENGTH), _rates(row["decode"], 1)
        limit = f"{statistics.median(row['decode']) * speed / row['bytes']:.2f}" if row["bytes"] else "–"
        lines.append(f"| {name} | {prefill} | {decode} | {limit} | {math.exp(statistics.fmean(row['nats'])):.2f} |")
    rounds = len(next(iter(found["rows"].values()))["prefill"])
    lines += [
        "",
        f"Medians (quartiles) of {rounds} rounds in turns, {NEW} decoded tokens each. The limit is the time in which `torch.sum` "
        f"reads all weights and the cache: {speed / 1e9:.1f} GB per {second} in the same rounds.",
    ]
    return "\n".join(lines)


def _rates(seconds: Sequence[float], tokens: int) -> str:
    low, median, high = statistics.quantiles([tokens / s for s in seconds], n=4, method="inclusive")
    digits = 0 if median >= 100 else 1
    return f"{median:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the options, measure and print, or print files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", nargs="+", metavar="FILE", help="print these results instead of measuring")
    parser.add_argument("--dense", help="directory of the dense model")
    parser.add_argument(
        "--gguf",
        help="the .gguf file that DENSE was read from, whose numbers llama.cpp rounds again in files next to it",
    )
    parser.add_argument("--moh", nargs="*", default=[], help="directories of models converted from it")
    parser.add_argument("--llama-python", metavar="PYTHON", help="of an environment with llama-cpp-python")
    parser.add_argument("--int8-python", metavar="PYTHON", help="of one with moh and torchao")
    parser.add_argument(
        "--without", nargs="+", default=[], metavar="TEXT", help="leave out engines with it in their name"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: where other work shares the processor")
    parser.add_argument("--rounds", type=int, default=7, help="at least 2")
    parser.add_argument("--corpus", default="django-docs")
    parser.add_argument("--blocks", type=int, default=4, help=f"of {LENGTH} tokens, for the perplexity")
    parser.add_argument("--wait-for", metavar="FILE", help="begin to time when it exists, to stop other work first")
    parser.add_argument("--out", metavar="FILE", help="write the samples there as JSON")
    options = parser.parse_args(arguments)
    if options.report:
        print("\n\n".join(table(json.loads(Path(file).read_text())) for file in options.report))
        return
    if not options.dense or (options.llama_python and not options.gguf):
        parser.error("--dense is required, and --gguf with --llama-python")
    if options.rounds < 2:
        parser.error(f"--rounds must be at least 2, for quartiles, got {options.rounds}")
    try:
        if options.out:
            check_writable(Path(options.out).parent, name="--out")
        found = measure(options)
    except ValueError as error:
        parser.error(str(error))
    if options.out:
        Path(options.out).parent.mkdir(parents=True, exist_ok=True)
        write_text(Path(options.out), json.dumps(found, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
