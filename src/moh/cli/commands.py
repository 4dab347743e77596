"""What each command of `moh` does with its parsed arguments. Imports what it needs when it runs."""

from __future__ import annotations

import json
import math
import platform
from argparse import Namespace
from pathlib import Path
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


def run_convert(arguments: Namespace) -> None:
    from moh.conversion import convert
    from moh.models.loading import default_device, load_causal_lm, load_tokenizer
    from moh.training.checkpoints import check_replaceable, replacing_directory

    if Path(arguments.output).resolve() == Path(arguments.model).resolve():
        raise ValueError(f"output must not be the directory of the dense model itself, got {arguments.output}")
    check_replaceable(arguments.output, name="output")
    calibration = None if arguments.router == "query_norm" else read_corpus(arguments).train
    model = convert(
        load_causal_lm(arguments.model, device=default_device()),
        shared_heads=arguments.shared_heads,
        active_heads=arguments.active_heads,
        router=arguments.router,
        calibration=calibration,
        tokenizer=load_tokenizer(arguments.model),
        calibration_tokens=arguments.calibration_tokens,
        allocation=arguments.allocation,
        refit_output=arguments.refit_output,
    )
    with replacing_directory(Path(arguments.output)) as scratch:
        model.save_pretrained(scratch)
        load_tokenizer(arguments.model).save_pretrained(scratch)
    print(f"{arguments.output}: MoH model, each token uses {100 * model.config.share:.0f} % of the heads")


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
    from moh.models.loading import default_device, load_causal_lm, load_tokenizer

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


def run_generate(arguments: Namespace) -> None:
    import torch
    from transformers import TextStreamer

    from moh.models.loading import default_device, load_causal_lm, load_tokenizer

    if arguments.max_new_tokens < 1 or arguments.temperature < 0:
        raise ValueError("--max-new-tokens must be at least 1 and --temperature at least 0")
    tokenizer = load_tokenizer(arguments.model)
    model = load_causal_lm(arguments.model, device=default_device())
    torch.manual_seed(arguments.seed)
    sampling = (
        {"do_sample": True, "temperature": arguments.temperature} if arguments.temperature else {"do_sample": False}
    )
    inputs = tokenizer(arguments.prompt, return_tensors="pt").to(model.device)
    if inputs.input_ids.shape[1] == 0:
        raise ValueError(f"prompt must hold at least one token, got {arguments.prompt!r}")
    model.generate(
        **inputs, max_new_tokens=arguments.max_new_tokens, streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        **sampling,
    )  # fmt: skip


def run_inspect(arguments: Namespace) -> None:
    from moh.cli import images

    if images.is_classifier(arguments):
        images.run_inspect(arguments)
        return
    if arguments.classes is not None:
        raise ValueError("--classes is for image classifiers: give --images too")
    check_targets(arguments)
    if arguments.html is not None:
        from moh.cli.pages import write_text_page

        write_text_page(arguments)
    if arguments.out is None:
        return
    from moh.inspection import head_load
    from moh.inspection.plots import plot_head_load, save
    from moh.models.loading import default_device, load_causal_lm, load_tokenizer

    out = Path(arguments.out)
    tokenizer = load_tokenizer(arguments.model)
    blocks = _blocks(read_corpus(arguments).heldout, tokenizer, arguments.seq_len, arguments.max_tokens)
    load = head_load(load_causal_lm(arguments.model, device=default_device()), blocks)
    out.mkdir(parents=True, exist_ok=True)
    load.save_csv(out / "head_load.csv")
    for suffix in ("png", "svg"):
        save(plot_head_load(load), out / f"head_load.{suffix}")
    for layer, (share, config) in enumerate(zip(load.share, load.layers, strict=True)):
        routed = load.load[layer, list(config.routed_indices)]
        spread = f"routed heads' load {routed.min():.2f} to {routed.max():.2f}" if len(routed) else "no routed heads"
        print(f"layer {layer:3d}: {100 * share:3.0f} % of the heads used; {spread}")
    print(f"{out}: head_load.csv, head_load.png, head_load.svg ({load.tokens:,} tokens)")


def check_targets(arguments: Namespace) -> None:
    """Check, before anything is computed, that something is to be written and can be."""
    from moh.training.checkpoints import check_writable

    if arguments.out is None and arguments.html is None:
        raise ValueError("--out DIR or --html FILE must say where the result goes")
    if arguments.out is not None:
        check_writable(arguments.out, name="--out")
    if arguments.html is not None:
        check_writable(Path(arguments.html).parent, name="--html's directory")
        if not Path(arguments.html).parent.is_dir():
            raise ValueError(f"--html must be a file in a directory that exists, got {arguments.html}")


def run_info(arguments: Namespace) -> None:
    import torch

    import moh
    from moh.attention import backends
    from moh.evaluation.machine import cpu_name

    print(f"moh {moh.__version__}, Python {platform.python_version()}, {platform.platform()}")
    for name in ("torch", "transformers", "accelerate", "timm", "diffusers"):
        print(f"  {name:13s} {_version(name)}")
    print("devices")
    print(f"  cpu           {cpu_name()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    for index in range(torch.cuda.device_count()):
        print(f"  cuda:{index}        {torch.cuda.get_device_name(index)}")
    print("attention backends, the first that supports a call serves it")
    q, gates = torch.zeros(1, 2, 4, 8), torch.zeros(1, 4, 2)
    for backend in backends():
        reason = backend.unsupported(q, q, q, gates, None, 0.0)
        print(
            f"  {backend.name:13s} {'works' if reason is None else f'does not work: {reason}'} - {backend.description}"
        )


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


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
