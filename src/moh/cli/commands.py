"""What each command of `moh` does with its parsed arguments. Imports what it needs when it runs."""

from __future__ import annotations

import json
import math
from argparse import Namespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


def run_demo(arguments: Namespace) -> None:
    from moh._extras import require

    for module in ("transformers", "rich", "matplotlib", "gguf"):
        require(module, extra="llm")
    from moh.demo import DemoSettings, run_demo

    names = "output_dir base corpus shared_heads active_heads steps minutes batch_size"
    names += " learning_rate distillation_weight full seed"
    run_demo(DemoSettings(files=tuple(arguments.files), **{name: getattr(arguments, name) for name in names.split()}))


def run_train(arguments: Namespace) -> None:
    from moh.training import load_recipe, train

    result = train(load_recipe(arguments.recipe, arguments.overrides))
    step, loss = result.losses[-1] if result.losses else (0, float("nan"))
    print(f"{result.model_dir}: step {step}, loss {loss:.4f}, {result.precision}")


def run_eval(arguments: Namespace) -> None:
    from moh.cli import images

    if images.is_classifier(arguments):
        images.run_eval(arguments)
        return
    from moh.evaluation import perplexity
    from moh.models.transformers.loading import default_device, load_causal_lm, load_tokenizer

    tokenizer = load_tokenizer(arguments.model)
    if arguments.all_text:
        from moh.training import read_texts

        if not arguments.files:
            raise ValueError("--all-text needs --files")
        texts = read_texts(arguments.files)
    else:
        texts = read_corpus(arguments).heldout
    result = perplexity(
        load_causal_lm(arguments.model, device=default_device()),
        _blocks(texts, tokenizer, arguments.seq_len, arguments.max_tokens),
    )
    if arguments.json:
        stderr = None if math.isnan(result.stderr) else result.stderr  # a single block; JSON has no NaN
        print(json.dumps({"perplexity": result.perplexity, "loss": result.loss, "stderr": stderr,
                          "tokens": result.tokens}))  # fmt: skip
    else:
        print(
            f"perplexity {result.perplexity:.3f} (loss {result.loss:.4f} ± {result.stderr:.4f} nats per token, "
            f"{result.tokens:,} tokens)"
        )


def read_corpus(arguments: Namespace) -> Any:
    """The text that a command line names."""
    from moh.training import corpus_from_files, load_corpus

    return corpus_from_files(arguments.files) if arguments.files else load_corpus(arguments.corpus)


def _blocks(texts: list[str], tokenizer: PreTrainedTokenizerBase, seq_len: int, max_tokens: int) -> Tensor:
    from moh.training import pack_tokens

    if seq_len < 2 or max_tokens < seq_len:
        raise ValueError(
            f"--seq-len must be at least 2 and --max-tokens at least --seq-len, got {seq_len}, {max_tokens}"
        )
    blocks = pack_tokens(texts, tokenizer, seq_len=seq_len)
    return blocks[: max_tokens // seq_len]
