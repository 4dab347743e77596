"""Exported models in other runtimes: are they equal to PyTorch, how large are they, and how fast next to the dense ones?

    make test-engines                                    # makes the runtimes' environments
    python experiments/exported.py export --runtime onnx  # in the environment of that runtime; minutes for each model
    python experiments/exported.py measure --runtime onnx # in the same
    python experiments/exported.py page                   # what was measured is added to the committed results

SmolLM2-135M, all-MiniLM-L6-v2 and vision transformers of random weights: dense, with routed heads, and with fixed ones. Exports
and results are kept in `--work`, so that an interrupted run resumes; with other options it must have another `--work`. Needs the
extras `llm` and `vision`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from result_names import command
from sentence_encoder import fetch_encoder
from transformers.cache_utils import StaticLayer

import moh
from moh._files import replacing_file, write_text
from moh.demo.base_model import default_base_model
from moh.evaluation import cpu_name
from moh.models.exported import export_model, load_exported
from moh.models.runtimes import RUNTIMES
from moh.models.transformers.loading import load_causal_lm

NAME = "exported"
PACKAGES = {"onnx": "onnxruntime", "openvino": "openvino", "executorch": "executorch", "torch": "torch"}
TITLES = {"onnx": "ONNX Runtime", "openvino": "OpenVINO", "executorch": "ExecuTorch", "torch": "`torch.export`"}
PARTS = {
    ("smollm2", "prefill"): "SmolLM2-135M, {layers} layers, 256 tokens, 6 of 9 heads",
    ("smollm2", "decode"): "SmolLM2-135M, {layers} layers, a token with 256 in the cache",
    ("minilm", "model"): "MiniLM-L6, 8 texts of 64 tokens, 8 of 12 heads",
    ("vit", "model"): "ViT-S/16 of timm, one image, 75 % of the heads",
    ("transnext", "model"): "MoH-ViT-S of the paper (TransNeXt), 6 of its 37 blocks, one image, 75 % of the heads",
}
VARIANTS = ("dense", "routed", "fixed")
WHOLE = ("vit", "transnext")  # models of timm, which can't be without some of their heads
LAYERS = 30  # of SmolLM2-135M
CACHE = 288  # tokens, where its length is fixed
ROUNDS = 15
WORK = Path("runs/exported")
Inputs = dict[str, torch.Tensor]


def main() -> None:
    """Parse the options and take one step."""
    parser = make_parser()
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    try:
        take(options)
    except ValueError as error:
        parser.error(str(error))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("export", "measure", "page"))
    parser.add_argument("--runtime", choices=RUNTIMES, help="of this environment; not for page")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS])
    parser.add_argument("--layers", type=int, default=LAYERS, help="only the first ones of SmolLM2 (default: all, 30)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="calls of each program, in turns")
    parser.add_argument("--alone", action="store_true", help="nothing else runs on the machine, as the page then says")
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--output", "-o", type=Path, default=Path("docs/results"))
    return parser


def take(options: argparse.Namespace) -> None:
    """The step that the options name."""
    if options.step == "page":
        rows = collect(options.work, options.output / f"{NAME}.json")
        text = page(rows)  # before anything is written
        write_text(options.output / f"{NAME}.json", json.dumps(rows, indent=1) + "\n")
        write_text(options.output / f"{NAME}.md", text)
        return
    if options.runtime is None:
        raise ValueError(f"--runtime must be given for {options.step}: {', '.join(RUNTIMES)}")
    if not 1 <= options.layers <= LAYERS:
        raise ValueError(f"--layers must be between 1 and {LAYERS}, got {options.layers}")
    step = export if options.step == "export" else measure
    if step is measure:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # one core; ExecuTorch has no option for threads
        torch.set_num_threads(1)
    for name in options.models:
        step(options, name)


# The models: equal but for their attention


Variants = dict[str, Callable[[], Any]]


def smollm2(layers: int) -> tuple[Inputs, Variants]:
    dense = load_causal_lm(default_base_model(), dtype=torch.float32).eval()
    keep_first(dense, layers)
    dense.generation_config.eos_token_id, dense.generation_config.pad_token_id = None, 0
    ids = random_ids(1, 256, dense.config.vocab_size)
    heads = dict(shared_heads=3, active_heads=3, routing_unit="group_balanced")
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids)), converted(dense, ids, heads)


def keep_first(model: Any, layers: int) -> None:
    """Drop the layers of a language model after the first ones, and what its configuration says of them."""
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers
    if kinds := getattr(model.config, "layer_types", None):  # a cache of fixed length reads them, if there are any
        model.config.layer_types = kinds[:layers]


def minilm(layers: int) -> tuple[Inputs, Variants]:
    dense = transformers.AutoModel.from_pretrained(fetch_encoder()).eval()
    ids = random_ids(8, 64, dense.config.vocab_size)
    mask = torch.ones_like(ids)
    mask[1::2, 40:] = 0
    return dict(input_ids=ids, attention_mask=mask), converted(dense, ids, dict(shared_heads=3, active_heads=5))


def vit(layers: int) -> tuple[Inputs, Variants]:
    return of_timm(dict(dense="vit_small_patch16_224", routed="moh_vit_small_patch16_224_75"))


def transnext(layers: int) -> tuple[Inputs, Variants]:
    names = dict(dense="moh_transnext_small_dense", routed="moh_transnext_small_75")
    return of_timm(names, depths=(1, 1, 3, 1))  # all 37 blocks take long to export


MODELS: dict[str, Callable[[int], tuple[Inputs, Variants]]] = dict(
    minilm=minilm, vit=vit, transnext=transnext, smollm2=smollm2
)


def converted(dense: Any, calibration: torch.Tensor, heads: Mapping[str, Any]) -> Variants:
    """The dense model, and those converted from it: neither equality nor time depends on the quality of what is chosen."""
    given = dict(calibration=calibration, allocation="even", refit_output=False, progress=False)
    kept = heads["shared_heads"] + heads["active_heads"]
    return dict(
        dense=lambda: dense,
        routed=lambda: moh.convert(dense, router="linear", **heads, **given),
        fixed=lambda: moh.convert(dense, router="fixed", active_heads=kept, **given),
    )


def of_timm(names: Mapping[str, str], **options: Any) -> tuple[Inputs, Variants]:
    """Models of random weights."""
    torch.manual_seed(0)
    image = torch.randn(1, 3, 224, 224)
    return dict(x=image), {kind: partial(named, name, options) for kind, name in names.items()}


def named(name: str, options: Mapping[str, Any]) -> Any:
    torch.manual_seed(0)
    return timm.create_model(name, **options).eval()


def random_ids(batch: int, tokens: int, vocabulary: int) -> torch.Tensor:
    return torch.randint(1000, vocabulary, (batch, tokens), generator=torch.Generator().manual_seed(0))


def variants_of(name: str) -> list[str]:
    """The variants that a model has."""
    return [kind for kind in VARIANTS if kind != "fixed" or name not in WHOLE]


# Export, and what PyTorch gives


def export(options: argparse.Namespace, name: str) -> None:
    """Export the variants of a model, with the inputs and outputs of the unexported model next to them.

    `calls.pt` is moved into place after all else: a folder that has it is complete.
    """
    inputs, variants = MODELS[name](options.layers)
    is_dynamic = RUNTIMES[options.runtime].is_dynamic
    decodes = name == "smollm2"
    example = {k: torch.cat([v, v]) for k, v in inputs.items()} if is_dynamic else inputs
    cache = dict(cache_length=CACHE) if decodes and not is_dynamic else {}
    for kind, make in variants.items():
        folder = options.work / options.runtime / f"{name}-{kind}"
        if is_complete(folder):
            exported_config(folder, options, name)
            continue
        start = time.perf_counter()
        model = make()
        export_model(model, example, options.runtime, folder / "program", decodes=decodes, **cache)
        with replacing_file(folder / "calls.pt") as file:
            torch.save(calls(model, inputs, decodes, is_dynamic), file)
        print(f"{folder}: {time.perf_counter() - start:.0f} s", flush=True)


def is_complete(folder: Path) -> bool:
    return (folder / "calls.pt").is_file()


def exported_config(folder: Path, options: argparse.Namespace, name: str) -> Any:
    """The configuration of an exported model of text, which must have as many layers as the options ask for."""
    if name != "smollm2":
        return None
    config = transformers.AutoConfig.from_pretrained(folder / "program")
    if config.num_hidden_layers != options.layers:
        raise ValueError(
            f"{folder} was exported with {config.num_hidden_layers} layers, got --layers {options.layers}: give the same, or "
            "another --work"
        )
    return config


@torch.no_grad()
def calls(model: Any, inputs: Inputs, decodes: bool, is_dynamic: bool) -> dict[str, Any]:
    """Program -> (its inputs but for the cache, what the model gives in PyTorch)."""
    if not decodes:
        return {"model": (inputs, values(model(**inputs)))}
    mask = inputs["attention_mask"]
    first = model(**inputs, use_cache=True)
    following = dict(
        input_ids=inputs["input_ids"][:, :1],
        attention_mask=torch.cat([mask, mask[:, :1]], 1),
        position_ids=mask.sum(-1, keepdim=True),
    )
    then = model(**following, past_key_values=first.past_key_values)
    given = inputs | dict(position_ids=mask.cumsum(-1) - 1)
    if not is_dynamic:  # what is seen of a cache of fixed length
        places, tokens = torch.arange(CACHE), mask.shape[1]
        given["attention_mask"] = (places <= torch.arange(tokens)[:, None])[None, None]
        following["attention_mask"] = (places <= tokens)[None, None, None]
    return {"prefill": (given, values(first)), "decode": (following, values(then))}


def values(outputs: Any) -> torch.Tensor:
    """The logits, or an encoder's last states."""
    if isinstance(outputs, torch.Tensor):
        return outputs.clone()
    found: torch.Tensor = outputs["logits"] if "logits" in outputs else outputs["last_hidden_state"]
    return found.clone()


