"""Export models to other runtimes, and load what was exported, by transformers' exporters (`transformers.exporters`).

Shapes of routed attention depend on the tokens, except with `routing_unit="group_balanced"`: exported models of other units
compute all heads and weight them. What each runtime needs is in `runtimes`. Extra `hf`.
"""

from __future__ import annotations

import copy
import inspect
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import UserError, UserErrorType  # torch.export's, which it names nowhere else
from torch.overrides import TorchFunctionMode

from moh._extras import require
from moh._files import replacing_directory
from moh.models.runtimes import (
    RUNTIMES,
    Runtime,
    check_installed,
    check_threads,
    exporters_of,
    loading_options,
    runtime_of,
)

require("transformers", extra="hf")

import transformers  # noqa: E402

MANIFEST = "export.json"
"""Name of the file of an export that names its runtime and its programs."""


def export_model(
    model: nn.Module,
    inputs: Mapping[str, Any],
    runtime: str,
    directory: str | Path,
    *,
    decodes: bool = False,
    cache_length: int | None = None,
) -> Path:
    """Export a model, dense or MoH, with its present share of heads.

    Args:
        model: of transformers, timm, diffusers, or a module of your own; in evaluation mode, in float32 on the CPU. It is not
            changed.
        inputs: an example of what the model is called with, by the names of its arguments (timm's models call images `x`).
            Programs for "executorch" and "torch" take inputs of exactly this shape. For other runtimes it must have 2 or more
            samples, counted by the first size of `forward`'s first tensor. Their programs take any number, and those of models
            of transformers other lengths too; in other models a tensor that belongs to no sample keeps its shape: it has one
            dimension, or a first size of 1.
        runtime: a name in `RUNTIMES`.
        directory: to create or replace.
        decodes: export a language model as two programs, `prefill` and `decode`, which take a cache and return it; by default
            one program without a cache, `model`.
        cache_length: tokens that the cache holds, prompt included, where shapes are fixed; needed with `decodes` then. Both
            programs take a `transformers.StaticCache` of this length and a mask of bools `[B, 1, tokens, cache_length]`.

    Returns:
        `directory`.

    Raises:
        ValueError: the runtime is unknown, the model is in training mode, in another dtype or on another device, its `forward`
            has no such arguments, it can't be exported to this runtime, or `directory` holds something else.
        ImportError: transformers is too old, or a package of the runtime is missing.
    """
    found = runtime_of(runtime)
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(model, transformers.PreTrainedModel):
        for name, part in model.named_modules():
            if isinstance(part, transformers.PreTrainedModel):
                raise ValueError(
                    f"model must be the model of transformers itself, got a {type(model).__name__} around it: pass "
                    f"model.{name}, or with adapters what model.merge_and_unload() returns"
                )
    _check_state(model)
    _check_decoding(model, inputs, runtime, decodes, cache_length)
    _check_inputs(model, inputs, runtime)
    exporters = exporters_of(runtime)
    check_installed(runtime)
    config = getattr(exporters, f"{found.exporter}Config")(
        dynamic=found.is_dynamic, dynamic_shapes=_dynamic_shapes(model, inputs, found), **found.options
    )
    exporter = getattr(exporters, f"{found.exporter}Exporter")()
    with _prepared(model), _SpeltGelu() if found.spells_gelu else nullcontext():
        if decodes:
            given, generation = _to_decode(model, inputs, cache_length)
            program = exporter.export_for_generation(model, given, config, generation_config=generation)
        else:
            no_cache = {"use_cache": False} if _can_generate(model) else {}
            with _fixed_samples_refused(model, inputs, runtime):
                program = exporter.export(model, {**inputs, **no_cache}, config)
    if not isinstance(model, transformers.PreTrainedModel):
        program.config = None  # diffusers' can't be saved by transformers
    target = Path(directory).expanduser()
    # The manifest by itself: the first pattern is of the file that an earlier export must have
    with replacing_directory(target, kinds=(MANIFEST, "*.json", *found.files)) as scratch:
        program.save_pretrained(scratch)
    return target


def _can_generate(model: nn.Module) -> bool:
    return isinstance(model, transformers.PreTrainedModel) and bool(model.can_generate())


def _dynamic_shapes(model: nn.Module, inputs: Mapping[str, Any], runtime: Runtime) -> dict[str, Any] | None:
    """Which sizes may vary; None leaves it to the exporter: all of them, or none."""
    if not runtime.is_dynamic or isinstance(model, transformers.PreTrainedModel):
        return None
    samples = {0: torch.export.Dim.DYNAMIC}  # an error where a model fixes their number
    per_sample = _per_sample(model, inputs)
    return {name: samples if name in per_sample else None for name in inputs}