# Measure


def measure(options: argparse.Namespace, name: str) -> None:
    """Sizes, errors and times of all variants of a model; the times are taken in turns."""
    kept = options.work / f"{options.runtime}-{name}.json"
    if kept.is_file():
        row = json.loads(kept.read_text(encoding="utf-8"))
        check_measured(row, variants_of(name), kept)
        then, now = measured_with(name, row), measured_with(name, vars(options))
        if then != now:
            raise ValueError(f"{kept} was measured with {then}, got {now}: give the same, or another --work")
        return
    runs: dict[tuple[str, str], Callable[[], Any]] = {}
    found: dict[str, dict[str, dict[str, Any]]] = {}
    folders = {kind: options.work / options.runtime / f"{name}-{kind}" for kind in variants_of(name)}
    if missing := [str(folder) for folder in folders.values() if not is_complete(folder)]:
        raise ValueError(f"there is no complete export in {' or '.join(missing)}: {export_command(options, name)}")
    for kind, folder in folders.items():
        config = exported_config(folder, options, name)
        threads = 1 if RUNTIMES[options.runtime].limits_threads else None  # the others have one core: see `take`
        runners = load_exported(folder / "program", threads=threads).runners
        is_dynamic = RUNTIMES[options.runtime].is_dynamic
        cache: Any = None
        for part, (inputs, expected) in torch.load(folder / "calls.pt", weights_only=True).items():
            if part == "prefill":
                cache = empty_cache(config, is_dynamic)
            given = inputs if part == "model" else inputs | dict(past_key_values=cache)
            call = partial(run, runners[part], given, position=256 if part == "decode" else 0)
            got = call()
            cache = getattr(got, "past_key_values", None)
            error = float((values(got) - expected).abs().max() / expected.abs().max())
            files = [f for f in (folder / "program").iterdir() if part in f.name and f.suffix != ".json"]
            sizes = sum(file.stat().st_size for file in files)
            found.setdefault(part, {})[kind] = dict(error=error, bytes=sizes)
            runs[part, kind] = call
    for part, kinds in found.items():
        times = in_turns({kind: runs[part, kind] for kind in kinds}, options.rounds)
        for kind, seconds in times.items():
            kinds[kind]["seconds"] = seconds
    row = dict(
        runtime=options.runtime,
        model=name,
        layers=None if config is None else config.num_hidden_layers,
        parts=found,
        rounds=options.rounds,
        alone=options.alone,
        cpu=cpu_name(),
        versions={p: version(p) for p in ("torch", "transformers", "timm", PACKAGES[options.runtime])},
    )
    write_text(kept, json.dumps(row, indent=1) + "\n")
    print(json.dumps(row), flush=True)


def check_measured(row: Mapping[str, Any], kinds: Sequence[str], file: Path) -> None:
    """Refuse a result in which a variant is missing."""
    for part, measured in row["parts"].items():
        if missing := [kind for kind in kinds if kind not in measured]:
            raise ValueError(f"{file} has no {' and no '.join(missing)} model ({part}): delete it and measure again")


def measured_with(name: str, values: Mapping[str, Any]) -> str:
    """The options that a result depends on."""
    layers = f" --layers {values['layers']}" if name == "smollm2" else ""
    return f"--rounds {values['rounds']}{layers}{' --alone' if values.get('alone') else ''}"


def export_command(options: argparse.Namespace, name: str) -> str:
    """The command line that makes the missing exports of a model."""
    layers = options.layers if name == "smollm2" else LAYERS
    return command_line("export", runtime=options.runtime, models=[name], layers=layers, work=options.work)


def empty_cache(config: Any, is_dynamic: bool) -> Any:
    """What a prefill of one text gets."""
    if is_dynamic:
        return transformers.DynamicCache(config=config)
    return transformers.StaticCache(config=config, max_cache_len=CACHE)


def run(runner: Callable[..., Any], given: dict[str, Any], position: int) -> Any:
    """One call; a cache of fixed length, which `torch.export`'s programs write to, continues at `position`."""
    for layer in getattr(given.get("past_key_values"), "layers", ()):
        if isinstance(layer, StaticLayer):
            layer.cumulative_length.fill_(position)
    return runner(**given)