def _per_sample(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The inputs that have a row for each sample: the first tensor of `forward`, and those of the same first size."""
    names = sorted(inputs, key=[*inspect.signature(model.forward).parameters, *inputs].index)
    tensors = {name: inputs[name] for name in names if isinstance(inputs[name], Tensor) and inputs[name].dim() > 0}
    sizes = [tensor.shape[0] for tensor in tensors.values()]
    return {name: tensor for name, tensor in tensors.items() if tensor.shape[0] == sizes[0]}


@contextmanager
def _fixed_samples_refused(model: nn.Module, inputs: Mapping[str, Any], runtime: str) -> Iterator[None]:
    """A ValueError where a program must take any number of samples, and the model's code makes that of the example a constant."""
    try:
        yield
    except UserError as error:
        if error.error_type != UserErrorType.CONSTRAINT_VIOLATION:
            raise
        fixed = " or ".join(repr(name) for name, other in RUNTIMES.items() if not other.is_dynamic)
        names = " and ".join(_per_sample(model, inputs))
        raise ValueError(
            f"model must take any number of samples for runtime {runtime!r}, but {type(model).__name__} makes the first size of "
            f"{names} in the example a constant, as len(x) does: read x.shape[0] instead; if not all of them have samples, take "
            f"an example in which only samples have that size; or export to {fixed}. torch.export says: {_first_line(error)}"
        ) from error


def _to_decode(
    model: Any, inputs: Mapping[str, Any], cache_length: int | None
) -> tuple[dict[str, Any], transformers.GenerationConfig]:
    """The example and the generation's options from which transformers makes the two programs of a language model."""
    given, generation = dict(inputs), copy.deepcopy(model.generation_config)
    if cache_length is not None:
        generation.cache_implementation, generation.max_cache_len = "static", cache_length
        # transformers leaves out the mask of an example without padding, and the program would then have none
        given["attention_mask"] = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).clone()
        given["attention_mask"][0, 0] = 0
    return given, generation


@contextmanager
def _prepared(model: Any) -> Iterator[None]:
    """A model with attention that can be exported, and afterwards as it was: exporters change more than that."""
    learns = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    own_forward = "forward" in vars(model)
    with _static_shapes(model):
        try:
            yield
        finally:
            for parameter, requires_grad in learns:
                parameter.requires_grad_(requires_grad)
            if not own_forward:
                vars(model).pop("forward", None)


class _SpeltGelu(TorchFunctionMode):
    """Programs traced under it have the formula of GELU by tanh in place of the operator."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func is nn.functional.gelu and given.get("approximate") == "tanh":
            x = args[0] if args else given["input"]
            return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        return func(*args, **given)


@contextmanager
def _static_shapes(model: Any) -> Iterator[None]:
    """Attention whose shapes don't depend on the tokens: of active heads alone where a model has one, else of all heads."""
    if isinstance(model, transformers.PreTrainedModel):
        before = model.config._attn_implementation
        model.set_attn_implementation(implementation_for_export(model))
        try:
            yield
        finally:
            model.set_attn_implementation(before)
        return
    layers = [layer for layer in model.modules() if hasattr(layer, "static_backend")]
    backends = [layer.backend for layer in layers]
    try:
        for layer in layers:
            layer.backend = layer.static_backend
        yield
    finally:
        for layer, backend in zip(layers, backends, strict=True):
            layer.backend = backend


def implementation_for_export(model: Any) -> str:
    """The `attn_implementation` whose shapes are static: that of active heads alone where a model has one, else of all heads."""
    layers = model.config.layer_configs() if hasattr(model.config, "layer_configs") else ()
    return "moh_grouped" if layers and all(layer.heads_per_group is not None for layer in layers) else "sdpa"


def load_exported(directory: str | Path, *, threads: int | None = None) -> Any:
    """Load an export in its runtime, on the CPU: a `transformers.exporters.ExportedModel`.

    OpenVINO computes in float32, where its own default may be bfloat16. A "torch" program may hold pickled objects: load only
    those that you trust.

    Args:
        directory: of `export_model`, or of `save_pretrained` of such a model.
        threads: that ONNX Runtime or OpenVINO may use, 1 or more; None, the only value for other runtimes, leaves that to them.

    Raises:
        ValueError: there is no export, a file of it can't be read (names it), or `threads` is not possible.
        ImportError: transformers is too old, or a package of the runtime is missing or can't be imported.
    """
    folder = Path(directory).expanduser()
    runtime, programs = _manifest(folder)
    check_threads(runtime, threads)
    exporters = exporters_of(runtime)
    check_installed(runtime)
    if missing := [name for name in programs if not (folder / name).is_file()]:
        raise ValueError(f"export {str(directory)!r} is incomplete: {missing[0]} is missing; export the model again")
    from transformers import cache_utils

    caches = [getattr(cache_utils, name) for name in ("StaticCache", "StaticLayer", "StaticSlidingWindowLayer")]
    try:
        with torch.serialization.safe_globals(caches):  # a .pt2 file holds its example
            return exporters.ExportedModel.from_pretrained(
                folder, local_files_only=True, **loading_options(runtime, threads)
            )
    except (ImportError, MemoryError, TypeError):  # of the installation, the machine or the call, not of the file
        raise
    except Exception as error:  # each runtime has errors of its own for a file that it can't read
        names = " and ".join(programs)
        raise ValueError(
            f"export {str(directory)!r} can't be loaded: {names} is damaged, or from another version of its runtime "
            f"({runtime}): {_first_line(error)}"
        ) from error


def _manifest(folder: Path) -> tuple[str, list[str]]:
    """Name of the runtime of an export, and the files of its programs."""
    file = folder / MANIFEST
    if not file.is_file():
        raise ValueError(f"directory must hold an export, as export_model writes it, but there is no {str(file)!r}")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        written = str(found["export_format"])
        programs = [str(part["file"]) for part in found["components"].values()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{str(file)!r} is damaged: {error}; export the model again") from None
    for name, runtime in RUNTIMES.items():
        if runtime.exporter.lower() == written.lower():
            return name, programs
    formats = ", ".join(repr(runtime.exporter.lower()) for runtime in RUNTIMES.values())
    raise ValueError(f"{str(file)!r} must have an export_format among {formats}, got {written!r}")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _check_state(model: nn.Module) -> None:
    """Refuse what would be frozen into the program, or fail inside the exporter."""
    if model.training:
        raise ValueError("model must be in evaluation mode, got one in training mode: call model.eval()")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device.type != "cpu":
            raise ValueError(f"model must be on the CPU, got {name} on {tensor.device}: call model.cpu()")
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise ValueError(f"model must be in float32, got {name} in {tensor.dtype}: call model.float()")


def _check_decoding(
    model: nn.Module, inputs: Mapping[str, Any], runtime: str, decodes: bool, cache_length: int | None
) -> None:
    """Refuse a cache that a model or a runtime can't have."""
    if decodes and not _can_generate(model):
        raise ValueError(f"decodes must be False for a model that writes no text, got a {type(model).__name__}")
    if not decodes or RUNTIMES[runtime].is_dynamic:
        if cache_length is not None:
            fixed = " and ".join(repr(name) for name, other in RUNTIMES.items() if not other.is_dynamic)
            raise ValueError(
                f"cache_length must be None but with decodes=True for {fixed}, whose shapes are fixed, got {cache_length}"
            )
        return
    if not isinstance(inputs.get("input_ids"), Tensor):
        raise ValueError(f"inputs must have input_ids with decodes=True, got {', '.join(inputs) or 'none'}")
    tokens = inputs["input_ids"].shape[1]
    if not isinstance(cache_length, int) or cache_length <= tokens:
        raise ValueError(
            f"cache_length must be more than the example's {tokens} tokens for runtime {runtime!r}, whose cache has a fixed "
            f"length, got {cache_length}"
        )


def _check_inputs(model: nn.Module, inputs: Mapping[str, Any], runtime: str) -> None:
    signature = inspect.signature(model.forward)
    named = {p.name for p in signature.parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    try:
        signature.bind(**inputs)
        if named and (unknown := sorted(set(inputs) - named)):  # **kwargs would take any
            raise TypeError(f"got an unexpected keyword argument {unknown[0]!r}")
    except TypeError as error:
        raise ValueError(f"inputs must be the arguments of {type(model).__name__}.forward by name: {error}") from None
    if not RUNTIMES[runtime].is_dynamic:
        return
    samples = _per_sample(model, inputs)
    if not isinstance(model, transformers.PreTrainedModel):
        _check_samples_agree(model, inputs, samples)
    for name, tensor in samples.items():
        if tensor.shape[0] < 2:  # torch.export takes 0 and 1 for constants; OpenVINO crashed on a ViT
            raise ValueError(
                f"inputs must have 2 or more samples for runtime {runtime!r}, whose programs take any number, got {name} of "
                f"shape {tuple(tensor.shape)}: add more, copies will do"
            )


def _check_samples_agree(model: nn.Module, inputs: Mapping[str, Any], samples: Mapping[str, Tensor]) -> None:
    """Refuse a tensor that looks like samples, but whose first size isn't that of the samples: a program would fix it."""
    for name, tensor in inputs.items():
        if name in samples or not isinstance(tensor, Tensor) or tensor.dim() < 2 or tensor.shape[0] == 1:
            continue
        first, counted = next(iter(samples.items()))
        raise ValueError(
            f"inputs must have as many samples in {name} as in {first}, the first tensor of {type(model).__name__}.forward, got "
            f"shapes {tuple(tensor.shape)} and {tuple(counted.shape)}: a tensor that has samples must come first in forward; one "
            "that has none needs a single dimension or a first size of 1, or can be a buffer of the model"
        )