def in_turns(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Quartiles of the processor time of each call in seconds, which other programs disturb less than the clock's."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn, (name, call) in itertools.product(range(rounds + 2), calls.items()):
        start = time.process_time()
        call()
        if turn >= 2:  # the first ones allocate
            times[name].append(time.process_time() - start)
    return {name: statistics.quantiles(seconds, n=4) for name, seconds in times.items()}


# The page


def collect(work: Path, committed: Path) -> list[dict[str, Any]]:
    """All rows, by runtime and model; those in `work` are added to the committed ones, or replace them."""
    rows = json.loads(committed.read_text(encoding="utf-8")) if committed.is_file() else []
    rows += [json.loads(file.read_text(encoding="utf-8")) for file in sorted(work.glob("*.json"))]
    if not rows:
        raise ValueError(f"nothing was measured: there is no result in {work}, and no {committed}")
    found = {(row["runtime"], row["model"]): row for row in rows}
    return [found[key] for key in sorted(found)]


def made_by(rows: list[dict[str, Any]]) -> list[str]:
    """The command lines that make all rows, and the page of them."""
    lines = []
    for (runtime, rounds, alone), group in itertools.groupby(
        rows, lambda row: (row["runtime"], row["rounds"], row.get("alone", False))
    ):
        layers = {row["model"]: row["layers"] for row in group}
        given = dict(runtime=runtime, models=[m for m in MODELS if m in layers], layers=layers.get("smollm2", LAYERS))
        for step, values in (("export", given), ("measure", given | dict(rounds=rounds))):
            line = command_line(step, **values)
            lines.append(f"{line} --alone" if alone and step == "measure" else line)
    return [*lines, f"python experiments/{NAME}.py page"]


def short_title(row: Mapping[str, Any]) -> str:
    """The name of a row's model, without what it reads."""
    return next(title for (model, _), title in PARTS.items() if model == row["model"]).split(",")[0]


def command_line(step: str, **values: Any) -> str:
    """How a step is called; options that have their defaults are left out."""
    defaults = dict(runtime=None, models=[*MODELS], layers=LAYERS, rounds=ROUNDS, work=WORK)
    return command(f"{NAME}.py", values, defaults).replace(f"{NAME}.py", f"{NAME}.py {step}")


def page(rows: list[dict[str, Any]]) -> str:
    """All rows as a page."""
    lines = []
    for row, (part, title) in itertools.product(rows, ((p, t) for (_, p), t in PARTS.items())):
        if part not in row["parts"] or PARTS.get((row["model"], part)) != title:
            continue
        kinds = row["parts"][part]
        dense = kinds["dense"]["seconds"][1]
        cells = [TITLES[row["runtime"]], title.format(layers=row["layers"])]
        cells += [f"{kinds[k]['error']:.0e}" if k in kinds else "–" for k in VARIANTS]
        cells += [f"{kinds[k]['bytes'] / 1e6:.1f}" if k in kinds else "–" for k in VARIANTS]
        cells += [spread([1e3 * s for s in kinds["dense"]["seconds"]], ".1f")]
        cells += [spread([s / dense for s in kinds[k]["seconds"]], ".2f") if k in kinds else "–" for k in VARIANTS[1:]]
        lines.append(f"| {' | '.join(cells)} |")
    rounds = " or ".join(map(str, sorted({row["rounds"] for row in rows})))
    machines = ", ".join(sorted({row["cpu"] for row in rows}))
    versions = ", ".join(sorted({f"{name} {number}" for row in rows for name, number in row["versions"].items()}))
    disturbed = [row for row in rows if not row.get("alone")]
    exceptions = ", ".join(f"{short_title(row)} in {TITLES[row['runtime']]}" for row in disturbed)
    company = "next to other programs" if len(disturbed) == len(rows) else "with nothing else running"
    if 0 < len(disturbed) < len(rows):
        company += f" (but for {exceptions}: next to other programs)"
    few = sorted({row["layers"] for row in rows if row["model"] == "smollm2" and row["layers"] < LAYERS})
    cut = (
        f" Where a row names {' or '.join(map(str, few))} layers, only the first of SmolLM2's {LAYERS} were exported: embedding "
        "and output layer, where heads save nothing, are then most of the program, and the ratios are not those of the whole "
        "model."
    )
    return (
        "# Exported models in other runtimes\n\n"
        "A dense model, and the same with routed and with fixed heads, exported in float32, loaded from the files and run by "
        "the runtime on the CPU, one core ([how to export](../serving.md#export)). *Error*: the largest difference to the same "
        "model in PyTorch, relative to its largest output. Sizes are of the program that the row calls; prefill and decode are "
        f"two files, each with all weights; where shapes are fixed, a row that decodes has a cache of {CACHE} places. "
        f"Times are processor time, medians of {rounds} calls in turns, in brackets the other quartiles; ratios are over the "
        "dense median: where they include 1, which of the two is faster is not clear.\n\n"
        '*Routed*: SmolLM2 with `routing_unit="group_balanced"`, which computes active queries alone in the attention; its '
        "projections stay dense. MiniLM and the ViTs have as many key/value heads as heads: they compute all heads, and the "
        "routers cost time. *Fixed*: the same number of heads, the same ones for every token, the others cut out of the "
        "projections. Heads are chosen on random inputs, since neither equality nor time depends on which they are. "
        "The ViTs have random weights. A dash: not measured; timm's models can't be without some of their heads."
        + (cut if few else "")
        + "\n\n"
        "| runtime | model | error, dense | routed | fixed | MB, dense | routed | fixed | ms, dense | routed / dense "
        "| fixed / dense |\n"
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- | --- |\n"
        + "\n".join(lines)
        + f"\n\nOne run on {machines}, {company}; {versions}. Made by, each runtime in an environment of its own:\n\n"
        "```console\n" + "".join(f"$ {line}\n" for line in made_by(rows)) + "```\n"
    )


def spread(quartiles: list[float], digits: str) -> str:
    """The median, and the other two quartiles."""
    low, middle, high = (format(value, digits) for value in quartiles)
    return f"{middle} ({low} to {high})"


if __name__ == "__main__":
    main()
